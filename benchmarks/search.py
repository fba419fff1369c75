"""Search by codes, by alignment and by both, beside structure search: the tables of docs/search.md.

    python benchmarks/search.py folds --data STORE:4 --labels scope40.fa --field 2 --folds_file folds.txt
    python benchmarks/search.py standard --data STORE:4 --labels labels.tsv --rivals rivals.tsv

`folds`: everything is fitted on the folds that the file lists, without labels, and the others are searched.
`standard`: the domains that Foldseek and ProstT5 are measured on; fitted to the set itself, without labels. `rivals`
has a line for each query: id, then each program's sensitivity to the first false positive at family, superfamily, fold.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from codes import fitted, trained
from script import run, save_markdown

from distil_rank.codes.augment import embed_like
from distil_rank.codes.fit import open_proteins
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.search import DecoyScores, Engines, decoy_evidence, with_relatives
from distil_rank.data.mmseqs import Alignments, mmseqs_search
from distil_rank.evaluation.labelled import LabelledData
from distil_rank.evaluation.retrieval import Relevance, retrieve
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.measure.statistics import Interval, interval, mean, resample_counts
from distil_rank.options.codes import CodeOptions
from distil_rank.options.evaluation import LabelOptions

RESULTS = Path("results/search")
DEPTH = 400  # hits of each query that are looked at
STATED = (0.01, 0.1, 1.0, 10.0)
# Rossmann-like folds and β-propellers, each with common ancestors across folds (Söding, Bioinformatics 21, 2005)
ACROSS_FOLDS = (["c.2", "c.3", "c.4", "c.5", "c.27", "c.28", "c.30", "c.31"], ["b.66", "b.67", "b.68", "b.69", "b.70"])
Figures = dict[str, np.ndarray]


class Set:
    """The evaluated proteins of a labelled set, aligned with one another, and decoys of them."""

    def __init__(self, proteins: LabelledData, rows: np.ndarray, decoys: int) -> None:
        assert proteins.target.relevance is not None and proteins.embeddings.sequences is not None
        self.proteins, self.relevance = proteins, proteins.target.relevance.subset(rows)
        fold = np.array(proteins.target.levels[-1], dtype=object)[rows]
        for names in ACROSS_FOLDS:
            fold[np.isin(fold, names)] = names[0]
        self.ancestor = np.unique(fold, return_inverse=True)[1]
        self.x = torch.from_numpy(proteins.embeddings.x[rows])
        self.ids = [proteins.embeddings.ids[row] for row in rows]
        sequences = [proteins.embeddings.sequences[row] for row in rows]
        self.chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:decoys])
        backwards = [sequences[row][::-1] for row in self.chosen]
        about = proteins.embeddings.provenance
        store = embed_like(backwards, about, about["source"], Path("results/decoys"), "decoys")
        self.decoys = torch.from_numpy(np.array(store.embeddings()))
        folder = RESULTS / "alignments"
        self.aligned = mmseqs_search(sequences, sequences, folder, keep=True)
        self.profiles = mmseqs_search(sequences, sequences, folder, keep=True, profiles=True)
        self.both = self.profiles.both_ways()
        self.aligned_decoys = mmseqs_search(backwards, sequences, folder, keep=True, profiles=True)

    def search(self, encoder: CodeEncoder | None, alignments: Alignments | None) -> tuple[Figures, np.ndarray]:
        """Figures of each query, and hits of another fold for each query at the stated E-values, `(2, STATED)`.

        Behind them without those between `ACROSS_FOLDS`.
        """
        count, index, decoys, queries = len(self.x), None, None, None
        if encoder is not None:
            index, queries = CodeIndex(encoder.encode(self.x).numpy(), encoder, exact=True), encoder(self.x)
            aligned = None if alignments is None else self.aligned_decoys
            decoys = DecoyScores.of(decoy_evidence(encoder(self.decoys), self.chosen, index, aligned, np.arange(count)))
            if alignments is not None:
                queries = with_relatives(queries, alignments, index, own=True)
        scores, false, fold = (
            torch.full((count, count), -torch.inf),
            np.zeros((2, len(STATED))),
            self.relevance.levels[-1],
        )
        for hits in Engines(count, index, alignments, decoys, True).search(queries, count, DEPTH):
            scores[hits.query, hits.target] = torch.from_numpy(hits.score).float()
            for row, kind in enumerate((fold, self.ancestor)):
                wrong = hits.evalue[kind[hits.query] != kind[hits.target]]
                false[row] += [(wrong <= stated).sum() for stated in STATED]
        return retrieve(lambda q, t: scores[torch.from_numpy(q)][:, torch.from_numpy(t)], self.relevance), false / count


def difference(ours: np.ndarray, theirs: np.ndarray, group: np.ndarray) -> Interval:
    """The paired interval of a difference of means over groups."""
    number = np.unique(group, return_inverse=True)[1]
    gain = mean(ours - theirs, number)
    return interval(gain.value, gain.resampled(resample_counts(int(number.max()) + 1)))


def line(name: str, cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join([name, *cells])} |"


def folds(proteins: LabelledData, decoys: int) -> None:
    """The table of retrieval with paired differences over folds, and stated against observed false hits."""
    domains = Set(proteins, proteins.groups.evaluated, decoys)
    named: dict[str, tuple[Figures, np.ndarray]] = {
        "MMseqs2": domains.search(None, domains.aligned),
        "MMseqs2, profiles": domains.search(None, domains.profiles),
    }
    rivals: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for rank, metric in ((64, "invariant"), (128, "invariant"), (128, "whitened")):
        encoder = trained(proteins, fitted(proteins, metric), rank, "bit")
        name = f"{encoder.bytes_per_protein} bytes{', whitened' * (metric == 'whitened')}"
        named[f"{name} alone"] = domains.search(encoder, None)
        named[f"{name} and MMseqs2"] = domains.search(encoder, domains.both)
        rivals[f"{name} and MMseqs2"] = ("MMseqs2", "MMseqs2, profiles", f"{name} alone")
    metrics = list(named["MMseqs2"][0])
    table, gains = [line("search", metrics), "|---" * (len(metrics) + 1) + "|"], []
    for name, (figures, _) in named.items():
        table.append(line(name, [f"{np.nanmean(figures[metric]):.3f}" for metric in metrics]))
        for rival in rivals[name]:
            ends = [difference(figures[one], named[rival][0][one], domains.relevance.levels[-1]) for one in metrics]
            gains.append(line(f"{name} less {rival}", [f"{x.value:+.3f} [{x.low:+.3f}, {x.high:+.3f}]" for x in ends]))
    save_markdown(RESULTS / "folds.md", table)
    short = ("MMseqs2", "MMseqs2, profiles", "16 bytes alone", "8 bytes and MMseqs2", "16 bytes and MMseqs2")
    save_markdown(
        RESULTS / "short.md",
        [*table[:2], *(one for one in table if one.startswith(tuple(f"| {name} |" for name in short)))],
    )
    save_markdown(RESULTS / "folds_gain.md", [*table[:2], *gains])
    head = ["search", *(f"stated {stated:g}" for stated in STATED)]
    rows = [line(name, [f"{every:.3g} ({rest:.3g})" for every, rest in false.T]) for name, (_, false) in named.items()]
    save_markdown(RESULTS / "evalues.md", [line(head[0], head[1:]), "|---" * len(head) + "|", *rows])


def standard(proteins: LabelledData, rivals: str, decoys: int) -> None:
    """Sensitivity to the first false positive beside programs that know structures, by both denominators."""
    everything = np.ones(len(proteins.embeddings.x), bool)
    proteins = replace(proteins, groups=replace(proteins.groups, fit=everything))
    domains, fit = Set(proteins, np.flatnonzero(everything), decoys), fitted(proteins, "whitened")
    table = np.genfromtxt(rivals, delimiter="\t", dtype=None, names=True, encoding="utf-8")
    row_of = {name: row for row, name in enumerate(domains.ids)}
    rows = np.array([row_of[name] for name in table["id"]])
    wholes = sizes(domains.relevance)[:, rows]
    extra = np.array([[0], [1], [1]])  # the published script counts the query itself at superfamily and fold
    levels = domains.relevance.names
    published = {name: np.stack([table[f"{name}_{level}"] for level in levels]) for name in ("foldseek", "prostt5")}
    ours = {"MMseqs2": domains.search(None, domains.aligned)[0]}
    ours["MMseqs2, profiles"] = domains.search(None, domains.profiles)[0]
    for rank, dtype in ((128, "bit"), (128, "float32"), (320, "float32")):
        encoder = trained(proteins, fit, rank, dtype) if dtype == "bit" else fit.encoder(rank, dtype)
        ours[f"{encoder.bytes_per_protein:,} bytes alone"] = domains.search(encoder, None)[0]
        ours[f"{encoder.bytes_per_protein:,} bytes and MMseqs2"] = domains.search(encoder, domains.both)[0]
    for name, figures in ours.items():
        corrected = np.stack([figures[f"sens1fp {level}"][rows] for level in levels])
        published[name] = corrected * wholes / (wholes + extra)
    head = ["search", *(f"{level}, {way}" for way in ("as published", "corrected") for level in levels)]
    lines = [line(head[0], head[1:]), "|---" * len(head) + "|"]
    group = domains.relevance.levels[1][rows]
    for name, values in published.items():
        both = np.concatenate([values, values * (wholes + extra) / wholes])
        cells = [f"{np.nanmean(one):.3f}" for one in both]
        if name not in ("foldseek", "prostt5", "MMseqs2", "MMseqs2, profiles"):
            ends = [difference(one, other, group) for one, other in zip(values, published["foldseek"], strict=True)]
            cells = [f"{cell} ({x.low:+.3f} to {x.high:+.3f})" for cell, x in zip(cells, ends, strict=False)] + cells[
                3:
            ]
        lines.append(line(name, cells))
    lines += [
        "",
        f"{len(rows):,} queries. In brackets: paired 95 % interval over superfamilies of the difference to Foldseek.",
    ]
    save_markdown(RESULTS / "standard.md", lines)


def sizes(relevance: Relevance) -> np.ndarray:
    """How many proteins each has in common with it at a level, but at no finer one, `(levels, N)`."""
    wholes = np.stack([np.bincount(level)[level] - 1 for level in relevance.levels])
    return np.diff(wholes, axis=0, prepend=0)


def main(
    table: Literal["folds", "standard"],
    data: str = "data/functions",
    labels: str = "",
    field: int | None = None,
    folds_file: str = "",
    rivals: str = "",
    decoys: int = 200,
) -> None:
    """Make the tables of one set.

    Args:
        table: Which.
        data: Store of the vectors.
        labels: SCOPe's classes: a table, or FASTA.
        field: Word of the FASTA header that is the class.
        folds_file: File of the folds to fit on.
        rivals: Table of other programs' figures.
        decoys: Domains read backwards.
    """
    options = LabelOptions(labels, field=field)
    groups = folds_file or "fold"
    proteins = open_proteins(CodeOptions(data, labels=options, task="retrieval", groups=groups))
    if table == "folds":
        folds(proteins, decoys)
    else:
        standard(proteins, rivals, decoys)


if __name__ == "__main__":
    run(main)
