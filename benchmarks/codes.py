"""What codes keep of function, what they cost, and whether E-values hold: the tables and pictures of docs/codes.md.

    python benchmarks/codes.py scope --data STORE --early STORE:4 --fasta scope40.fa --folds folds.txt
    python benchmarks/codes.py kinases --data kinases.npz
    python benchmarks/codes.py evalues --data STORE:4 --fasta scope40.fa --folds folds.txt
    python benchmarks/codes.py million --data STORE

`scope`: SCOPe's domains (the header's second word is the label), embedded with the backbone of the sample: their last
layer in STORE, and a layer before it in the other. Everything is fitted on the folds that the file lists.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from script import run, save_markdown
from torch import Tensor

RESULTS = Path("results")
COPIES = RESULTS / "copies"


def labelled(data: str, fasta: str, folds: str):
    """Vectors with SCOPe's labels, the listed folds on the fit side."""
    from distil_rank.codes.sources import open_proteins
    from distil_rank.options.codes import CodeOptions
    from distil_rank.options.evaluation import LabelOptions

    return open_proteins(CodeOptions(data, labels=LabelOptions(fasta, field=2), task="retrieval", groups=folds))


def fitted(proteins, metric: str, noise: str = "copies"):
    """Directions of one metric on the fit side."""
    from distil_rank.codes.fit import fit_metric
    from distil_rank.codes.sources import noise_of
    from distil_rank.options.codes import AugmentationOptions

    covariance = None
    if metric == "invariant":
        covariance, _ = noise_of(proteins, noise, AugmentationOptions(), COPIES)
    return fit_metric(proteins.embeddings.x, proteins.groups.fit, metric, covariance)


def opq_of_full_vector(x: np.ndarray, fit: np.ndarray, books: int):
    """The baseline that everyone has: faiss's OPQ of the centred vector itself, float queries."""
    import faiss

    from distil_rank.evaluation.representations import Representation

    def make(_: np.ndarray):
        rows = F.normalize(torch.from_numpy(x - x[fit].mean(0)), dim=1)
        index = faiss.index_factory(x.shape[1], f"OPQ{books},PQ{books}", faiss.METRIC_INNER_PRODUCT)
        index.train(rows[torch.from_numpy(fit)].numpy())
        targets = torch.from_numpy(index.sa_decode(index.sa_encode(rows.numpy())))
        return rows, F.normalize(targets, dim=1)

    name = f"faiss OPQ of the full vector, {books} bytes"
    return Representation(name, "student", books, make)


def encoders(proteins, name: str) -> Iterator[tuple[str, object]]:
    """Encoders of one layer, by name."""
    invariant = fitted(proteins, "invariant")
    for rank in (32, 64, 128):
        yield f"{name}, invariant, bit, rank {rank}", invariant.encoder(rank, "bit")
        yield f"{name}, invariant, trained, bit, rank {rank}", trained(proteins, invariant, rank, "bit")
    yield f"{name}, invariant, int8, rank 64", invariant.encoder(64, "int8")
    yield f"{name}, invariant, trained, int8, rank 64", trained(proteins, invariant, 64, "int8")
    whitened = fitted(proteins, "whitened")
    yield f"{name}, whitened, bit, rank 64", whitened.encoder(64, "bit")
    yield f"{name}, whitened, int8, rank 64", whitened.encoder(64, "int8")
    variance = fitted(proteins, "variance")
    yield f"{name}, variance, bit, rank 64", variance.encoder(64, "bit")
    yield f"{name}, variance, int8, rank 64", variance.encoder(64, "int8")
    yield f"{name}, labels, int8, rank 64", fitted(proteins, "invariant", "labels").encoder(64, "int8")


def trained(proteins, fit, rank: int, dtype: str):
    """The encoder after training towards the neighbours of the full-rank code, where that clearly helps."""
    from distil_rank.codes.train import train_encoder
    from distil_rank.options.codes import CodeOptions

    teacher, side = fit.encoder(len(fit.mean)), proteins.groups.fit
    x, groups = proteins.embeddings.x[side], proteins.groups.number[side]
    encoder = train_encoder(fit.encoder(rank, dtype), teacher, x, groups, CodeOptions().train)
    print(f"{dtype}, rank {rank}: {encoder.provenance.get('training')}", flush=True)
    return encoder


def scope(options: argparse.Namespace) -> None:
    """The table and the picture of function against bytes on SCOPe."""
    from distil_rank.data.mmseqs import mmseqs_binary
    from distil_rank.evaluation.baselines import alignment_scores
    from distil_rank.evaluation.evaluate import evaluate
    from distil_rank.evaluation.representations import full_vector, module_output, variance_student
    from distil_rank.report.evaluation import evaluation_report

    last = labelled(options.data, options.fasta, options.folds)
    early = labelled(options.early, options.fasta, options.folds)
    assert last.embeddings.ids == early.embeddings.ids
    x = last.embeddings.x
    candidates = [full_vector(x), full_vector(early.embeddings.x, "early layer, full vector", "matrix")]
    candidates.append(variance_student(x, 64))
    for books in (4, 8, 16, 32):
        candidates.append(opq_of_full_vector(x, last.groups.fit, books))
    for proteins, name in ((last, "last layer"), (early, "early layer")):
        for title, encoder in encoders(proteins, name):
            full_title = f"{title}, {encoder.bytes_per_protein} bytes"
            candidates.append(module_output(full_title, encoder, proteins.embeddings.x))
    scores = None
    if mmseqs_binary() is not None and last.embeddings.sequences is not None:
        sequences = last.embeddings.sequences
        scores = lambda: alignment_scores([sequences[row] for row in last.groups.evaluated])  # noqa: E731
    done = evaluate(last.target, last.groups, candidates, last.labels, scores, last.notes)
    report = evaluation_report(done)
    report.save(RESULTS / "codes" / "scope" / "evaluation")
    report.show()


def kinases(options: argparse.Namespace) -> None:
    """Whitened codes of real ESM-2 650M vectors: half of the families fitted on, five times."""
    from distil_rank.codes.fit import fit_metric
    from distil_rank.codes.sources import open_proteins
    from distil_rank.evaluation.evaluate import evaluate
    from distil_rank.evaluation.representations import full_vector, module_output, variance_student
    from distil_rank.options.codes import CodeOptions
    from distil_rank.options.evaluation import LabelOptions

    retained: dict[str, list[tuple[float, float, float]]] = {}
    sizes: dict[str, float] = {}
    for seed in range(5):
        labels = LabelOptions(column=options.labels, separator="_", names="group,family", level="family")
        proteins = open_proteins(CodeOptions(options.data, labels=labels, task="retrieval", groups="family", seed=seed))
        x, fit = proteins.embeddings.x, proteins.groups.fit
        whitened, variance = fit_metric(x, fit, "whitened"), fit_metric(x, fit, "variance")
        candidates = [full_vector(x), variance_student(x, 64)]
        for rank in (64, 128):
            candidates.append(module_output(f"whitened, bit, rank {rank}", whitened.encoder(rank, "bit"), x))
        candidates.append(module_output("whitened, int8, rank 64", whitened.encoder(64, "int8"), x))
        candidates.append(module_output("variance, int8, rank 64", variance.encoder(64, "int8"), x))
        for entry in evaluate(proteins.target, proteins.groups, candidates, seed=seed).entries:
            if entry.bytes is not None:
                score = entry.scores["mAP"].value
                ratio = entry.retained["mAP"] if entry.retained else None
                retained.setdefault(entry.name, []).append(
                    (score, 1.0, 1.0) if ratio is None else (score, ratio.value, ratio.low)
                )
                sizes[entry.name] = entry.bytes
    lines = [
        "| representation | bytes | mAP | kept (mean of 5 splits) | lowest end of an interval |",
        "|---|---|---|---|---|",
    ]
    for name, values in retained.items():
        score, ratio, low = np.array(values).T
        lines.append(f"| {name} | {sizes[name]:,.0f} | {score.mean():.3f} | {ratio.mean():.3f} | {low.min():.3f} |")
    write("codes/kinases.md", lines)


def evalues(options: argparse.Namespace) -> None:
    """Stated against observed false hits for each query among SCOPe's evaluated domains; false: another fold."""
    import matplotlib.pyplot as plt

    from distil_rank.codes.augment import embed_like
    from distil_rank.codes.search import DecoyScores

    proteins = labelled(options.data, options.fasta, options.folds)
    fit = fitted(proteins, "invariant")
    evaluated = proteins.groups.evaluated
    x = torch.from_numpy(proteins.embeddings.x[evaluated])
    fold = proteins.target.relevance.levels[-1][evaluated]
    chosen = np.sort(np.random.default_rng(0).permutation(len(evaluated))[: options.decoys])
    sequences = [proteins.embeddings.sequences[evaluated[row]][::-1] for row in chosen]
    about = proteins.embeddings.provenance
    vectors = torch.from_numpy(embed_like(sequences, about, about.get("source"), COPIES, "scope-decoys").embeddings())
    stated = np.logspace(-2, 1, 13)
    lines = ["| code | bytes | stated | observed |", "|---|---|---|---|"]
    figure, ax = plt.subplots(figsize=(5, 4.5))
    for rank, dtype in ((64, "bit"), (128, "bit"), (64, "int8")):
        encoder = fit.encoder(rank, dtype)
        targets = F.normalize(encoder.decode(encoder.encode(x)), dim=1)
        found = (encoder(vectors) @ targets.T).numpy()
        tail = DecoyScores.of(found[chosen[:, None] != np.arange(len(evaluated))])
        observed = false_hits(encoder(x), targets, fold, tail, stated)
        name = f"{dtype}, rank {rank}"
        ax.plot(stated, observed, "o-", ms=3, label=f"{name}, {encoder.bytes_per_protein} bytes")
        for place in (0, 4, 8, 12):
            lines.append(f"| {name} | {encoder.bytes_per_protein} | {stated[place]:.3g} | {observed[place]:.3g} |")
    ax.plot(stated, stated, "k--", lw=1, label="as stated")
    ax.set(xscale="log", yscale="log", xlabel="stated false hits for each query", ylabel="observed (another fold)")
    ax.legend(fontsize=8)
    figure.tight_layout()
    (RESULTS / "codes").mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "codes" / "evalues.png", dpi=120)
    write("codes/evalues.md", lines)


def false_hits(queries: Tensor, targets: Tensor, fold: np.ndarray, tail, stated: np.ndarray) -> np.ndarray:
    """Hits of another fold with an E-value up to each stated one, for each query."""
    counts = np.zeros(len(stated))
    for start in range(0, len(queries), 500):
        part = slice(start, start + 500)
        expected = tail.evalues((queries[part] @ targets.T).numpy().astype(np.float64), len(targets) - 1)
        expected = np.sort(expected[fold[part, None] != fold[None]])
        counts += np.searchsorted(expected, stated, "right")
    return counts / len(queries)


def million(options: argparse.Namespace) -> None:
    """A million codes of 16 bytes beside faiss's flat float32 index of the full vectors, in one process by turns."""
    from distil_rank.codes.fit import fit_metric
    from distil_rank.data.files import load_matrix

    source = load_matrix(options.data).x
    dice = np.random.default_rng(0)
    fit = fit_metric(source, np.ones(len(source), bool), "whitened")
    x = resampled(source, options.rows, dice)
    queries = source[dice.integers(len(source), size=options.queries)]
    flat, wanted = flat_index(x, source.mean(0)), unit(queries - source.mean(0))
    coded = {"bit": Coded(fit.encoder(128, "bit"), x)}
    del x
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        timed(seconds["flat", ""], lambda: flat.search(wanted, 10))
        for dtype, one in coded.items():
            for kind, index in one.indexes.items():
                found = timed(seconds[dtype, kind], lambda i=index, c=one: i.search(c.queries(queries), 10))
                one.scores[kind] = found[0]
    full, base = 4 * source.shape[1], float(np.median(seconds["flat", ""]))
    lines = [
        f"{options.rows:,} vectors resampled from {len(source):,} real ones, {options.queries:,} queries.",
        "",
        "| index | bytes a vector | bytes ÷ | s for all queries | time ÷ | recall@10 of its own exact neighbours |",
        "|---|---|---|---|---|---|",
        f"| faiss flat float32, full vectors | {full} | 1 | {base:.2f} | 1 | 1 |",
    ]
    for dtype, one in coded.items():
        for kind in one.indexes:
            taken, size = float(np.median(seconds[dtype, kind])), one.encoder.bytes_per_protein
            lines.append(
                f"| {dtype}, {one.described(kind)} | {size} | {full / size:.0f} | {taken:.3f} | {base / taken:.1f} | "
                f"{one.recall(kind):.3f} |"
            )
    write("codes/million.md", lines)


class Coded:
    """The codes of one type, searched through one by one and by lists."""

    def __init__(self, encoder, x: np.ndarray) -> None:
        from distil_rank.codes.index import CodeIndex

        self.encoder = encoder
        parts = np.array_split(x, 64)
        codes = np.concatenate([encoder.encode(torch.from_numpy(part)).numpy() for part in parts])
        exact = CodeIndex(codes, encoder, exact=True)
        started = time.perf_counter()
        lists = CodeIndex(codes, encoder, exact=False)
        self.build_seconds = time.perf_counter() - started
        self.indexes = {"exact": exact, "lists": lists}
        self.scores: dict[str, np.ndarray] = {}

    def queries(self, x: np.ndarray) -> Tensor:
        """Float queries."""
        return self.encoder(torch.from_numpy(x))

    def described(self, kind: str) -> str:
        """How an index searches."""
        lists = self.indexes["lists"]
        if kind == "exact":
            return "every code"
        return f"{lists.visited} of {lists.lists} lists, built in {self.build_seconds:.0f} s"

    def recall(self, kind: str) -> float:
        """Share of hits that score at least as the tenth of the exact ones does."""
        return float((self.scores[kind] >= self.scores["exact"][:, -1:] - 1e-6).mean())


def timed(seconds: list[float], call):
    """Call, and note the time."""
    started = time.perf_counter()
    found = call()
    seconds.append(time.perf_counter() - started)
    return found


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


def flat_index(x: np.ndarray, mean: np.ndarray):
    """faiss's flat index of the centred rows at unit length."""
    import faiss

    flat = faiss.IndexFlatIP(x.shape[1])
    for part in np.array_split(x, 64):
        flat.add(unit(part - mean))
    return flat


def write(name: str, lines: list[str]) -> None:
    """Print a table and keep it in `results/`."""
    save_markdown(RESULTS / name, lines)


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["scope", "kinases", "evalues", "million"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--early")
    parser.add_argument("--fasta")
    parser.add_argument("--folds")
    parser.add_argument("--labels", default="labels_full", help="array of the .npz with group_family")
    parser.add_argument("--decoys", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    {"scope": scope, "kinases": kinases, "evalues": evalues, "million": million}[options.table](options)


if __name__ == "__main__":
    run(main, parse=False)
