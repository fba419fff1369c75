"""Commands leave what another command has made as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distil_rank.cli import main
from distil_rank.embedding.run import embed

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def store(workplace, tiny_esm2) -> Path:
    """A store of all layers of 60 proteins, and beside it a layer for its vectors and one for wider ones."""
    rng = np.random.default_rng(0)
    texts = ("".join(rng.choice(list(LETTERS), rng.integers(20, 40))) for _ in range(60))
    Path("in.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    embed("in.fasta", "states", str(tiny_esm2.fair_esm), layer="all", precision="fp32")
    embed("in.fasta", "plain", str(tiny_esm2.fair_esm), precision="fp32")
    save_file(
        {"a.weight": torch.randn(12, 32), "wide.weight": torch.randn(12, 48), "zero.weight": torch.zeros(12, 32)},
        "head.safetensors",
    )
    return workplace


def refused(capsys, *command: str) -> str:
    assert main(["-q", *command]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_a_store_is_not_overwritten_by_what_is_saved(store, tiny_esm2, capsys):
    before = files("states") | files("plain")
    layer = ["compress", "--model", "head.safetensors", "--layer", "a", "--data.source", "plain", "--rank", "4"]
    assert "states but it holds a store of vectors; name another place" in refused(capsys, *layer, "--output", "states")
    short = ["shorten", "--layer", "1", "--data", "states", "--backbone", str(tiny_esm2.fair_esm), "--copies", "0"]
    assert "plain but it holds a store of vectors; name another place" in refused(capsys, *short, "--output", "plain")
    code = ["code", "--data", "plain", "--codes", "plain", "--metric", "variance", "--rank", "8"]
    assert "Expected a store of codes at plain" in refused(capsys, *code)
    assert files("states") | files("plain") == before


@pytest.mark.parametrize("command", [["distil", "--rank", "4"], ["train-teacher"]])
@pytest.mark.parametrize(("layer", "told"), [("wide", "takes 48; embed with the model"), ("zero", "are all zero")])
def test_a_layer_that_does_not_fit_the_vectors(store, capsys, command, layer, told):
    given = ["--teacher.kind", f"head.safetensors:{layer}", "--data.source", "plain", "--data.split", "exact"]
    assert told in refused(capsys, *command, *given)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "--max_queries", "0"], "at least 1 but got 0"),
        (["sweep", "--ranks", "[]"], "--ranks has none"),
        (["serve", "--model", "plain", "--port", "99999"], "ports go from 0 to 65535"),
        (["code", "--rank", "0"], "--rank of at least 1"),
        (["embed", "--fasta", "in.fasta", "--devices", "999", "--accelerator", "cpu"], "the cores of this machine"),
    ],
)
def test_numbers_that_cannot_be_meant(store, capsys, command, told):
    assert told in refused(capsys, *command)


def test_numbers_too_large_for_float32(store, capsys):
    x = np.ones((50, 8))
    x[7] = 1e300
    np.save("huge.npy", x)
    assert "row 7" in refused(capsys, "distil", "--data.source", "huge.npy", "--rank", "4")
