"""Queries against a store of codes: hits by codes, by alignment or by both, with their scores, ranks and E-values.

Alignment finds the nearest relatives, codes the remote ones. Each tells how unlikely a pair is without a relation, and
independent evidence multiplies: the score of a pair is the sum of both surprises, in nats. What is surely aligned with
a query helps to find more, in a profile and in a mean of codes. Nothing is fitted to labels.

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
from distil_rank.codes.index import NEAREST, ROWS_AT_ONCE, CodeIndex
from distil_rank.codes.store import CodeStore
from distil_rank.data.mmseqs import COLUMNS, Alignments, mmseqs_search
from distil_rank.errors import InputError

TAIL = 0.002  # share of the decoys' scores that the tail is fitted to
LEAST = 200  # scores in the tail, as far as there are any
SAMPLED_TARGETS = 20_000  # that decoys are compared with
BLOCK = 256  # of queries that are searched at once
SURE = 0.001  # E-value of alignments whose targets join the query


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


def evidence(cosine: np.ndarray | None, background: np.ndarray, evalue: np.ndarray | None, targets: int) -> np.ndarray:
    """How surprising pairs are if they are not related, in nats; what was not found (NaN) is no surprise.

    Of a code it is `−ln P(Z > z)` of a normal Z: Fisher's transform `artanh` makes cosines of unrelated vectors normal
    (Biometrika 10, 1915), here with the `CodeIndex.background` of the query. (The tail of decoys is heavier: to count
    it would leave codes too little.) Of an alignment it is `−ln(E / targets)` (Karlin and Altschul, PNAS 87, 1990).

    >>> evidence(np.array([0.0, 0.3]), np.array([0.0, 0.1]), np.array([np.nan, 1.0]), 100).round(1).tolist()
    [0.7, 11.5]
    """
    parts = []
    if cosine is not None:
        parts.append(-log_ndtr((background[0] - np.arctanh(cosine.clip(-NEAREST, NEAREST))) / background[1]))
    if evalue is not None:
        parts.append(-np.log(np.clip(np.nan_to_num(evalue, nan=np.inf) / targets, 1e-300, 1)))
    return np.sum(parts, axis=0)


def with_relatives(queries: Tensor, alignments: Alignments, index: CodeIndex, own: bool = False) -> Tensor:
    """Queries `(Q, r)`, each joined by the mean code of the targets that it is surely aligned with; of unit length.

    What relatives have in common is what tells the remote ones (average query expansion: Chum et al., ICCV 2007).
    """
    sure = np.flatnonzero((alignments.column("evalue") <= SURE) & ~(own & (alignments.query == alignments.target)))
    total = torch.zeros_like(queries)
    for part in np.array_split(sure, 1 + len(sure) // ROWS_AT_ONCE):
        total.index_add_(0, torch.from_numpy(alignments.query[part]), index.decoded(alignments.target[part]))
    count = np.bincount(alignments.query[sure], minlength=len(queries)).clip(min=1)
    return F.normalize(queries + total / torch.from_numpy(count)[:, None], dim=1)


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
        return targets * np.maximum(share, 1 / self.count)


def decoys_of(
    store: CodeStore, index: CodeIndex, count: int, folder: Path, databases: Path | None, own: bool, seed: int = 0
) -> DecoyScores:
    """The scores that so many reversed proteins of the store reach among its codes.

    Read from its end a sequence has the same composition, repeats and low complexity, and no relative; its own original
    does not count as found, for that composition. With `databases`, alignments count beside the codes; `own` says that
    queries are codes as well.
    """
    dice, encoder = np.random.default_rng(seed), store.encoder
    chosen = np.sort(dice.permutation(len(store))[:count])
    backwards = [text[::-1] for text in store.proteins.take(chosen)["sequence"].to_pylist()]
    vectors, alignments = vectors_like(backwards, store, folder, "decoys"), None
    queries = F.normalize(encoder.decode(encoder.encode(vectors)), dim=1) if own else encoder(vectors)
    if databases is not None:
        alignments = mmseqs_search(backwards, store.sequences, databases, keep=True, profiles=True)
    rows = np.sort(dice.permutation(len(store))[:SAMPLED_TARGETS])
    return DecoyScores.of(decoy_evidence(queries, chosen, index, alignments, rows))


def decoy_evidence(
    queries: Tensor, originals: np.ndarray, index: CodeIndex, alignments: Alignments | None, rows: np.ndarray
) -> np.ndarray:
    """The evidence of decoys `(D, r)` with the targets `rows`, sorted, `(D, R)`; 0 with their own `originals`.

    Cosines of reversed proteins spread a little wider than those of proteins. In units of that they would look less
    surprising, and E-values be too low: the spread of a decoy is at most the median of their originals' codes.
    """
    others, evalue = originals[:, None] != rows, None
    if alignments is not None:
        queries = with_relatives(queries, alignments, index)
        seen, evalue = np.isin(alignments.target, rows), np.full(others.shape, np.nan)
        places = alignments.query[seen], np.searchsorted(rows, alignments.target[seen])
        evalue[places] = alignments.column("evalue")[seen]
    background = index.background(queries)[:, :, None]
    background[1] = background[1].clip(max=np.median(index.background(index.decoded(originals))[1]))
    cosine = (queries @ index.decoded(rows).T).numpy()
    return np.where(others, evidence(cosine, background, evalue, len(index.codes)), 0.0)


@dataclass(frozen=True)
class Engines:
    """What is searched with: codes, alignments made beforehand, or both.

    Attributes:
        targets: that are searched.
        index: the codes; None without them.
        alignments: of the queries with the targets; None without them.
        decoys: what E-values come from; without codes they are MMseqs2's own.
        own: whether the queries are the targets, which then do not find themselves.
    """

    targets: int
    index: CodeIndex | None
    alignments: Alignments | None
    decoys: DecoyScores | None = None
    own: bool = False

    @property
    def least(self) -> float:
        """The least E-value that decoys can tell; 0 where none come from them."""
        return 0.0 if self.decoys is None else self.targets / self.decoys.count

    def search(self, queries: Tensor | None, count: int, k: int) -> Iterator[Hits]:
        """The k best hits of `count` queries, a block at a time; with codes queries are `(count, r)`."""
        for start in range(0, count, BLOCK):
            rows = np.arange(start, min(start + BLOCK, count))
            block = None if queries is None else queries[start : start + BLOCK]
            yield self._hits(rows, block, k)

    def _hits(self, rows: np.ndarray, queries: Tensor | None, k: int) -> Hits:
        """The k best of consecutive queries: whatever is aligned, and the k nearest codes, hold them all."""
        first, targets = rows[0], self.targets
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
        alignment, cosine, background = np.full((len(pairs), len(COLUMNS)), np.nan), None, np.empty(0)
        if self.alignments is not None and len(aligned):
            place = np.searchsorted(aligned, pairs).clip(max=len(aligned) - 1)
            found = aligned[place] == pairs
            alignment[found] = self.alignments.columns[low + place[found]]
        if self.index is not None and queries is not None:
            cosine = self.index.scores(queries, query, target)
            background = self.index.background(queries)[:, query]
        evalue = alignment[:, COLUMNS.index("evalue")]
        score = evidence(cosine, background, None if self.alignments is None else evalue, targets)
        if self.index is not None:
            evalue = np.full(len(pairs), np.nan) if self.decoys is None else self.decoys.evalues(score, targets)
        cosine = np.full(len(pairs), np.nan) if cosine is None else cosine
        hits = Hits(query + first, target, alignment, cosine, score, np.zeros(len(pairs), int), evalue)
        return hits.where(np.lexsort([-score, query])).best(k)
