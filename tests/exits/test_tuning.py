"""Training the last kept layer, on a model small enough to see it win and to see it refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import tokenise
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits import cached_states, tuning
from distil_rank.exits import shorten as shortening
from distil_rank.exits.augmentation import augment
from distil_rank.exits.cached_states import cache_states
from distil_rank.exits.exit_map import PooledStates, features_of, fit_exit
from distil_rank.exits.shorten import Recipe, shorten
from distil_rank.exits.tuning import TrainingOptions, tune_exit
from distil_rank.training.exit_training import ExitModule, ExitTraining
from tests.exits.conftest import write_proteins

OWN = [(0, False), (0, True)]  # the states of the layer that is trained


@pytest.fixture(scope="module", params=["mean", "bos"])
def data(model, request, tmp_path_factory) -> EmbeddingDataModule:
    folder = tmp_path_factory.mktemp("data")
    write_proteins(folder / "in.fasta", 400, 3, 12)
    options = {"layer": "1,2,2n,3", "precision": "fp32", "accelerator": "cpu"}
    embed(folder / "in.fasta", folder / "store", str(model), request.param, **options)
    module = EmbeddingDataModule(str(folder / "store"), split="exact")
    module.setup()
    return module


def closed_form(data):
    store = Store.open(data.source)
    rows = PooledStates(store, features_of(2, store.layers))
    return store, rows, fit_exit(rows, rows.features, data.split_rows)


def test_training_starts_at_the_closed_form(model, data):
    store, rows, found = closed_form(data)
    x, y = rows(np.arange(50))
    batches = cache_states(
        load_backbone(str(model)), 2, store.sequences[:50], x[:, :32], y, store.manifest["pooling"], batch_size=7
    )
    dense, esm = found.layer.to_linear(), load_backbone(str(model)).model
    module = ExitModule(
        [esm.layers[1]], esm.emb_layer_norm_after, dense.weight.detach(), dense.bias.detach(), OWN, x.std(0), 1.0
    ).eval()
    order = sorted(range(50), key=lambda index: len(store.sequences[index]))
    with torch.no_grad():
        estimate = torch.cat([module(batch) for batch in batches])
        torch.testing.assert_close(estimate, found.layer(x[order]), atol=0.02, rtol=0)  # states are cached in float16
    assert torch.equal(torch.cat([batch.target for batch in batches]), y[order])


def halved(found):
    """A start far from the best, which training is sure to leave: on random weights it overfits the best one."""
    layer, start = found.layer.truncate(found.layer.rank), found.start.truncate(found.start.rank)
    with torch.no_grad():
        layer.B *= 0.5
        start.B *= 0.5
    return replace(found, layer=layer, start=start)


@pytest.mark.parametrize("what", ["layer", "residual"])
def test_what_was_trained_is_what_the_folder_runs(model, data, tmp_path, monkeypatch, what):
    monkeypatch.setattr(shortening, "fit_exit", lambda *arguments: halved(fit_exit(*arguments)))
    options = TrainingOptions(what, minutes=1, epochs=3, lr=1e-3)
    done, found = shorten(str(model), data, tmp_path / "s", Recipe(2, training=options))
    assert done.training is not None and done.training.kept
    assert (tmp_path / "s" / "tuned.safetensors").exists()
    store, rows, _ = closed_form(data)
    backbone = load_backbone(str(tmp_path / "s"))
    assert backbone.model.layers[1].fc1.out_features == (128 if what == "layer" else 160)
    chosen = data.split_rows.test
    sequences = [store.sequences[row] for row in chosen]
    ours = Embedder(backbone, store.manifest["pooling"]).embed(sequences).vectors
    _, y = rows(chosen)
    r2 = 1 - float((ours - y).square().sum() / (y - found.target_mean.float()).square().sum())
    assert r2 == pytest.approx(done.scores.r2, abs=0.01)


def test_the_first_token_alone_is_the_same(model, data):
    store, rows, found = closed_form(data)
    x, y = rows(np.arange(20))
    (batch,) = cache_states(load_backbone(str(model)), 2, store.sequences[:20], x[:, :32], y, "bos")
    dense, esm = found.layer.to_linear(), load_backbone(str(model)).model
    fixed = ([esm.layers[1]], esm.emb_layer_norm_after, dense.weight.detach(), dense.bias.detach(), OWN, x.std(0), 1.0)
    with torch.no_grad():
        both = [ExitModule(*fixed, first_only=first).eval()(batch) for first in (True, False)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


def test_copies_of_training_proteins_are_trained_on(model, data, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(tuning, "train_exit", lambda module, train, *rest: seen.update(train=train) or no_training)
    no_training = ExitTraining(((0, 1.0),), False, 0.0)
    store, rows, found = closed_form(data)
    split = data.split_rows
    copies = augment(store, found.features, np.concatenate([split.train, split.val]), 2, tmp_path)
    tune_exit(load_backbone(str(model)), store, found, rows, split, copies=copies)
    assert sum(len(batch.target) for batch in seen["train"]) == 3 * len(split.train)


def test_no_gain_is_not_kept(model, data, tmp_path):
    options = TrainingOptions(minutes=1, epochs=1, lr=1e-9)
    done, _ = shorten(str(model), data, tmp_path / "s", Recipe(2, training=options))
    assert done.training is not None and not done.training.kept
    assert not (tmp_path / "s" / "tuned.safetensors").exists()
    plain, _ = shorten(str(model), data, tmp_path / "t", Recipe(2))
    assert done.scores == plain.scores
    assert load_backbone(str(tmp_path / "s")).sha256 == load_backbone(str(tmp_path / "t")).sha256


def test_a_tail_is_matched_at_its_end(model, data):
    store, rows, found = closed_form(data)
    torch.manual_seed(0)
    tail = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(32, 2))
    options, start = TrainingOptions(minutes=1, epochs=3, lr=1e-3), halved(found)
    tuned = tune_exit(load_backbone(str(model)), store, start, rows, data.split_rows, options, tail)
    assert tuned.training.kept
    with torch.no_grad():
        x, y = rows(data.split_rows.test)
        before = (tail(start.layer(x)) - tail(y)).square().mean()
        after = (tail(tuned.found.layer(tuned.features)) - tail(tuned.target)).square().mean()
        assert after < before


def test_before_the_first_layer_are_embeddings(model, data):
    store, rows, _ = closed_form(data)
    backbone = load_backbone(str(model))
    (batch,) = cache_states(backbone, 1, store.sequences[:1], *rows(np.arange(1)), "mean")
    tokens, _ = tokenise(store.sequences[:1], backbone.alphabet)
    embedded = backbone.model.embed_tokens(tokens) * (1 - 0.15 * 0.8)
    torch.testing.assert_close(batch.hidden[0].float(), embedded, atol=1e-3, rtol=1e-3)


def test_more_states_than_fit_cannot_be_trained_on(model, data, monkeypatch):
    store, rows, _ = closed_form(data)
    x, y = rows(np.arange(5))
    monkeypatch.setattr(cached_states, "CACHE_BYTES", 100)
    with pytest.raises(InputError, match="on fewer"):
        cache_states(load_backbone(str(model)), 2, store.sequences[:5], x, y, "mean")
