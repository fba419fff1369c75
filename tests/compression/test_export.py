"""Every exported form gives what the student gives, for any number of rows, and int8 is refused where it costs."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from distil_rank.compression import export
from distil_rank.compression.export import to_dense, to_int8, to_onnx, to_torch
from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.errors import InputError
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments


@pytest.fixture
def case():
    torch.manual_seed(5)
    teacher = nn.Linear(48, 40)
    x = torch.randn(800, 48) * torch.logspace(0.5, -1, 48) + 1
    student = LowRankLinear.from_linear(teacher, 8, Moments.of(x))
    student.guard = Guard.of(teacher, student, x)
    return teacher, student, x


def onnx_run(path, x):
    runtime = pytest.importorskip("onnxruntime")
    return torch.from_numpy(runtime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("kind", ["float", "int8", "dense", "no bias", "half"])
@torch.no_grad()
def test_onnx_gives_what_the_layer_gives_for_any_number_of_rows(tmp_path, case, kind):
    teacher, student, _ = case
    pytest.importorskip("onnx")
    layer = {
        "float": lambda: student,
        "int8": lambda: Int8LowRankLinear.from_low_rank(student),
        "dense": lambda: teacher,
        "no bias": lambda: LowRankLinear(48, 40, 3, bias=False),
        "half": lambda: LowRankLinear(48, 40, 3, dtype=torch.float16),
    }[kind]()
    path = to_onnx(layer, tmp_path / "deep" / "layer.onnx")
    for rows in (1, 2, 33):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(onnx_run(path, x), layer.float()(x), atol=1e-5, rtol=1e-4)


def test_the_int8_graph_is_small(tmp_path):
    pytest.importorskip("onnx")
    student = LowRankLinear(512, 512, 32)
    full = to_onnx(student, tmp_path / "float.onnx").stat().st_size
    small = to_onnx(Int8LowRankLinear.from_low_rank(student), tmp_path / "int8.onnx").stat().st_size
    assert small < 0.3 * full


def test_an_export_that_is_wrong_is_not_retained(tmp_path, case, monkeypatch):
    pytest.importorskip("onnx")
    _, student, _ = case
    real = export._graph

    def wrong(onnx, layer):
        broken = LowRankLinear(48, 40, 8)
        return real(onnx, broken)

    monkeypatch.setattr(export, "_graph", wrong)
    with pytest.raises(RuntimeError, match="differs from the layer"):
        to_onnx(student, tmp_path / "layer.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_onnx_says_what_to_install(tmp_path, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime"):
        to_onnx(case[1], tmp_path / "layer.onnx")


@torch.no_grad()
def test_an_exported_program_runs_without_this_package(tmp_path, case):
    _, student, x = case
    model = nn.Sequential(student, nn.Tanh(), nn.Linear(40, 2))
    path = to_torch(model, tmp_path / "model.pt2", x[:1])
    torch.save(x[:5], tmp_path / "x.pt")
    code = f"""
import sys; sys.modules["distil_rank"] = None
import torch
model = torch.export.load({str(path)!r}).module()
torch.save(model(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x[:5]))
    assert student.guard is not None  # the user's own layer keeps it


@torch.no_grad()
def test_dense_again_for_those_who_cannot_change_the_architecture(case):
    _, student, x = case
    dense = to_dense(student)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), student(x), atol=1e-5, rtol=1e-4)
    model = nn.Sequential(student, nn.ReLU(), Int8LowRankLinear.from_low_rank(LowRankLinear(40, 20, 4)))
    plain = to_dense(model)
    assert type(plain[0]) is nn.Linear and type(plain[2]) is nn.Linear
    torch.testing.assert_close(plain(x), model(x), atol=1e-4, rtol=1e-4)
    assert isinstance(model[0], LowRankLinear)


@torch.no_grad()
def test_int8_passes_the_gate_and_says_what_it_cost(case):
    teacher, student, x = case
    small = to_int8(student, teacher, Moments.of(x))
    cost = small.provenance["int8_r2"]
    y = teacher(x)
    r2 = 1 - (y - small(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert cost["after"] == pytest.approx(float(r2), abs=1e-5)
    assert 0 <= cost["before"] - cost["after"] < 0.001


def test_int8_is_refused_where_it_costs_too_much(case):
    teacher, student, x = case
    with pytest.raises(InputError, match=r"R² within 1e-09 but it fell from 0\.\d+ to 0\.\d+"):
        to_int8(student, teacher, Moments.of(x), tolerance=1e-9)
