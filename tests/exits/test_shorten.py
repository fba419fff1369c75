"""A shortened backbone against the whole one, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distil_rank import load
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.exit_map import PooledStates, features_of, fit_exit
from distil_rank.exits.measure import measure_exit
from distil_rank.exits.shorten import Recipe, layers_needed, open_states, shorten
from tests.exits.conftest import write_proteins


@pytest.fixture(scope="module")
def states(tiny_esm2, tmp_path_factory) -> Path:
    """A store of both layers of the tiny model, of proteins long enough for their means to differ."""
    folder = tmp_path_factory.mktemp("states")
    write_proteins(folder / "in.fasta", 600, 3, 12)
    embed(
        folder / "in.fasta", folder / "store", str(tiny_esm2.fair_esm), layer="1,1n,2", precision="fp32",
        accelerator="cpu",
    )  # fmt: skip
    return folder / "store"


@pytest.fixture(scope="module")
def data(states) -> EmbeddingDataModule:
    module = EmbeddingDataModule(str(states), split="exact")
    module.setup()
    return module


@pytest.fixture(scope="module")
def short(tiny_esm2, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "folder"
    shorten(str(tiny_esm2.fair_esm), data, folder, Recipe(1, with_weights=True))
    return folder


def test_it_gives_the_map_of_the_kept_layers_states(tiny_esm2, data, states, tmp_path):
    done, found = shorten(str(tiny_esm2.fair_esm), data, tmp_path / "s", Recipe(1))
    backbone = load_backbone(str(tmp_path / "s"))
    assert (backbone.num_layers, backbone.depth, backbone.dim, len(backbone.model.layers)) == (1, 2, 32, 1)
    store = Store.open(states)
    ours = Embedder(backbone).embed(store.sequences[:20]).vectors
    x, _ = PooledStates(store, found.features)(np.arange(20))
    with torch.no_grad():
        torch.testing.assert_close(ours, found.layer(x), atol=1e-4, rtol=0)
    assert done.scores.r2 == pytest.approx(found.r2[-1], abs=1e-5)
    assert done.cost is not None and 0 < done.cost < 1


def test_pooling_commutes_with_the_map(short):
    backbone = load_backbone(str(short))
    sequences = ["MKTAYIAKQR", "ACDEF"]
    residues = Embedder(backbone, "residue").embed(sequences).per_sequence()
    means = Embedder(backbone).embed(sequences).vectors
    torch.testing.assert_close(torch.stack([part.mean(0) for part in residues]), means, atol=1e-5, rtol=0)


def test_copied_weights_are_the_kept_ones_only_and_give_the_same(short, data, tiny_esm2, tmp_path):
    shorten(str(tiny_esm2.fair_esm), data, tmp_path / "plain", Recipe(1))
    alone, plain = load_backbone(str(short)), load_backbone(str(tmp_path / "plain"))
    assert not [key for key in alone.model.state_dict() if key.startswith("layers.1.")]
    sequences = ["MKTAYIAKQR", "ACDEF"]
    both = [Embedder(backbone).embed(sequences).vectors for backbone in (alone, plain)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    assert (short / "backbone.safetensors").stat().st_size < tiny_esm2.fair_esm.stat().st_size


def test_embed_takes_the_folder(short, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n>b\nACDEF\n")
    done = embed(tmp_path / "in.fasta", tmp_path / "store", str(short), precision="fp32", accelerator="cpu")
    direct = Embedder(load_backbone(str(short))).embed(["MKTAYIAKQR", "ACDEF"]).vectors
    np.testing.assert_allclose(Store.open(done.store).embeddings(), direct.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="no --layer"):
        embed(tmp_path / "in.fasta", tmp_path / "other", str(short), layer=1)
    with pytest.raises(InputError, match="mean or residue"):
        embed(tmp_path / "in.fasta", tmp_path / "other", str(short), pooling="bos")


def test_the_map_loads_alone_at_any_rank(short, data):
    whole, small = load(short), load(short, rank=4)
    assert (whole.rank, small.rank) == (32, 4)
    rows = PooledStates(open_states(data), features_of(1, open_states(data).layers))
    found = fit_exit(rows, rows.features, data.split_rows)
    scores = measure_exit(found, rows, data.split_rows.test, rank=4)
    assert scores.r2 == pytest.approx(found.r2[3], abs=1e-5) and scores.low < scores.r2 < scores.high
    assert whole.provenance["r2_held_out"][3] == pytest.approx(found.r2[3], abs=1e-9)


def test_the_guard_tells_what_is_unlike_the_calibration_rows(short, data):
    layer = load(short)
    rows = PooledStates(open_states(data), features_of(1, open_states(data).layers))
    x, y = rows(data.split_rows.test)
    layer.requires_grad_(False)
    error = float((layer(x) - y).square().sum(1).mean() / (y - y.mean(0)).square().sum(1).mean())
    with torch.no_grad():
        assert float(layer.expected_error(x).mean()) == pytest.approx(error, rel=0.5)
        assert layer.guard.flags(x).float().mean() < 0.1
        assert layer.guard.flags(x + 5 * x.std(0)).float().mean() > 0.9
        low = load(short, rank=4)
        lost = float((low(x) - y).square().sum(1).mean() / (y - y.mean(0)).square().sum(1).mean())
        assert float(low.expected_error(x).mean()) == pytest.approx(lost, rel=0.5)


def test_another_models_weights_are_refused(tiny_esm2, data, tmp_path):
    own = tmp_path / "model.pt"
    shutil.copy(tiny_esm2.fair_esm, own)
    shorten(str(own), data, tmp_path / "s", Recipe(1))
    content = torch.load(own, weights_only=False)
    content["model"]["encoder.sentence_encoder.layers.0.fc1.bias"] += 1
    torch.save(content, own)
    with pytest.raises(InputError, match="Expected the weights that"):
        load_backbone(str(tmp_path / "s"))
    with pytest.raises(InputError, match="other weights; embed with the same model"):
        shorten(str(own), data, tmp_path / "t", Recipe(1))
    own.unlink()
    with pytest.raises(InputError, match="cannot be had"):
        load_backbone(str(tmp_path / "s"))


@pytest.mark.parametrize("damage", ["model.safetensors", "backbone.safetensors", "backbone.json"])
def test_damage_is_told(short, tmp_path, damage):
    shutil.copytree(short, tmp_path / "s")
    content = bytearray((tmp_path / "s" / damage).read_bytes())
    content[len(content) // 2 if damage != "backbone.json" else 0] ^= 1
    (tmp_path / "s" / damage).write_bytes(content)
    with pytest.raises(InputError):
        load_backbone(str(tmp_path / "s"))


@pytest.mark.parametrize("entry", [{"version": 2}, {"features": ["x"]}, {"features": []}, {"architecture": {}}])
def test_a_manifest_changed_by_hand(short, tmp_path, entry):
    shutil.copytree(short, tmp_path / "s")
    file = tmp_path / "s" / "backbone.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(InputError):
        load_backbone(str(tmp_path / "s"))


def test_which_exits_there_are(data, states, tiny_esm2, short, tmp_path):
    with pytest.raises(InputError, match="layer 2 and of a later one"):
        features_of(2, Store.open(states).layers)
    with pytest.raises(InputError, match="from 1 to 5"):
        layers_needed(6, 6)
    with pytest.raises(InputError, match="from 1 to 5"):
        layers_needed(0, 6)
    many = [State(layer) for layer in range(1, 34)]
    assert [state.layer for state in features_of(30, many)] == [1, 7, 12, 18, 23, 29, 30]
    with pytest.raises(InputError, match="shortened one"):
        shorten(str(short), data, tmp_path / "s", Recipe(1))


def test_a_store_of_one_layer_is_refused(tiny_esm2, data, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKT\n")
    embed(tmp_path / "in.fasta", tmp_path / "one", str(tiny_esm2.fair_esm), precision="fp32", accelerator="cpu")
    other = EmbeddingDataModule(str(tmp_path / "one"))
    with pytest.raises(InputError, match="layer 2 only"):
        open_states(other)
    other.source = "synthetic"
    with pytest.raises(InputError, match="several layers"):
        open_states(other)


def test_a_target_of_the_users_own(data, states):
    store = Store.open(states)
    rows = PooledStates(store, features_of(1, store.layers), target=lambda y: y[:, :3])
    found = fit_exit(rows, rows.features, replace(data.split_rows))
    assert found.layer.out_features == 3 and len(found.r2) == 3
