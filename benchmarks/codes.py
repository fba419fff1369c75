"""What codes retain of function, and what they cost: the tables of docs/codes.md.

    python benchmarks/codes.py scope --data STORE --early STORE:4 --fasta scope40.fa --folds folds.txt
    python benchmarks/codes.py kinases --data kinases.npz
    python benchmarks/codes.py million --data STORE

`scope`: SCOPe's domains (the header's second word is the label), embedded with the backbone of the sample: their last
layer in STORE, and a layer before it in the other. Everything is fitted on the folds that the file lists.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from script import run, save_markdown
from torch import Tensor

from distil_rank.codes.fit import FittedMetric, fit_metric, noise_of, open_proteins
from distil_rank.codes.index import CodeIndex, import_faiss
from distil_rank.codes.train import train_encoder
from distil_rank.data.files import load_matrix
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.labelled import LabelledData
from distil_rank.evaluation.representations import (
    Representation,
    alignment,
    full_vector,
    module_output,
    principal_components,
)
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.codes import AugmentationOptions, CodeOptions
from distil_rank.options.evaluation import LabelOptions
from distil_rank.report.tables import evaluation_report

RESULTS = Path("results/codes")
COPIES = Path("results/copies")


def open_scope(data: str, fasta: str, folds: str) -> LabelledData:
    """Vectors with SCOPe's labels; the listed folds are fitted on."""
    return open_proteins(CodeOptions(data, labels=LabelOptions(fasta, field=2), task="retrieval", groups=folds))


def fitted(proteins: LabelledData, metric: str, source: Literal["copies", "labels"] = "copies") -> FittedMetric:
    """Directions of one metric; `source` is that of the invariant one's noise."""
    noise = None
    if metric == "invariant":
        noise, _ = noise_of(proteins, source, AugmentationOptions(), COPIES)
    return fit_metric(proteins.embeddings.x, proteins.groups.fit, metric, noise)


def trained(proteins: LabelledData, fit: FittedMetric, rank: int, dtype: Any) -> CodeEncoder:
    """The encoder after training towards the neighbours of the full-rank code, where that clearly helps."""
    rows = proteins.groups.fit
    x, groups = proteins.embeddings.x[rows], proteins.groups.number[rows]
    return train_encoder(fit.encoder(rank, dtype), fit.encoder(len(fit.mean)), x, groups, CodeOptions().train)


def coded(name: str, encoder: CodeEncoder, x: np.ndarray) -> Representation:
    """Codes of the vectors; nothing that is evaluated was fitted on."""
    return module_output(f"{name}, {encoder.bytes_per_protein} bytes", encoder.eval(), x)


def opq_of_full_vector(x: np.ndarray, books: int) -> Representation:
    """The baseline that everyone has: faiss's OPQ of the centred vector itself, float queries."""
    faiss, name = import_faiss(), f"faiss OPQ of the full vector, {books} bytes"

    def make(fit: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.ascontiguousarray(unit(x - x[fit].mean(0)), np.float32)
        index = faiss.index_factory(x.shape[1], f"OPQ{books},PQ{books}x8", faiss.METRIC_INNER_PRODUCT)
        index.train(rows[fit])
        decoded = index.sa_decode(index.sa_encode(rows))
        return torch.from_numpy(rows), torch.from_numpy(unit(decoded))

    return Representation(name, "matrix", books, make)


def encoders(proteins: LabelledData, name: str) -> Iterator[Representation]:
    """Codes of one layer."""
    x, fits = (
        proteins.embeddings.x,
        {metric: fitted(proteins, metric) for metric in ("invariant", "whitened", "variance")},
    )
    for rank, dtype in ((32, "bit"), (64, "bit"), (128, "bit"), (64, "int8")):
        title = f"{name}, invariant, {{}}{dtype}, rank {rank}"
        yield coded(title.format(""), fits["invariant"].encoder(rank, dtype), x)
        yield coded(title.format("trained, "), trained(proteins, fits["invariant"], rank, dtype), x)
    for metric in ("whitened", "variance"):
        for dtype in ("bit", "int8"):
            yield coded(f"{name}, {metric}, {dtype}, rank 64", fits[metric].encoder(64, dtype), x)
    yield coded(f"{name}, labels, int8, rank 64", fitted(proteins, "invariant", "labels").encoder(64, "int8"), x)


def scope(last: LabelledData, early: LabelledData) -> None:
    """The table and the picture of function against bytes on SCOPe."""
    x, sequences = last.embeddings.x, last.embeddings.sequences
    representations = [full_vector(x), full_vector(early.embeddings.x, "early layer, full vector", "matrix")]
    representations += [principal_components(x, 64), *(opq_of_full_vector(x, books) for books in (4, 8, 16, 32))]
    representations += [*encoders(last, "last layer"), *encoders(early, "early layer")]
    if mmseqs_binary() is not None and sequences is not None:
        representations.append(alignment(sequences))
    report = evaluation_report(evaluate(last.target, last.groups, representations, last.labels, last.notes))
    report.save(RESULTS / "scope" / "evaluation")
    report.show()


def kinases(data: str, labels: str) -> None:
    """Whitened codes of real ESM-2 650M vectors: half of the families fitted on, five times."""
    source = LabelOptions(column=labels, separator="_", names="group,family", level="family")
    rows: dict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(5):
        proteins = open_proteins(CodeOptions(data, labels=source, task="retrieval", groups="family", seed=seed))
        x = proteins.embeddings.x
        whitened, variance = fitted(proteins, "whitened"), fitted(proteins, "variance")
        representations = [full_vector(x), principal_components(x, 64)]
        for rank, dtype in ((64, "bit"), (128, "bit"), (64, "int8")):
            representations.append(coded(f"whitened, {dtype}, rank {rank}", whitened.encoder(rank, dtype), x))
        representations.append(coded("variance, int8, rank 64", variance.encoder(64, "int8"), x))
        for entry in evaluate(proteins.target, proteins.groups, representations, seed=seed).entries:
            if entry.bytes is not None:
                share = entry.retained.get("mAP")
                figures = (1.0, 1.0) if share is None else (share.value, share.low)
                rows[entry.name, entry.bytes].append((entry.scores["mAP"].value, *figures))
    lines = [
        "| representation | bytes | mAP | retained (mean of 5 splits) | lowest end of an interval |",
        "|---|---|---|---|---|",
    ]
    for (name, size), values in rows.items():
        score, share, low = np.array(values).T
        title = name.rpartition(",")[0] if name.endswith("bytes") else name
        lines.append(f"| {title} | {size:,.0f} | {score.mean():.3f} | {share.mean():.3f} | {low.min():.3f} |")
    save_markdown(RESULTS / "kinases.md", lines)


def million(data: str, rows: int, queries: int, rounds: int) -> None:
    """A million codes of 16 bytes beside faiss's flat float32 index of the full vectors, in one process by turns."""
    source, dice = load_matrix(data).x, np.random.default_rng(0)
    x, mean = resampled(source, rows, dice), source.mean(0)
    wanted = source[dice.integers(len(source), size=queries)]
    encoder = fit_metric(source, np.ones(len(source), bool), "whitened").encoder(128, "bit")
    flat = import_faiss().IndexFlatIP(source.shape[1])
    parts = []
    for part in np.array_split(x, 64):
        flat.add(unit(part - mean))
        parts.append(encoder.encode(torch.from_numpy(part)).numpy())
    codes, floats, queried = np.concatenate(parts), unit(wanted - mean), encoder(torch.from_numpy(wanted))
    del x, parts
    exact = CodeIndex(codes, encoder, exact=True)
    started = time.perf_counter()
    inverted = CodeIndex(codes, encoder, exact=False)
    built = time.perf_counter() - started
    calls = {
        "faiss flat float32, full vectors": lambda: flat.search(floats, 10),
        "bit, every code": lambda: exact.search(queried, 10),
        f"bit, {inverted.visited} of {inverted.lists} lists, built in {built:.0f} s": lambda: inverted.search(
            coded, 10
        ),
    }
    seconds, scores = defaultdict(list), {}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            scores[name] = call()[0]
            seconds[name].append(time.perf_counter() - started)
    (base, best, _), full = calls, 4 * source.shape[1]
    lines = [f"{rows:,} vectors resampled from {len(source):,} real ones, {queries:,} queries.", ""]
    lines += [
        "| index | bytes a vector | bytes ÷ | s for all queries | time ÷ | recall@10 of its own exact neighbours |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name in calls:
        size = full if name == base else encoder.bytes_per_protein
        recall = 1.0 if name == base else float((scores[name] >= scores[best][:, -1:] - 1e-6).mean())
        taken, slow = float(np.median(seconds[name])), float(np.median(seconds[base]))
        lines.append(f"| {name} | {size} | {full / size:.0f} | {taken:.3f} | {slow / taken:.1f} | {recall:.3f} |")
    save_markdown(RESULTS / "million.md", lines)


def resampled(source: np.ndarray, rows: int, dice: np.random.Generator) -> np.ndarray:
    """Real rows, each moved up to half-way to another one."""
    pairs = dice.integers(len(source), size=(rows, 2))
    share = dice.random((rows, 1), dtype=np.float32) * 0.5
    x = np.empty((rows, source.shape[1]), np.float32)
    for part in np.array_split(np.arange(rows), 64):
        x[part] = source[pairs[part, 0]] * (1 - share[part]) + source[pairs[part, 1]] * share[part]
    return x


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main(
    table: Literal["scope", "kinases", "million"],
    data: str = "data/sample",
    early: str = "",
    fasta: str = "",
    folds: str = "",
    labels: str = "labels_full",
    rows: int = 1_000_000,
    queries: int = 1000,
    rounds: int = 3,
) -> None:
    """Make one table.

    Args:
        table: Which.
        data: Store or file of the vectors.
        early: Store of an earlier layer.
        fasta: SCOPe's domains with their labels.
        folds: File of the folds to fit on.
        labels: Array of the .npz with group_family.
        rows: Codes to search among.
        queries: To search with.
        rounds: Of the searches that take turns.
    """
    if table == "scope":
        scope(open_scope(data, fasta, folds), open_scope(early, fasta, folds))
    elif table == "kinases":
        kinases(data, labels)
    else:
        million(data, rows, queries, rounds)


if __name__ == "__main__":
    run(main)
