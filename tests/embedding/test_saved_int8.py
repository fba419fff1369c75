"""Backbones that were saved in int8: the same vectors as from the exact weights, and what they refuse."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distil_rank.cli import main
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.embedding import agreement, precision
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.quantise import quantise
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.shorten import Recipe, shorten

pytestmark = pytest.mark.usefixtures("int8_units")


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    """Two random layers amplify errors."""
    monkeypatch.setattr(agreement, "MIN_INT8_COSINE", 0.8)
    monkeypatch.setattr(agreement, "MIN_INT8_NEIGHBOURS", 0.0)


@pytest.fixture(scope="module")
def fasta(tmp_path_factory) -> Path:
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("proteins") / "in.fasta"
    texts = ("".join(dice.choices("ACDEFGHIKLMNPQRSTVWY", k=dice.randint(10, 120))) for _ in range(60))
    path.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def saved(tiny_esm2, fasta, tmp_path) -> Path:
    quantise(fasta, str(tiny_esm2.safetensors), tmp_path / "int8")
    return tmp_path / "int8"


def test_it_embeds_as_the_exact_weights_do_in_int8(tiny_esm2, fasta, saved, tmp_path):
    summary = embed(fasta, tmp_path / "a", str(saved), accelerator="cpu")
    assert summary.precision == "int8" and summary.precision_note.startswith("int8: worst cosine 0.9")
    whole = embed(fasta, tmp_path / "b", str(tiny_esm2.safetensors), precision="int8", accelerator="cpu")
    assert whole.digest == summary.digest, "either goes on with what the other began"
    manifest = Store.open(tmp_path / "a").manifest
    assert manifest["int8_gate"] == json.loads((saved / "int8.json").read_text())["gate"]
    first = embed(fasta, tmp_path / "c", str(saved), layer=1, accelerator="cpu")
    second = embed(fasta, tmp_path / "d", str(tiny_esm2.safetensors), layer=1, precision="int8", accelerator="cpu",
                   calibration=tmp_path / "a")  # fmt: skip
    assert first.digest == second.digest


def test_it_needs_neither_the_exact_weights_nor_a_comparison(tiny_esm2, fasta, tmp_path, monkeypatch):
    shutil.copytree(tiny_esm2.bin, tmp_path / "model")
    quantise(fasta, str(tmp_path / "model"), tmp_path / "int8")
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(precision, "calibrate", lambda *_: pytest.fail("compared"))
    embed(fasta, tmp_path / "store", str(tmp_path / "int8"), accelerator="cpu")
    assert embed(fasta, tmp_path / "store", accelerator="cpu").computed == 0, "auto finds it again"


def test_a_shortened_backbone_in_int8(tiny_esm2, fasta, tmp_path):
    embed(fasta, tmp_path / "states", str(tiny_esm2.fair_esm), layer="1,1n,2", precision="fp32", accelerator="cpu")
    data = EmbeddingDataModule(str(tmp_path / "states"), split="exact")
    data.setup()
    shorten(str(tiny_esm2.fair_esm), data, tmp_path / "short", Recipe(1))
    exact = embed(fasta, tmp_path / "exact", str(tmp_path / "short"), precision="fp32", accelerator="cpu")
    rounded = embed(fasta, tmp_path / "rounded", str(tmp_path / "short"), precision="int8", accelerator="cpu")
    assert (exact.precision, rounded.precision) == ("fp32", "int8")
    done = quantise(fasta, str(tmp_path / "short"), tmp_path / "int8")
    assert done.layers == 1 and not (tmp_path / "int8" / "layer-01.safetensors").exists()
    backbone = load_backbone(str(tmp_path / "int8"))
    assert (backbone.num_layers, backbone.depth, backbone.dim) == (1, 2, 32)
    again = embed(fasta, tmp_path / "again", str(tmp_path / "int8"), accelerator="cpu")
    assert again.digest == rounded.digest
    vectors = [torch.from_numpy(np.array(Store.open(tmp_path / name).embeddings())) for name in ("exact", "again")]
    assert torch.cosine_similarity(*vectors).min() > 0.9


def damage(folder: Path, how: str, other: Path) -> None:
    manifest, layer = folder / "int8.json", folder / "layer-01.safetensors"
    content = json.loads(manifest.read_text())
    if how == "cut":
        layer.write_bytes(layer.read_bytes()[:-1])
    elif how == "missing":
        layer.unlink()
    elif how == "other":
        shutil.copy(other / layer.name, layer)
    elif how == "calibration":
        shutil.copy(other / "calibration.safetensors", folder)
    elif how == "shared":
        (folder / "shared.safetensors").write_bytes(b"")
    elif how == "shape":
        tensors = safetensors.torch.load_file(layer)
        tensors["fc1.weight"] = tensors["fc1.weight"][:-1].clone()
        safetensors.torch.save_file(tensors, layer)
        content["files"][layer.name] = hashlib.sha256(layer.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
    elif how == "version":
        manifest.write_text(json.dumps({**content, "version": 99}))
    elif how == "format":
        manifest.write_text(json.dumps({"format": "another"}))
    elif how == "layers":
        manifest.write_text(json.dumps({**content, "layers": 3}))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "missing or changed"),
        ("missing", "missing or changed"),
        ("other", "missing or changed"),
        ("calibration", "missing or changed"),
        ("shared", "missing or changed"),
        ("shape", r"\(128, 32\) for fc1"),
        ("version", "version 1"),
        ("format", "cannot be read"),
        ("layers", "entries are wrong"),
        ("json", "cannot be read"),
    ],
)
def test_what_was_damaged_is_refused(saved, tiny_esm2, fasta, tmp_path, how, message):
    other = tmp_path / "other"
    shutil.copytree(tiny_esm2.safetensors, tmp_path / "model")
    state = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    safetensors.torch.save_file(
        {key: value * 1.1 for key, value in state.items()}, tmp_path / "model" / "model.safetensors"
    )
    quantise(fasta, str(tmp_path / "model"), other)
    damage(saved, how, other)
    with pytest.raises(InputError, match=message):
        embed(fasta, tmp_path / "store", str(saved), accelerator="cpu")


def test_it_refuses_what_needs_exact_weights(saved, tiny_esm2, fasta, tmp_path):
    backbone = load_backbone(str(saved))
    for make in (lambda: FusedEncoder(backbone.model), lambda: Embedder(backbone, precision="bf16")):
        with pytest.raises(InputError, match="saved in int8"):
            make()
    with pytest.raises(InputError, match="saved in int8, but got fp32"):
        embed(fasta, tmp_path / "store", str(saved), precision="fp32", accelerator="cpu")
    with pytest.raises(InputError, match="in int8 already"):
        quantise(fasta, str(saved), tmp_path / "again")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").touch()
    with pytest.raises(InputError, match="holds something else"):
        quantise(fasta, str(tiny_esm2.fair_esm), tmp_path / "some")
    embed(fasta, tmp_path / "other", str(tiny_esm2.fair_esm), layer=1, precision="int8", accelerator="cpu")
    with pytest.raises(InputError, match="leave --calibration out"):
        embed(fasta, tmp_path / "store", str(saved), calibration=tmp_path / "other", accelerator="cpu")


def test_without_units_it_names_the_whole_model(saved, tiny_esm2, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_int8_units", lambda: False)
    with pytest.raises(InputError, match=f"no int8 units.*name the model.*{tiny_esm2.safetensors.name}"):
        embed(fasta, tmp_path / "store", str(saved), accelerator="cpu")
    with pytest.raises(InputError, match="no int8 units"):
        quantise(fasta, str(tiny_esm2.fair_esm), tmp_path / "other")


def test_the_command(tiny_esm2, fasta, tmp_path, empty_database, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    command = ["quantise", "--backbone", str(tiny_esm2.fair_esm), "--fasta", str(fasta)]
    assert main(command) == 0
    assert "worst cosine" in capsys.readouterr().out
    assert main(["embed", "--backbone", "int8", "--fasta", str(fasta), "--store", "store"]) == 0
    (tmp_path / "int8" / "layer-00.safetensors").write_bytes(b"no tensors")
    for options in (
        ["embed", "--backbone", "int8", "--fasta", str(fasta), "--store", "new"],
        ["embed", "--backbone", "int8", "--fasta", str(fasta), "--store", "store", "--precision", "bf16"],
        [*command, "--calibration", "absent"],
        [*command, "--output", str(fasta)],
        ["judge", "--data", "store", "--precision", "int8"],
        ["recommend", "--data", "store", "--precision", "int8"],
    ):
        capsys.readouterr()
        assert main(options) == 2, options
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distil-rank:")]
        assert "Expected" in line
