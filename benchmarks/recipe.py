"""The original recipe beside the closed form, in one process: what survives, and how long each takes.

    python benchmarks/recipe.py [--data PATH] [--split auto] [--rank 64] [--seeds 5]

Both see the same training rows and are measured on the same held-out rows. They take turns, so that a busy machine
slows both. The recipe runs as a bare loop around its loss: Lightning's own overhead is not held against it. Where the
squared error is the objective (`distil-rank distil --distil.alpha 0`) the student *is* the closed form.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import seed_everything
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank.commands.train_teacher import make_teacher
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve
from distil_rank.measure import metrics
from distil_rank.options.training import TeacherOptions
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS, DistilModule


def recipe(teacher: nn.Linear, data: EmbeddingDataModule, x: Tensor, rank: int, seed: int) -> LowRankLinear:
    """SVD warm start, AdamW at 3e-3, 1000 batches of 64 rows drawn with replacement; the last student."""
    generator = torch.Generator().manual_seed(seed)
    module = DistilModule(teacher, rank, **ORIGINAL)
    module.solve(data)
    optimizer = module.configure_optimizers()
    for _ in range(ORIGINAL_STEPS):
        batch = x[torch.randint(len(x), (ORIGINAL_BATCH,), generator=generator)]
        optimizer.zero_grad()
        module.losses(batch)["loss"].mean().backward()
        optimizer.step()
    return module.layer


def closed_form(teacher: nn.Linear, x: Tensor, rank: int) -> LowRankLinear:
    """No training."""
    return LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, rank, "closed_form", Moments.of(x)))


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
    fidelities: dict[str, list[dict[str, float]]] = {"recipe": [], "closed form": []}
    for seed in range(42, 42 + seeds):
        for name in ("closed form", "recipe"):
            started = time.perf_counter()
            student = closed_form(teacher, x, rank) if name == "closed form" else recipe(teacher, data, x, rank, seed)
            times[name].append(time.perf_counter() - started)
            fidelities[name].append(fidelity(student, teacher, mean, held_out))
    row: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in times.items()}}
    row["time ratio"] = statistics.median(
        slow / fast for slow, fast in zip(times["recipe"], times["closed form"], strict=True)
    )
    for name, runs in fidelities.items():
        row[name] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return row


def main(
    data: str = "data/sample",
    split: Literal["auto", "mmseqs", "clusters", "exact"] = "auto",
    rank: int = 64,
    seeds: int = 5,
    output: Path = Path("results"),
) -> None:
    """Print the table and write it to results/recipe-NAME.md.

    Args:
        data: Embeddings of any kind that `distil-rank` reads.
        split: How held-out rows are kept apart.
        rank: Of the students.
        seeds: Of the recipe.
        output: Folder of the table, and of the teachers.
    """
    module = EmbeddingDataModule(data, split=split)
    module.setup()
    seed_everything(42, verbose=False)
    about = module.description()
    lines = [
        f"{about.source}, rank {rank}, {seeds} seeds, {about.rows['test']} held-out rows",
        f"split by {about.split}; {torch.get_num_threads()} threads\n",
        "| teacher | lost: recipe → closed form | ratio | cosine | centred cosine | kNN@10 | seconds | time ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("random", "denoising", "spectral"):
        teacher = make_teacher(module, TeacherOptions(kind), {}, str(output), reuse=True).layer.requires_grad_(False)
        row = compare(teacher, module, rank, seeds)
        old, new = row["recipe"], row["closed form"]
        pairs = [f"{old[key]:.4f} → {new[key]:.4f}" for key in ("cosine", "centred cosine", "kNN@10")]
        lost, ratio = f"{old['lost']:.5f} → {new['lost']:.5f}", f"{new['lost'] / old['lost']:.2f}"
        seconds = f"{row['seconds']['recipe']:.2f} → {row['seconds']['closed form']:.3f}"
        lines.append(f"| {' | '.join([kind, lost, ratio, *pairs, seconds])} | {row['time ratio']:.0f}x |")
    save_markdown(output / f"recipe-{Path(data).stem}.md", lines)


if __name__ == "__main__":
    run(main)
