"""Time a dense 1280 → 1280 layer beside its student in every runtime: eager, compiled, ONNX Runtime.

All candidates of one batch size and thread count take turns in one process, so that a busy moment slows them all; the
figures are medians. ONNX Runtime's inputs and outputs are bound once (`io_binding`), as a server would have them.

    python benchmarks/layer_latency.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import torch
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank import LowRankLinear
from distil_rank.compression.saved import to_onnx
from distil_rank.lowrank.low_rank import break_even_rank
from distil_rank.measure.latency import paired_ratio, time_interleaved, torch_threads

Call = Callable[[], object]


def sessions(layers: dict[str, Any], threads: int, folder: Path) -> dict[str, Any]:
    """Each layer in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow the others
    results = {}
    paths = {name: to_onnx(layer, folder / f"{name}.onnx") for name, layer in layers.items()}
    for name, path in paths.items():
        results[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return results


def bound(session: Any, x: Tensor, width: int) -> Call:
    """One run from memory that stays to memory that stays, as eager torch has its own cache of freed memory."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(torch.empty(len(x), width).numpy()))
    return partial(session.run_with_iobinding, binding)


def timings(layers: dict[str, Any], batch: int, threads: int, repeats: int, compiled: bool) -> dict[str, np.ndarray]:
    """Every candidate at one batch size."""
    x = torch.randn(batch, layers["dense"].in_features)
    candidates: dict[str, Call] = {f"eager {name}": partial(layer, x) for name, layer in layers.items()}
    if compiled:
        torch.compiler.reset()  # a compiled layer must not turn general because it has seen another batch size
        candidates |= {f"compiled {name}": partial(torch.compile(layers[name]), x) for name in ("dense", "student")}
    with tempfile.TemporaryDirectory() as folder:
        runtime = sessions(layers, threads, Path(folder))
    width = layers["dense"].out_features
    candidates |= {f"ONNX Runtime {name}": bound(one, x, width) for name, one in runtime.items()}
    return time_interleaved(candidates, repeats=repeats)


def break_even(dense: nn.Linear, ranks: tuple[int, ...], repeats: int) -> list[dict[str, float]]:
    """Time of the dense layer over the student's, eager and in ONNX Runtime, 32 rows, one thread, by rank."""
    rows = []
    for rank in ranks:
        layers = {"dense": dense, "student": LowRankLinear.from_linear(dense, rank, solver="svd")}
        results = timings(layers, 32, 1, repeats, compiled=False)
        ratio = {
            runtime: paired_ratio(results[f"{runtime} dense"], results[f"{runtime} student"])
            for runtime in ("eager", "ONNX Runtime")
        }
        rows.append({"rank": rank, **ratio})
    return rows


def main(
    width: int = 1280,
    rank: int = 64,
    batches: tuple[int, ...] = (1, 8, 32, 128, 1024),
    threads: tuple[int, ...] = (1, 2),
    ranks: tuple[int, ...] = (16, 64, 128, 256, 384, 512, 640, 768),
    repeats: int = 100,
    compiled: bool = True,
    output: Path = Path("results/layer_latency.md"),
) -> None:
    """Run the benchmark, print its table and draw its figure.

    Args:
        width: Of the layer, in and out.
        rank: Of the student.
        batches: Rows in a call.
        threads: Of the processor.
        ranks: For the break-even rank.
        repeats: Turns of each candidate.
        compiled: Also through torch.compile, which needs a C++ compiler.
        output: Where the tables go; the drawing lies beside them.
    """
    torch.manual_seed(0)
    dense = nn.Linear(width, width)
    student = LowRankLinear.from_linear(dense, rank, solver="svd")
    layers = {"dense": dense, "student": student}
    rows: list[dict[str, Any]] = []
    for count in threads:
        with torch_threads(count):
            for batch in batches:
                results = timings(layers, batch, count, repeats, compiled)
                rows += [_row(name, one, results, batch, str(count)) for name, one in results.items()]
    with torch_threads(1):
        curve = break_even(layers["dense"], ranks, repeats)
    even = break_even_rank(width, width)
    text = [
        f"{width} → {width} and its rank-{rank} student; µs per call, and the eager dense layer's time over it.\n",
        table(rows),
        f"\nBy parameters a student breaks even at rank {even:.0f}; by time, 32 rows:\n",
        "| rank | eager, dense over student | ONNX Runtime |\n|---|---|---|",
        *(f"| {row['rank']} | {row['eager']:.2f}x | {row['ONNX Runtime']:.2f}x |" for row in curve),
    ]
    save_markdown(output, text)
    draw(rows, curve, even, output.with_suffix(".png"))


def _row(name: str, seconds: np.ndarray, results: dict[str, np.ndarray], batch: int, threads: str) -> dict[str, Any]:
    ratio = paired_ratio(results["eager dense"], seconds)
    return {
        "runtime": name,
        "threads": threads,
        "batch": batch,
        "median_us": 1e6 * float(np.median(seconds)),
        "ratio": ratio,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each candidate and thread count, a column for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    cells = {(row["threads"], row["runtime"], row["batch"]): row for row in rows}
    lines = ["| threads | runtime | " + " | ".join(f"{batch} rows" for batch in batches) + " |"]
    lines.append("|---|---|" + "---|" * len(batches))
    for threads, name in dict.fromkeys((row["threads"], row["runtime"]) for row in rows):
        columns = [cells[threads, name, batch] for batch in batches]
        results = [f"{row['median_us']:,.0f} ({row['ratio']:.1f}x)" for row in columns]
        lines.append(f"| {threads} | {name} | " + " | ".join(results) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], curve: list[dict[str, float]], even: float, path: Path) -> None:
    """Left: time against batch size on one thread. Right: speed-up against rank, with the break-even rank marked."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    one = [row for row in rows if row["threads"] == "1"]
    colours = {"eager": "tab:blue", "compiled": "tab:green", "ONNX Runtime": "tab:orange"}
    dashes = {"dense": "-", "student": "--"}
    for name in dict.fromkeys(row["runtime"] for row in one):
        runtime, _, kind = name.rpartition(" ")
        points = [(row["batch"], row["median_us"]) for row in one if row["runtime"] == name]
        left.loglog(*zip(*points, strict=True), dashes[kind], marker=".", color=colours[runtime], label=name)
    left.set(xlabel="rows in a call", ylabel="µs (median), one thread")
    left.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for runtime in ("eager", "ONNX Runtime"):
        ratios = [row[runtime] for row in curve]
        right.semilogy([row["rank"] for row in curve], ratios, marker=".", color=colours[runtime], label=runtime)
    right.axhline(1, color="grey", linewidth=0.8)
    right.axvline(even, color="grey", linewidth=0.8, linestyle="--", label=f"break-even by parameters: {even:.0f}")
    right.set(xlabel="rank", ylabel="dense over student, 32 rows, one thread")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
