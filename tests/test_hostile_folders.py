"""Commands leave what another command has made as it is, and refuse what does not fit it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distil_rank.artefact import write_folder
from distil_rank.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors of 60 proteins, and layers for them, for wider ones, and of zeros."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("hostile")
    os.chdir(folder)
    np.save("x.npy", np.random.default_rng(0).standard_normal((60, 32), dtype=np.float32))
    layers = {"a": torch.randn(12, 32), "wide": torch.randn(12, 48), "zero": torch.zeros(12, 32)}
    save_file({f"{name}.weight": weight for name, weight in layers.items()}, "head.safetensors")
    write_folder("store", {"format": "distil-rank embeddings"}, {"vectors-00000.arrow": b"vectors"})
    yield folder
    os.chdir(before)


def refused(capsys, *command: str) -> str:
    assert main(["-q", *command]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_store_is_not_overwritten_by_a_layer(folder, capsys):
    layer = ["compress", "--model", "head.safetensors", "--layer", "a", "--data.source", "x.npy", "--rank", "4"]
    message = refused(capsys, *layer, "--output", "store")
    assert "store but it holds 'distil-rank embeddings'; name another place" in message
    assert (folder / "store" / "vectors-00000.arrow").read_bytes() == b"vectors"


@pytest.mark.parametrize("command", [["distil", "--rank", "4"], ["train-teacher"]])
@pytest.mark.parametrize(("layer", "message"), [("wide", "takes 48; embed with the model"), ("zero", "are all zero")])
def test_a_layer_that_does_not_fit_the_vectors(folder, capsys, command, layer, message):
    data = ["--data.source", "x.npy", "--data.split", "exact"]
    assert message in refused(capsys, *command, "--teacher.kind", f"head.safetensors:{layer}", *data)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--ranks", "[0]"], "--ranks of at least 1 but got 0"),
        (["sweep", "--ranks", "[]"], "--ranks has none"),
        (["code", "--rank", "0"], "--rank of at least 1"),
        (["compress", "--rank", "0"], "a saved model at --model"),
        (["export", "--artefact", "store", "--rank", "0"], "--rank of at least 1 but got 0"),
    ],
)
def test_numbers_that_cannot_be_meant(folder, capsys, command, message):
    assert message in refused(capsys, *command)


def test_numbers_too_large_for_float32(folder, capsys):
    x = np.ones((50, 8))
    x[7] = 1e300
    np.save("huge.npy", x)
    assert "row 7" in refused(capsys, "distil", "--data.source", "huge.npy", "--rank", "4")
