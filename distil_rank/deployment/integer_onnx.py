"""A student as an ONNX graph whose products run in integers, which a CPU with VNNI multiplies faster than floats.

`onnxruntime.quantization.quantize_dynamic` writes the same products, but rounds inputs about zero and with one step for
all dimensions: on ESM-2's few dimensions of huge mean it loses several times as much, which a test measures.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.deployment.export import OPSET, onnx_packages, save_graph
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure.metrics import r2

LEVELS = 63  # 7 bits with the sign: CPUs without VNNI add two products of 8 bits in 16, and would overflow
ROWS = 256  # at once when the loss is measured: the rounding's range is that of all rows in a call
CONTRIB = "com.microsoft"


@torch.no_grad()
def to_integer_onnx(
    student: LowRankLinear, path: str | Path, moments: Moments, held_out: Tensor, tolerance: float = 0.001
) -> Path:
    """Save a student as a graph for ONNX Runtime that rounds its inputs to 8 bits in each call, and its factors to 7.

    Inputs are rounded around their mean, and the square root of each dimension's spread moves from what is rounded in
    the call into the factor behind it, as SmoothQuant does (Xiao et al., 2023, arXiv:2211.10438).

    Args:
        student: float factors.
        path: the `.onnx` file; (rows, n) → (rows, m) float32 for any number of rows.
        moments: of the inputs.
        held_out: (rows, n), other inputs to measure the loss on.
        tolerance: the share of its outputs' variance from which the loss is refused.

    Raises:
        InputError: integers lose more than `tolerance`; the inputs are not this student's; or onnx or onnxruntime is
            not installed.
    """
    widths = moments.mean.shape[-1], held_out.shape[-1]
    if widths != (student.in_features, student.in_features):
        raise InputError(f"Expected inputs of width {student.in_features} but got {widths[0]} and {widths[1]}.")
    onnx, runtime = onnx_packages()
    path = save_graph(onnx, _graph(onnx, student, moments), path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, plain = held_out.cpu().float(), copy.deepcopy(student).cpu().float()
    got = torch.cat([torch.from_numpy(session.run(None, {"x": rows.numpy()})[0]) for rows in x.split(ROWS)])
    expected = plain(x)
    lost = 1 - float(r2(got, expected, expected.mean(0)))
    if not lost <= tolerance:  # also where it is not a number
        path.unlink()
        raise InputError(
            f"Expected integers to lose at most {tolerance:g} of the outputs' variance but they lose {lost:.4f} here;"
            " export to plain onnx."
        )
    return path


def _graph(onnx: Any, student: LowRankLinear, moments: Moments) -> Any:
    helper = onnx.helper
    A, B, mean = student.A.double().cpu(), student.B.double().cpu(), moments.mean.double().cpu()
    bias = torch.zeros(len(B), dtype=torch.float64) if student.bias is None else student.bias.double().cpu()
    covariance = moments.covariance.double().cpu()
    spread = _root(covariance.diagonal().sqrt())
    hidden = _root((A @ covariance @ A.T).diagonal().sqrt())
    A_steps, A_scale = _rounded(A * spread / hidden[:, None])
    B_steps, B_scale = _rounded(B * hidden)
    constants = {
        "mean": mean.float().numpy(),
        "narrow": (1 / spread).float().numpy(),
        "A": A_steps,
        "A_scale": A_scale,
        "B": B_steps,
        "B_scale": B_scale,
        "c": (bias + B @ (A @ mean)).float().numpy(),
    }
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "narrow"], ["narrowed"]),
        helper.make_node("DynamicQuantizeMatMul", ["narrowed", "A", "A_scale"], ["h"], domain=CONTRIB),
        helper.make_node("DynamicQuantizeMatMul", ["h", "B", "B_scale", "", "c"], ["y"], domain=CONTRIB),
    ]
    ends = [
        helper.make_tensor_value_info(name, 1, ["rows", width])
        for name, width in (("x", student.in_features), ("y", student.out_features))
    ]
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "distil-rank", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, producer_name="distil-rank")


def _root(spread: Tensor) -> Tensor:
    """Square roots, bounded from below so that dividing by them cannot blow up."""
    return spread.clamp_min(1e-6 * float(spread.max()) or 1.0).sqrt()


def _rounded(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Transposed steps (k, n) int8, and one scale for each of the n outputs."""
    scale = (weight.abs().amax(1) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().to(torch.int8).T.numpy(), scale.float().numpy()
