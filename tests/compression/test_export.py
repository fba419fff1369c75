"""Every exported form gives what the student gives, for any number of rows."""

import sys

import pytest
import torch
from torch import nn

from distil_rank.compression import saved
from distil_rank.compression.saved import to_onnx
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments


@pytest.fixture
def case():
    torch.manual_seed(5)
    teacher = nn.Linear(48, 40)
    x = torch.randn(800, 48) * torch.logspace(0.5, -1, 48) + 1
    student = LowRankLinear.from_linear(teacher, 8, Moments.of(x))
    return teacher, student, x


def onnx_run(path, x):
    runtime = pytest.importorskip("onnxruntime")
    return torch.from_numpy(runtime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("kind", ["float", "dense", "no bias", "half"])
@torch.no_grad()
def test_onnx_gives_what_the_layer_gives_for_any_number_of_rows(tmp_path, case, kind):
    teacher, student, _ = case
    pytest.importorskip("onnx")
    layer = {
        "float": lambda: student,
        "dense": lambda: teacher,
        "no bias": lambda: LowRankLinear(48, 40, 3, bias=False),
        "half": lambda: LowRankLinear(48, 40, 3, dtype=torch.float16),
    }[kind]()
    path = to_onnx(layer, tmp_path / "deep" / "layer.onnx")
    for rows in (1, 2, 33):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(onnx_run(path, x), layer.float()(x), atol=1e-5, rtol=1e-4)


def test_missing_onnx_says_what_to_install(tmp_path, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime"):
        to_onnx(case[1], tmp_path / "layer.onnx")


@torch.no_grad()
def test_dense_again_for_those_who_cannot_change_the_architecture(case):
    _, student, x = case
    dense = student.to_linear()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), student(x), atol=1e-5, rtol=1e-4)


def test_an_export_that_is_wrong_is_not_retained(tmp_path, case, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(saved, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="differs from the layer"):
        to_onnx(case[1], tmp_path / "layer.onnx")
    assert not list(tmp_path.iterdir())
