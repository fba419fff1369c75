"""What bounds an exported student: the rate of this core's matrix product, and what integer arithmetic would cost.

Times, in turns on one thread at 32 rows: a dense 1280 → 1280 layer in eager torch; its rank-64 student in ONNX Runtime;
each of the student's two products alone; the student in ONNX Runtime's integer kernels, as `distil-rank export --to
onnx-int8` writes it. The R² that these lose is that of held-out rows of real embeddings.

    python benchmarks/onnx_bound.py
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from distil_rank.compression.integer_onnx import to_integer_onnx
from embedding import matrix_rate
from layer_latency import bound
from onnx import helper, numpy_helper
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure.latency import paired_ratio, time_interleaved, torch_threads
from distil_rank.measure.metrics import r2
from distil_rank.training.teacher import random_teacher

ROWS, WIDTH, RANK = 32, 1280, 64
INTEGERS = "student, integers"
OPERATIONS = 2 * ROWS * WIDTH * RANK  # of one of the student's two products


def session(nodes: list[Any], constants: dict[str, np.ndarray], width: int) -> onnxruntime.InferenceSession:
    """A graph from `x`, (rows, width), to `y`, on one thread."""
    ends = [helper.make_tensor_value_info(name, 1, ["rows", size]) for name, size in (("x", width), ("y", None))]
    weights = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "student", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return loaded(model.SerializeToString())


def loaded(model: bytes) -> onnxruntime.InferenceSession:
    """On one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def gemm(weight: Tensor, bias: Tensor | None = None) -> onnxruntime.InferenceSession:
    """One float32 product."""
    constants = {"W": weight.T.numpy()} | ({} if bias is None else {"c": bias.numpy()})
    return session([helper.make_node("Gemm", ["x", *constants], ["y"])], constants, weight.shape[1])


def student(A: Tensor, B: Tensor, bias: Tensor) -> onnxruntime.InferenceSession:
    """Both, as `distil-rank export --to onnx` writes them."""
    nodes = [
        helper.make_node("Gemm", ["x", "A"], ["h"]),
        helper.make_node("Gemm", ["h", "B", "c"], ["y"]),
    ]
    return session(nodes, {"A": A.T.numpy(), "B": B.T.numpy(), "c": bias.numpy()}, A.shape[1])


def integers(layer: LowRankLinear, moments: Moments, held_out: Tensor) -> onnxruntime.InferenceSession:
    """As `distil-rank export --to onnx-int8` writes it, however much it loses."""
    with tempfile.TemporaryDirectory() as folder:
        path = to_integer_onnx(layer, Path(folder) / "layer.onnx", moments, held_out, tolerance=1.0)
        return loaded(path.read_bytes())


@torch.no_grad()
def r2_lost(source: Path) -> float:
    """By the integers of a random teacher's student, against the same student in float32, on held-out rows."""
    data = EmbeddingDataModule(str(source))
    data.prepare_data()
    data.setup()
    teacher, moments, rows = (
        random_teacher(data.dim, seed=0),
        Moments.of(data.stream("train")),
        data.rows("test").float(),
    )
    layer = LowRankLinear.from_linear(teacher, rank=RANK, moments=moments)
    runtime, expected = integers(layer, moments, rows), teacher(rows)
    got = torch.cat([torch.from_numpy(runtime.run(None, {"x": batch.numpy()})[0]) for batch in rows.split(ROWS)])
    mean = expected.mean(0)
    return float(r2(layer(rows), expected, mean)) - float(r2(got, expected, mean))


def main(source: Path = Path("data/sample"), repeats: int = 100, output: Path = Path("results/onnx_bound.md")) -> None:
    """Measure, print, keep.

    Args:
        source: Embeddings for the R² that integers lose.
        repeats: Turns of each candidate.
        output: Where the table goes.
    """
    torch.manual_seed(0)
    dense, many = nn.Linear(WIDTH, WIDTH), torch.randn(4096, WIDTH)
    layer = LowRankLinear.from_linear(dense, RANK, solver="svd")
    A, B, bias = layer.A.detach(), layer.B.detach(), layer.bias.detach()
    x, h = torch.randn(ROWS, WIDTH), torch.randn(ROWS, RANK)
    sessions = {
        "student, float32": (student(A, B, bias), x, 2 * OPERATIONS),
        "its first product alone": (gemm(A), x, OPERATIONS),
        "its second product alone": (gemm(B, bias), h, OPERATIONS),
        INTEGERS: (integers(layer, Moments.of(many), many), x, 0),
    }
    calls: dict[str, Any] = {"eager dense layer": partial(dense, x)}
    calls |= {
        name: bound(one, rows, RANK if name == "its first product alone" else WIDTH)
        for name, (one, rows, _) in sessions.items()
    }
    with torch_threads(1):
        results = time_interleaved(calls, repeats=repeats)
        peak = matrix_rate(torch.float32)
    base = results["eager dense layer"]
    lost = r2_lost(source)
    floor = 2 * OPERATIONS / peak
    text = [
        "| 32 rows, one thread | µs | eager dense layer over it | GFLOP/s | R² lost on held-out rows |",
        "|---|---|---|---|---|",
    ]
    for name, timing in results.items():
        work = OPERATIONS * WIDTH // RANK if timing is base else sessions[name][2]
        rate = f"{work / timing.median_s / 1e9:.0f}" if work else ""
        loss = f"{lost:.4f}" if name == INTEGERS else ""
        text.append(f"| {name} | {1e6 * timing.median_s:,.0f} | {paired_ratio(base, timing):.1f}x | {rate} | {loss} |")
    text.append(
        f"| *the student's operations at this core's best rate* | {1e6 * floor:,.0f} | {base.median_s / floor:.1f}x "
        f"| {peak / 1e9:.0f} | |"
    )
    save_markdown(output, text)


if __name__ == "__main__":
    run(main)
