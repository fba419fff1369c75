"""The original recipe beside the closed form, in one process: what survives, and how long each takes.

    python benchmarks/recipe.py [--data PATH] [--split auto] [--rank 64] [--seeds 5]

Both see the same training rows and are measured on the same held-out rows. They take turns, so that a busy machine
slows both. The recipe runs as a bare loop around its loss: Lightning's own overhead is not held against it. Where the
squared error is the objective (`distil-rank distil --distil.alpha 0`) the student *is* the closed form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from distil_rank.report.report import markdown_table
from lightning import seed_everything
from script import machine_line, run
from torch import Tensor, nn

from distil_rank.commands.train_teacher import train_teacher
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.solvers import closed_form_from_rows, solve
from distil_rank.measure import metrics
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS, DistilModule


def recipe(teacher: nn.Linear, x: Tensor, rank: int, seed: int) -> LowRankLinear:
    """SVD warm start, AdamW at 3e-3, 1000 batches of 64 rows drawn with replacement; the last student."""
    generator = torch.Generator().manual_seed(seed)
    student = LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, rank, "svd"))
    module = DistilModule(teacher, student, **ORIGINAL)
    optimizer = module.configure_optimizers()
    for _ in range(ORIGINAL_STEPS):
        batch = x[torch.randint(len(x), (ORIGINAL_BATCH,), generator=generator)]
        optimizer.zero_grad()
        module.losses(batch)["loss"].mean().backward()
        optimizer.step()
    return module.student


def closed_form(teacher: nn.Linear, x: Tensor, rank: int) -> LowRankLinear:
    """No training."""
    return LowRankLinear.from_factors(closed_form_from_rows(teacher.weight, teacher.bias, x, rank)[0])


@torch.no_grad()
def fidelity(student: nn.Module, teacher: nn.Linear, mean: Tensor, x: Tensor) -> dict[str, float]:
    """Held-out figures."""
    output, target = student(x), teacher(x)
    return {
        "lost": 1 - metrics.r2(output, target, mean),
        "cosine": float(metrics.cosine(output, target).mean()),
        "centred cosine": float(metrics.centred_cosine(output, target, mean).mean()),
        "kNN@10": float(metrics.knn_overlap(output, target).mean()),
    }


def compare(teacher: nn.Linear, data: EmbeddingDataModule, rank: int, seeds: int) -> dict[str, Any]:
    """Take turns, once per seed."""
    x, held_out = data.rows("train"), data.rows("test")
    with torch.no_grad():
        mean = teacher(x).mean(0)
    closed_form(teacher, x, rank)  # warm up
    times: dict[str, list[float]] = {"recipe": [], "closed form": []}
    found: dict[str, list[dict[str, float]]] = {"recipe": [], "closed form": []}
    for seed in range(42, 42 + seeds):
        for name in ("closed form", "recipe"):
            started = time.perf_counter()
            student = closed_form(teacher, x, rank) if name == "closed form" else recipe(teacher, x, rank, seed)
            times[name].append(time.perf_counter() - started)
            found[name].append(fidelity(student, teacher, mean, held_out))
    row: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in times.items()}}
    row["time ratio"] = statistics.median(
        slow / fast for slow, fast in zip(times["recipe"], times["closed form"], strict=True)
    )
    for name, runs in found.items():
        row[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        row[f"{name} std"] = {key: statistics.pstdev(run[key] for run in runs) for key in runs[0]}
    row["residual ratio"] = row["closed form"]["lost"] / row["recipe"]["lost"]
    return row


def main() -> None:
    """Print the table; keep the figures in results/recipe.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/sample")
    parser.add_argument("--split", default="auto")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", default="results")
    options = parser.parse_args()
    data = EmbeddingDataModule(options.data, split=options.split)
    data.setup()
    seed_everything(42, verbose=False)
    rows = {}
    for kind in ("random", "denoising", "spectral"):
        teacher = train_teacher(data, kind, output=options.output, reuse=True).layer.requires_grad_(False)
        rows[kind] = compare(teacher, data, options.rank, options.seeds)
    path = Path(options.output) / f"recipe-{Path(options.data).stem}.json"
    path.write_text(
        json.dumps({"data": asdict(data.description()), "threads": torch.get_num_threads(), "rows": rows}, indent=1)
    )
    head = [
        "teacher",
        "lost: recipe → closed form",
        "ratio",
        "cosine",
        "centred cosine",
        "kNN@10",
        "seconds",
        "time ratio",
    ]
    lines = []
    for kind, row in rows.items():
        old, new = row["recipe"], row["closed form"]
        pairs = [f"{old[key]:.4f} → {new[key]:.4f}" for key in ("cosine", "centred cosine", "kNN@10")]
        lost = f"{old['lost']:.5f} → {new['lost']:.5f}"
        seconds = f"{row['seconds']['recipe']:.2f} → {row['seconds']['closed form']:.3f}"
        lines.append([kind, lost, f"{row['residual ratio']:.2f}", *pairs, seconds, f"{row['time ratio']:.0f}x"])
    about = data.description()
    print(machine_line())
    print(f"{about.source}, rank {options.rank}, {options.seeds} seeds, {about.rows.test} held-out rows")
    print(f"split by {about.split}; {torch.get_num_threads()} threads\n")
    print(markdown_table(head, lines))


if __name__ == "__main__":
    run(main, parse=False)
