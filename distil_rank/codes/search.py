"""Queries against a store of codes: hits by codes, by alignment or by both, with their scores, ranks and E-values.

Alignment finds the nearest relatives, codes the remote ones. Each tells how unlikely a pair is without a relation, and
independent evidence multiplies: the score of a pair is the sum of both surprises, in nats. Nothing in it is fitted to
labels.

An E-value tells how many targets as near as this one a query without relatives would find. Decoys tell: proteins that
have no relatives by construction, sent through the same backbone, encoder and engines as the queries. All that they
find is false (target-decoy estimation: Elias and Gygi, Nature Methods 4, 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_ndtr
from scipy.stats import genpareto
from torch import Tensor

from distil_rank.codes.augment import embed_like
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.store import CodeStore
from distil_rank.data.mmseqs import COLUMNS, Alignments, mmseqs_search
from distil_rank.errors import InputError

TAIL = 0.002  # share of the decoys' scores that the tail is fitted to
LEAST = 200  # scores in the tail, as far as there are any
SAMPLED_TARGETS = 20_000  # that decoys are compared with
BLOCK = 256  # of queries that are searched at once
NEAREST = 0.99  # cosines above it count as this: of two equal codes it would be infinite evidence


@dataclass(frozen=True)
class Hits:
    """Pairs of query and target, each query's best first.

    Attributes:
        query: indices, `(P,)`.
        target: indices, `(P,)`.
        alignment: `(P, 10)`, see `Alignments.columns`; NaN where there is none.
        cosine: of the float query and the code, `(P,)`; NaN where codes are not searched.
        score: evidence in nats, `(P,)`.
        rank: from 1, `(P,)`.
        evalue: `(P,)`; NaN without decoys.
    """

    query: np.ndarray
    target: np.ndarray
    alignment: np.ndarray
    cosine: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    evalue: np.ndarray

    def where(self, chosen: np.ndarray) -> Hits:
        """Some of them."""
        return Hits(**{name: column[chosen] for name, column in vars(self).items()})

    def best(self, k: int) -> Hits:
        """The k best of each query, with their ranks among those that are here."""
        rank = np.arange(len(self.query)) - np.searchsorted(self.query, self.query) + 1
        return replace(self, rank=rank).where(rank <= k)


@dataclass(frozen=True)
class Evidence:
    """How surprising a pair is if it is not related, in nats; what was not found is no surprise.

    Of a code it is `−ln P(Z > z)` of a normal Z: Fisher's transform `artanh` makes cosines of unrelated vectors normal
    (Biometrika 10, 1915), and decoys tell mean and spread. The decoys' own tail is heavier, since some share a
    composition; to count it would leave too little of the codes' evidence. Of an alignment it
    is `−ln(E / targets)` with its own E-value (Karlin and Altschul, PNAS 87, 1990).
    """

    targets: int
    mean: float = 0.0
    spread: float = 1.0

    def __call__(self, cosine: np.ndarray | None, evalue: np.ndarray | None) -> np.ndarray:
        """The evidence of cosines and alignments' E-values of the same pairs; NaN is not found, None not looked for.

        >>> Evidence(100, 0.0, 0.1)(np.array([0.0, 0.3]), np.array([np.nan, 1.0])).round(1).tolist()
        [0.7, 11.5]
        """
        parts = []
        if cosine is not None:
            z = (np.arctanh(np.clip(cosine, -NEAREST, NEAREST).astype(np.float64)) - self.mean) / self.spread
            parts.append(-log_ndtr(-z))
        if evalue is not None:
            share = np.clip(np.nan_to_num(evalue, nan=np.inf) / self.targets, 1e-300, 1)
            parts.append(-np.log(share))
        return np.sum(parts, axis=0)


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
    Pareto distribution (Pickands, Annals of Statistics 3, 1975). Its shape is fitted; of few scores up to that of
    an exponential tail, which evidence in nats would have. Beyond all decoys nothing is known, so that no E-value is
    below that of a single score.

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
        if shape > 0 and TAIL * len(flat) < LEAST:  # too few scores for what lies so far out: evidence in nats ends so
            shape, scale = 0.0, excess.mean()
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


def evidence_of(
    store: CodeStore, decoys: int, folder: Path, seed: int = 0, databases: Path | None = None, own: bool = False
) -> tuple[Evidence, DecoyScores | None]:
    """What counts as evidence, and the scores that so many reversed proteins of the store reach among its codes.

    Read from its end a sequence has the same composition, repeats and low complexity, and no relative; its own original
    does not count as found, for that composition. With `databases`, alignments count beside the codes; `own` says that
    queries are codes as well. Without decoys unrelated codes count as random directions.
    """
    dice, size = np.random.default_rng(seed), len(store)
    if not decoys:
        return Evidence(size, 0.0, store.encoder.rank**-0.5), None
    chosen = np.sort(dice.permutation(size)[:decoys])
    backwards = [text[::-1] for text in store.proteins.take(chosen)["sequence"].to_pylist()]
    vectors, encoder = vectors_like(backwards, store, folder, "decoys"), store.encoder
    queries = F.normalize(encoder.decode(encoder.encode(vectors)), dim=1) if own else encoder(vectors)
    rows = np.sort(dice.permutation(size)[:SAMPLED_TARGETS])
    targets = F.normalize(encoder.decode(torch.from_numpy(store.embeddings()[rows])), dim=1)
    cosine, others = (queries @ targets.T).numpy(), chosen[:, None] != rows
    z = np.arctanh(np.clip(cosine[others], -NEAREST, NEAREST).astype(np.float64))
    evidence, evalue = Evidence(size, float(z.mean()), float(z.std())), None
    if databases is not None:
        found = mmseqs_search(backwards, store.sequences, databases, keep=True)
        column = np.full(size, -1)
        column[rows] = np.arange(len(rows))
        seen = column[found.target] >= 0
        evalue = np.full(cosine.shape, np.nan)
        evalue[found.query[seen], column[found.target[seen]]] = found.column("evalue")[seen]
    return evidence, DecoyScores.of(np.where(others, evidence(cosine, evalue), 0.0))


@dataclass(frozen=True)
class Engines:
    """What is searched with: codes, alignments made beforehand, or both.

    Attributes:
        evidence: of a pair.
        index: the codes; None without them.
        alignments: of the queries with the targets; None without them.
        decoys: what E-values come from; without codes they are MMseqs2's own.
        own: whether the queries are the targets, which then do not find themselves.
    """

    evidence: Evidence
    index: CodeIndex | None
    alignments: Alignments | None
    decoys: DecoyScores | None = None
    own: bool = False

    @property
    def least(self) -> float:
        """The least E-value that decoys can tell; 0 where none come from them."""
        return 0.0 if self.decoys is None else self.decoys.least(self.evidence.targets)

    def search(self, queries: Tensor | None, count: int, k: int) -> Iterator[Hits]:
        """The k best hits of `count` queries, a block at a time; with codes queries are `(count, r)`."""
        for start in range(0, count, BLOCK):
            rows = np.arange(start, min(start + BLOCK, count))
            block = None if queries is None else queries[start : start + BLOCK]
            yield self._hits(rows, block, k)

    def _hits(self, rows: np.ndarray, queries: Tensor | None, k: int) -> Hits:
        """The k best of consecutive queries: whatever is aligned, and the k nearest codes, hold them all."""
        first, targets = rows[0], self.evidence.targets
        keys, aligned = [np.empty(0, np.int64)], np.empty(0, np.int64)
        if self.index is not None and queries is not None:
            near = self.index.search(queries, k + self.own)[1]
            keys.append(((rows - first)[:, None] * targets + near)[near >= 0])
        if self.alignments is not None:
            low, high = np.searchsorted(self.alignments.query, [first, rows[-1] + 1])
            aligned = (self.alignments.query[low:high] - first) * targets + self.alignments.target[low:high]
            keys.append(aligned)
        pairs = np.unique(np.concatenate(keys))
        if self.own:
            pairs = pairs[pairs // targets + first != pairs % targets]
        query, target = np.divmod(pairs, targets)
        alignment, cosine = np.full((len(pairs), len(COLUMNS)), np.nan), None
        if self.alignments is not None and len(aligned):
            place = np.searchsorted(aligned, pairs).clip(max=len(aligned) - 1)
            found = aligned[place] == pairs
            alignment[found] = self.alignments.columns[low + place[found]]
        if self.index is not None and queries is not None:
            cosine = self.index.scores(queries, query, target)
        evalue = alignment[:, COLUMNS.index("evalue")]
        score = self.evidence(cosine, None if self.alignments is None else evalue)
        if self.index is not None:
            evalue = np.full(len(pairs), np.nan) if self.decoys is None else self.decoys.evalues(score, targets)
        cosine = np.full(len(pairs), np.nan) if cosine is None else cosine
        hits = Hits(query + first, target, alignment, cosine, score, np.zeros(len(pairs), int), evalue)
        return hits.where(np.lexsort([-score, query])).best(k)
