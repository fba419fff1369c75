"""What bounds an exported student: the rate of this core's matrix product, and what integer arithmetic would cost.

Times, in turns on one thread at 32 rows: a dense 1280 → 1280 layer in eager torch; its rank-64 student in ONNX Runtime;
each of the student's two products alone; the student in ONNX Runtime's integer kernels (`DynamicQuantizeMatMul`: inputs
rounded to 8 bits in each call, weights to 8 or 7). The R² they lose is that of held-out rows of real embeddings.

    python benchmarks/onnx_bound.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from embedding import matrix_rate
from jsonargparse import auto_cli
from onnx import helper, numpy_helper
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure.latency import paired_ratio, time_interleaved, torch_threads
from distil_rank.measure.metrics import r2
from distil_rank.training.teacher import random_teacher

ROWS, WIDTH, RANK = 32, 1280, 64
OPERATIONS = 2 * ROWS * WIDTH * RANK  # of one of the student's two products


def session(nodes: list[Any], constants: dict[str, np.ndarray], width: int) -> onnxruntime.InferenceSession:
    """A graph from `x`, (rows, width), to `y`, on one thread."""
    ends = [helper.make_tensor_value_info(name, 1, ["rows", size]) for name, size in (("x", width), ("y", None))]
    weights = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "student", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def gemm(weight: Tensor, bias: Tensor | None = None) -> onnxruntime.InferenceSession:
    """One float32 product."""
    constants = {"W": weight.numpy()} | ({} if bias is None else {"c": bias.numpy()})
    return session([helper.make_node("Gemm", ["x", *constants], ["y"], transB=1)], constants, weight.shape[1])


def student(A: Tensor, B: Tensor, bias: Tensor) -> onnxruntime.InferenceSession:
    """Both, as `distil-rank export --to onnx` writes them."""
    nodes = [
        helper.make_node("Gemm", ["x", "A"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "B", "c"], ["y"], transB=1),
    ]
    return session(nodes, {"A": A.numpy(), "B": B.numpy(), "c": bias.numpy()}, A.shape[1])


def integers(A: Tensor, B: Tensor, bias: Tensor, levels: int) -> onnxruntime.InferenceSession:
    """Both in integer kernels, each row of weights in 2 · levels + 1 steps."""
    constants = {"c": bias.numpy()}
    for name, weight in (("A", A), ("B", B)):
        scale = weight.abs().amax(1) / levels
        constants[name] = (weight / scale[:, None]).round().to(torch.int8).T.numpy()
        constants[f"{name}_scale"] = scale.numpy()
    nodes = [
        helper.make_node("DynamicQuantizeMatMul", ["x", "A", "A_scale"], ["h"], domain="com.microsoft"),
        helper.make_node("DynamicQuantizeMatMul", ["h", "B", "B_scale", "", "c"], ["y"], domain="com.microsoft"),
    ]
    return session(nodes, constants, A.shape[1])


@torch.no_grad()
def r2_lost(data: EmbeddingDataModule, levels: int) -> float:
    """By the integer student of a random teacher, against the same student in float32, on held-out rows."""
    teacher = random_teacher(data.dim, seed=0)
    layer = LowRankLinear.from_linear(teacher, rank=RANK, moments=Moments.of(data.stream("train")))
    factors = layer.A.detach(), layer.B.detach(), layer.bias.detach()
    rows = data.rows("test").float()
    expected, batches = teacher(rows), [batch.numpy() for batch in rows.split(ROWS)]
    found = []
    for runtime in (student(*factors), integers(*factors, levels)):
        got = torch.cat([torch.from_numpy(runtime.run(None, {"x": batch})[0]) for batch in batches])
        found.append(float(r2(got, expected, expected.mean(0))))
    return found[0] - found[1]


def main(source: Path = Path("data/sample"), repeats: int = 100, output: Path = Path("results/onnx_bound.md")) -> None:
    """Measure, print, keep.

    Args:
        source: Embeddings for the R² that integers lose.
        repeats: Turns of each candidate.
        output: Where the table goes.
    """
    torch.manual_seed(0)
    dense, layer = nn.Linear(WIDTH, WIDTH), LowRankLinear(WIDTH, WIDTH, RANK)
    A, B, bias = layer.A.detach(), layer.B.detach(), layer.bias.detach()
    x, h = torch.randn(ROWS, WIDTH), torch.randn(ROWS, RANK)
    sessions = {
        "student, float32": (student(A, B, bias), x, 2 * OPERATIONS),
        "its first product alone": (gemm(A), x, OPERATIONS),
        "its second product alone": (gemm(B, bias), h, OPERATIONS),
        "student, integers, weights of 8 bits": (integers(A, B, bias, 127), x, 0),
        "student, integers, weights of 7 bits": (integers(A, B, bias, 63), x, 0),
    }
    calls: dict[str, Any] = {"eager dense layer": partial(dense, x)}
    calls |= {name: partial(one.run, None, {"x": rows.numpy()}) for name, (one, rows, _) in sessions.items()}
    with torch_threads(1):
        found = time_interleaved(calls, repeats=repeats)
        peak = matrix_rate(torch.float32)
    base = found["eager dense layer"]
    data = EmbeddingDataModule(str(source))
    data.prepare_data()
    data.setup()
    lost = {bits: r2_lost(data, 2 ** (bits - 1) - 1) for bits in (8, 7)}
    floor = 2 * OPERATIONS / peak
    text = [
        "| 32 rows, one thread | µs | eager dense layer over it | GFLOP/s | R² lost on held-out rows |",
        "|---|---|---|---|---|",
    ]
    for name, timing in found.items():
        work = OPERATIONS * WIDTH // RANK if timing is base else sessions[name][2]
        rate = f"{work / timing.median_s / 1e9:.0f}" if work else ""
        loss = next((f"{lost[bits]:.4f}" for bits in lost if name.endswith(f"{bits} bits")), "")
        text.append(f"| {name} | {1e6 * timing.median_s:,.0f} | {paired_ratio(base, timing):.1f}x | {rate} | {loss} |")
    text.append(
        f"| *the student's operations at this core's best rate* | {1e6 * floor:,.0f} | {base.median_s / floor:.1f}x "
        f"| {peak / 1e9:.0f} | |"
    )
    print("\n".join(text))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    auto_cli(main)
