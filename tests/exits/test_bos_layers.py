"""The BOS token alone through further layers: against fair-esm's own layers, and end to end through a folder."""

import numpy as np
import pytest
import torch

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits import shorten as shortening
from distil_rank.exits.bos_layers import bos_states
from distil_rank.exits.exit_map import fit_exit
from distil_rank.exits.shorten import Recipe, shorten
from distil_rank.exits.tuning import TrainingOptions
from tests.exits.conftest import write_proteins
from tests.exits.test_tuning import halved


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> EmbeddingDataModule:
    folder = tmp_path_factory.mktemp("data")
    write_proteins(folder / "in.fasta", 400, 3, 12)
    options = {"layer": "1,1n,3", "precision": "fp32", "accelerator": "cpu"}
    embed(folder / "in.fasta", folder / "store", str(model), "bos", **options)
    module = EmbeddingDataModule(str(folder / "store"), split="exact")
    module.setup()
    return module


@torch.no_grad()
def by_fair_esm(backbone, sequence: str) -> list[torch.Tensor]:
    """BOS states behind layers 2 and 3 (normed), the residues staying as they are behind layer 1."""
    tokens = torch.tensor([backbone.alphabet.encode(f"<cls>{sequence}<eos>")])
    hidden = backbone.model(tokens, repr_layers=[1])["representations"][1].transpose(0, 1)  # (T, 1, C)
    states = []
    for layer in backbone.model.layers[1:]:
        hidden[0] = layer(hidden)[0][0]
        states.append(hidden[0, 0].clone())
    return [states[0], backbone.model.emb_layer_norm_after(states[1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_token_attends_to_what_stays(model, dtype):
    backbone, texts = load_backbone(str(model)), ["MKTAYIAK", "ACD", "WWYVMKLPQ"]
    encoder = FusedEncoder(backbone.model, dtype, bos_only_after=1)
    tokens, lengths = tokenise(texts, backbone.alphabet)
    first = np.cumsum([0, *lengths[:-1]])
    _, one, two, three = (state.clone() for state in encoder.states(tokens, lengths))
    rest = np.setdiff1d(np.arange(len(tokens)), first)
    assert torch.equal(one[rest], two[rest]) and torch.equal(one[rest], three[rest])
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for row, text in zip(first, texts, strict=True):
        expected = by_fair_esm(backbone, text)
        torch.testing.assert_close(two[row], expected[0], atol=tolerance, rtol=0)
        torch.testing.assert_close(encoder.normed(three[row]), expected[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("train", [False, True])
def test_the_folder_runs_what_was_fitted(model, data, tmp_path, monkeypatch, train):
    if train:
        monkeypatch.setattr(shortening, "fit_exit", lambda *arguments: halved(fit_exit(*arguments)))
    training = TrainingOptions(minutes=1, epochs=3, lr=1e-3) if train else None
    done, found = shorten(
        str(model), data, tmp_path / "s", Recipe(1, bos_layers=2, copies=2, training=training), tmp_path
    )
    assert done.features == "1, 1n, 2, 3" and done.cost is None
    assert train == (done.training is not None and done.training.kept)
    backbone, store = load_backbone(str(tmp_path / "s")), Store.open(data.source)
    assert backbone.exit is not None and backbone.exit.bos_only_after == 1
    chosen = data.split_rows.test
    ours = Embedder(backbone, "bos").embed([store.sequences[row] for row in chosen]).vectors
    y = torch.from_numpy(store.embeddings()[chosen])
    r2 = 1 - float((ours - y).square().sum() / (y - found.target_mean.float()).square().sum())
    assert r2 == pytest.approx(done.scores.r2, abs=0.01)


def test_they_are_worth_it(model, data, tmp_path):
    plain, _ = shorten(str(model), data, tmp_path / "a", Recipe(1))
    more, _ = shorten(str(model), data, tmp_path / "b", Recipe(1, bos_layers=2))
    assert more.scores.r2 > plain.scores.r2


def test_refusals(model, data, tmp_path):
    with pytest.raises(InputError, match="from 0 to 2 behind layer 1"):
        bos_states(1, 3, 3)
    (tmp_path / "in.fasta").write_text("".join(f">{i}\n{'ACDEFGHIKL'[: 3 + i % 8]}\n" for i in range(40)))
    options = {"layer": "1,3", "precision": "fp32", "accelerator": "cpu"}
    embed(tmp_path / "in.fasta", tmp_path / "mean", str(model), "mean", **options)
    mean = EmbeddingDataModule(str(tmp_path / "mean"), split="exact")
    mean.setup()
    with pytest.raises(InputError, match="store of BOS vectors"):
        shorten(str(model), mean, tmp_path / "s", Recipe(1, bos_layers=1))
    shorten(str(model), data, tmp_path / "s", Recipe(1, bos_layers=1))
    with pytest.raises(InputError, match="auto, fp32 or bf16"):
        embed(tmp_path / "in.fasta", tmp_path / "x", str(tmp_path / "s"), "bos", precision="int8")
