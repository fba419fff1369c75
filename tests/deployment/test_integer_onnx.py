"""Integers in ONNX Runtime: close to the student for any number of rows, refused where they are not."""

import pytest
import torch
from torch import nn

from distil_rank.deployment.integer_onnx import to_integer_onnx
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments

runtime = pytest.importorskip("onnxruntime")


@pytest.fixture
def case():
    torch.manual_seed(5)
    x = torch.randn(2000, 64) * torch.logspace(1, -1, 64) + 20  # a mean far off, and spreads that differ
    teacher = nn.Linear(64, 48)
    return LowRankLinear.from_linear(teacher, 16, Moments.of(x[:1000])), Moments.of(x[:1000]), x[1000:]


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_integers_give_what_the_student_gives(tmp_path, case, bias):
    student, moments, x = case
    if not bias:
        student = LowRankLinear(64, 48, 16, bias=False)
        nn.init.normal_(student.B)
    path = to_integer_onnx(student, tmp_path / "deep" / "layer.onnx", moments, x)
    session = runtime.InferenceSession(str(path))
    for rows in (1, 33):
        expected, got = student(x[:rows]), torch.from_numpy(session.run(None, {"x": x[:rows].numpy()})[0])
        assert (got - expected).norm() < 0.05 * (expected - student(x).mean(0)).norm()


@torch.no_grad()
def test_they_lose_less_than_the_dynamic_quantisation_of_onnxruntime(tmp_path, case):
    import onnx
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    student, moments, x = case
    tensors = {"A": student.A.T, "B": student.B.T, "c": student.bias}
    nodes = [("MatMul", "x", "A", "h"), ("MatMul", "h", "B", "z"), ("Add", "z", "c", "y")]
    ends = [[helper.make_tensor_value_info(name, 1, ["rows", width])] for name, width in (("x", 64), ("y", 48))]
    graph = helper.make_graph(
        [helper.make_node(kind, [a, b], [out]) for kind, a, b, out in nodes],
        "plain",
        *ends,
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    quantize_dynamic(
        tmp_path / "a.onnx", tmp_path / "theirs.onnx", per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    ours = to_integer_onnx(student, tmp_path / "ours.onnx", moments, x)

    def error(path):
        outputs = runtime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0]
        return (torch.from_numpy(outputs) - student(x)).square().mean()

    assert error(ours) < error(tmp_path / "theirs.onnx") / 2


def test_half_precision_is_widened(tmp_path, case):
    student, moments, x = case
    assert to_integer_onnx(student.half(), tmp_path / "layer.onnx", moments, x).exists()


def test_a_loss_that_is_too_great_is_refused(tmp_path, case):
    student, moments, x = case
    with pytest.raises(InputError, match=r"lose at most 1e-06 .* but they lose 0\.0"):
        to_integer_onnx(student, tmp_path / "layer.onnx", moments, x, tolerance=1e-6)
    assert not (tmp_path / "layer.onnx").exists()


def test_inputs_of_another_width_are_refused(tmp_path, case):
    student, moments, x = case
    with pytest.raises(InputError, match="inputs of width 64 but got 64 and 63"):
        to_integer_onnx(student, tmp_path / "layer.onnx", moments, x[:, 1:])


def test_a_dimension_that_never_changes_does_no_harm(tmp_path, case):
    student, _, x = case
    x = x.clone()
    x[:, 3] = 7.0
    assert to_integer_onnx(student, tmp_path / "layer.onnx", Moments.of(x), x).exists()
