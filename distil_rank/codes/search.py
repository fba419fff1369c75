"""Queries against a store of codes: hits with their scores, ranks and E-values.

An E-value tells how many targets as near as this one a query without relatives would find. Decoys tell: proteins that
have no relatives by construction, sent through the same backbone, encoder and search as the queries. All that they
find is false (target-decoy estimation: Elias and Gygi, Nature Methods 4, 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import genpareto
from torch import Tensor

from distil_rank.codes.augment import embed_like
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.store import CodeStore
from distil_rank.errors import InputError

TAIL = 0.002  # share of the decoys' scores that the tail is fitted to
LEAST = 200  # scores in the tail, as far as there are any
SAMPLED_TARGETS = 20_000  # that decoys are compared with
BLOCK = 4096  # of queries that are searched and written at once


class Hit(NamedTuple):
    """A line of the table; without decoys the E-value is NaN."""

    query: str
    target: str
    score: float
    rank: int
    evalue: float


def vectors_like(sequences: list[str], store: CodeStore, folder: Path, kind: str) -> Tensor:
    """Vectors of cleaned sequences, `(N, n)`, made as those behind the codes; their store is kept in `folder`."""
    vectors = embed_like(sequences, store.manifest, store.path, folder, kind)
    if vectors.skipped:
        longest = len(sequences[int(vectors.skipped[0])])
        raise InputError(
            f"Expected every sequence to fit into memory but that of {longest:,} residues did not; cut it, or use a "
            "machine with more."
        )
    return torch.from_numpy(np.array(vectors.embeddings()))


@dataclass(frozen=True)
class DecoyScores:
    """The scores of decoys, with a model of their upper tail.

    Up to a high threshold the share of decoy scores that reach s is counted; the excess over it follows a generalised
    Pareto distribution (Pickands, Annals of Statistics 3, 1975). Its shape is fitted: scores end at 1, so that an
    exponential tail, right for the unbounded scores of alignments, would state far too many false hits. Beyond all
    decoys nothing is known, so that no E-value is below that of a single score.

    Attributes:
        below: the sorted scores below the threshold, thinned.
        rate: share of all scores above the threshold.
        shape: of the excess; below 0 the tail ends.
        count: of all scores.
    """

    below: np.ndarray
    threshold: float
    rate: float
    scale: float
    shape: float
    count: int

    @classmethod
    def of(cls, scores: np.ndarray) -> DecoyScores:
        """From scores of any shape.

        >>> tail = DecoyScores.of(np.random.default_rng(0).exponential(0.1, 100_000))
        >>> evalues = tail.evalues(np.array([0.9, 9.0]), targets=1)
        >>> bool(abs(evalues[0] / np.exp(-9) - 1) < 0.5), float(evalues[1])
        (True, 1e-05)
        """
        flat = np.sort(scores, axis=None)
        if len(flat) < 2:
            raise InputError(f"Expected at least 2 scores of decoys but got {len(flat)}; use more decoys.")
        count = min(max(round(TAIL * len(flat)), min(LEAST, len(flat) // 2)), len(flat) - 1)
        threshold = float(flat[-count - 1])
        excess = np.maximum(flat[-count:].astype(np.float64) - threshold, np.finfo(np.float32).eps)
        shape, _, scale = genpareto.fit(excess, floc=0)
        below = flat[: -count : max(1, len(flat) // 10_000)]
        return cls(below, threshold, count / len(flat), float(scale), float(shape), len(flat))

    def evalues(self, scores: np.ndarray, targets: int) -> np.ndarray:
        """False hits of these scores or better to expect for one query among so many targets; any shape."""
        counted = 1 - np.searchsorted(self.below, scores) / len(self.below) * (1 - self.rate)
        tail = self.rate * genpareto.sf(np.maximum(scores - self.threshold, 0), self.shape, scale=self.scale)
        share = np.where(scores > self.threshold, tail, np.maximum(counted, self.rate))
        return np.maximum(targets * share, self.least(targets))

    def least(self, targets: int) -> float:
        """The least E-value that this many scores can tell."""
        return targets / self.count


def decoy_scores(store: CodeStore, decoys: int, folder: Path, seed: int = 0) -> DecoyScores:
    """Scores that so many reversed proteins of the store reach among its codes.

    Read from its end a sequence has the same composition, repeats and low complexity, and no relative; its own original
    does not count as found, for that composition.
    """
    dice = np.random.default_rng(seed)
    chosen = np.sort(dice.permutation(len(store))[:decoys])
    reversed_sequences = [text[::-1] for text in store.proteins.take(chosen)["sequence"].to_pylist()]
    queries = store.encoder(vectors_like(reversed_sequences, store, folder, "decoys"))
    rows = np.sort(dice.permutation(len(store))[:SAMPLED_TARGETS])
    targets = F.normalize(store.encoder.decode(torch.from_numpy(store.embeddings()[rows])), dim=1)
    scores = (queries @ targets.T).numpy()
    scores[chosen[:, None] == rows] = -1
    return DecoyScores.of(scores)


def search_blocks(
    names: list[str], queries: Tensor, index: CodeIndex, ids: list[str], decoys: DecoyScores | None, k: int, own: bool
) -> Iterator[list[Hit]]:
    """The k best hits of all queries, a block at a time.

    Queries are `(Q, r)`, of unit length; `own` says that they are the targets, which then do not find themselves.
    """
    for start in range(0, len(names), BLOCK):
        scores, rows = index.search(queries[start : start + BLOCK], k + own)
        evalues = np.full(scores.shape, np.nan)
        if decoys is not None:
            evalues = decoys.evalues(scores.astype(np.float64), len(ids))
        lines: list[Hit] = []
        for number, columns in enumerate(zip(scores, rows, evalues, strict=True), start):
            hits = [hit for hit in zip(*columns, strict=True) if hit[1] >= 0 and not (own and hit[1] == number)][:k]
            for rank, (score, row, evalue) in enumerate(hits, 1):
                lines.append(Hit(names[number], ids[row], float(score), rank, float(evalue)))
        yield lines
