"""Students in formats of other runtimes: ONNX, `torch.export`, int8, or one plain dense layer."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.errors import InputError
from distil_rank.lowrank.digests import tensor_digest
from distil_rank.lowrank.fidelity import nested_r2
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors

log = logging.getLogger(__name__)

OPSET, IR_VERSION = 17, 9  # old enough for any runtime of the last years; nothing newer is needed
TOLERANCE = 1e-4  # of a check, relative to the largest output
Layer = LowRankLinear | Int8LowRankLinear | nn.Linear


def to_int8(
    student: LowRankLinear, teacher: nn.Linear, moments: Moments, tolerance: float = 0.001
) -> Int8LowRankLinear:
    """Quantise a student, unless that costs too much of its fidelity.

    Args:
        student: float factors.
        teacher: the dense layer that both are compared with.
        moments: of inputs, held-out ones if there are any.
        tolerance: the fall in R² from which the result is refused.

    Returns:
        The int8 student; R² before and after are in its `provenance`.

    Raises:
        InputError: R² falls by more than `tolerance`.
    """
    shape = teacher.out_features, teacher.in_features
    if shape != (student.out_features, student.in_features) or moments.mean.shape != (student.in_features,):
        raise InputError(
            f"Expected the {student.out_features} x {student.in_features} layer that this student replaces, and inputs"
            f" of its width, but got {shape[0]} x {shape[1]} and inputs of {len(moments.mean)}."
        )
    digest = student.provenance.get("teacher_sha256")
    if digest is not None and digest != tensor_digest(teacher.weight, teacher.bias):
        raise InputError("Expected the very layer that this student replaces but got another of its shape.")
    small = Int8LowRankLinear.from_low_rank(student)
    before, after = (_r2(teacher, layer, moments) for layer in (student, small.dequantised()))
    if not before - after <= tolerance:  # also where it is not a number
        raise InputError(
            f"Expected int8 factors to keep R² within {tolerance:g} but it fell from {before:.4f} to {after:.4f};"
            " keep the float factors, or allow a greater `tolerance`."
        )
    small.provenance |= {"int8_r2": {"before": before, "after": after}}
    return small


def _r2(teacher: nn.Linear, student: LowRankLinear, moments: Moments) -> float:
    bias = torch.zeros(student.out_features).to(student.B) if student.bias is None else student.bias
    factors = Factors(student.A, student.B, bias)
    return float(nested_r2(teacher.weight, teacher.bias, factors, moments)[-1])


def to_dense(model: nn.Module) -> nn.Module:
    """A copy with a plain `nn.Linear`, `W' = B A`, for each student: the same outputs from the original architecture.

    A student always has a bias; where the dense layer had none, the copy's layer still has one.
    """
    if isinstance(model, LowRankLinear | Int8LowRankLinear):
        return _dense(model)
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LowRankLinear | Int8LowRankLinear):
            model.set_submodule(name, _dense(module))
    return model


def _dense(student: LowRankLinear | Int8LowRankLinear) -> nn.Linear:
    return (student if isinstance(student, LowRankLinear) else student.dequantised()).to_linear()


def to_torch(model: nn.Module, path: str | Path, example: Tensor) -> Path:
    """Save a layer or model as a `torch.export` program for any number of rows; it runs without this package.

    Args:
        model: takes one tensor.
        path: the `.pt2` file.
        example: an input, `(rows, …)`.

    Raises:
        RuntimeError: the program does not give what the model gives.
    """
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        if isinstance(module, LowRankLinear | Int8LowRankLinear):
            module.guard = None
    example = torch.cat([example, example])[: max(2, len(example))].cpu()  # one row would fix the number at one
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        for rows in (example, torch.cat([example] * 3)):
            _check_same(loaded(rows), model(rows), path)
    return path


def to_onnx(layer: Layer, path: str | Path) -> Path:
    """Save a layer as an ONNX graph, `(rows, n)` → `(rows, m)` float32 for any number of rows; ONNX Runtime checks it.

    An int8 student keeps its factors in int8 in the file; the runtime widens them once, when it loads the graph.

    Args:
        layer: a student, or a dense layer to compare it with. Half precision is widened to float32.
        path: the `.onnx` file.

    Raises:
        InputError: onnx or onnxruntime is not installed.
        RuntimeError: ONNX Runtime does not give what the layer gives.
    """
    onnx, runtime = onnx_packages()
    path = save_graph(onnx, _graph(onnx, layer), path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    plain = copy.deepcopy(layer).cpu().float()
    with torch.no_grad():
        for rows in (1, 7):
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
            _check_same(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), plain(x), path)
    return path


def save_graph(onnx: Any, model: Any, path: str | Path) -> Path:
    """Write a graph in the format that `IR_VERSION` names, and make its folder."""
    model.ir_version = IR_VERSION
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def onnx_packages() -> tuple[Any, Any]:
    """onnx and onnxruntime, which are optional.

    Raises:
        InputError: one of them is missing.
    """
    try:
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Expected onnx and onnxruntime but they are missing; pip install onnx onnxruntime.") from error
    return onnx, onnxruntime


def _graph(onnx: Any, layer: Layer) -> Any:
    """One `Gemm` for each factor; these lie transposed, as ONNX Runtime multiplies them a little faster."""
    helper, tensors, nodes = onnx.helper, [], []

    def constant(name: str, value: Tensor) -> str:
        array = value.detach().cpu().numpy() if value.dtype == torch.int8 else value.detach().cpu().float().numpy()
        tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def factor(name: str, value: Tensor, scale: Tensor | None) -> str:
        if scale is None:
            return constant(name, value.T)
        nodes.append(helper.make_node("Cast", [constant(f"{name}_int8", value.T)], [f"{name}_wide"], to=1))
        nodes.append(helper.make_node("Mul", [f"{name}_wide", constant(f"{name}_scale", scale)], [name]))
        return name

    def gemm(x: str, weight: str, bias: Tensor | None, y: str) -> None:
        inputs = [x, weight] if bias is None else [x, weight, constant("c", bias)]
        nodes.append(helper.make_node("Gemm", inputs, [y]))

    if isinstance(layer, nn.Linear):
        gemm("x", factor("W", layer.weight, None), layer.bias, "y")
    else:
        scales = (layer.A_scale, layer.B_scale) if isinstance(layer, Int8LowRankLinear) else (None, None)
        gemm("x", factor("A", layer.A, scales[0]), None, "h")
        gemm("h", factor("B", layer.B, scales[1]), layer.bias, "y")
    ends = [
        helper.make_tensor_value_info(name, 1, ["rows", width])
        for name, width in (("x", layer.in_features), ("y", layer.out_features))
    ]
    graph = helper.make_graph(nodes, "distil-rank", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="distil-rank")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model


def _check_same(got: Tensor, expected: Tensor, path: Path) -> None:
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"The exported {path.name} differs from the layer by {error:.2g} of its largest output.")
