"""Search among codes: faiss finds candidates for float queries, their exact scores order them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.codes.quantisers import BITS, import_faiss
from distil_rank.lowrank.encoder import CENTROIDS, CodeEncoder

log = logging.getLogger(__name__)

EXACT_BELOW = 200_000  # codes that are all looked at for every query; see docs/codes.md
RECALL = 0.95  # of a code's own exact neighbours that the inverted lists must reach
LISTS_PER_ROOT = 4  # inverted lists for √N codes
SAMPLE_PER_LIST = 40  # codes that the lists' centres are trained on
ROUNDS = 8  # of k-means
TRIALS = 256  # queries that the number of visited lists is chosen on
DEPTH = 10  # neighbours that recall is about
CANDIDATES = 4  # found for each one that is wanted, to be scored exactly
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Hits:
    """Neighbours of queries, best first.

    Attributes:
        scores: cosine of the float query and the decoded target, `(Q, k)` float32; −∞ where nothing more was found.
        rows: of the targets, `(Q, k)` int64; −1 there.
    """

    scores: np.ndarray
    rows: np.ndarray


class CodeIndex:
    """Codes, ready to be searched. Made by `build`.

    Attributes:
        encoder: what made the codes.
        codes: `(N, width)`.
        index: faiss's.
        lists: number of inverted lists; 0 where every code is looked at.
        visited: lists that are visited for each query.
        recall: measured share of the exact neighbours that are then found; 1 where every code is looked at.
    """

    def __init__(self, encoder: CodeEncoder, codes: np.ndarray, index: Any, centres: Any = None) -> None:
        self.encoder, self.codes, self.index = encoder, codes, index
        self._centres = centres
        self.lists = 0 if centres is None else centres.ntotal
        self.visited, self.recall = 0, 1.0

    @classmethod
    def build(cls, codes: np.ndarray, encoder: CodeEncoder, exact: bool | None = None, seed: int = 0) -> Self:
        """An index over codes.

        Args:
            codes: `(N, width)`, of this map.
            exact: whether every query looks at every code; by default up to `EXACT_BELOW` of them. Otherwise codes lie
                in inverted lists (Jégou, Douze and Schmid, TPAMI 2011), and as many are visited as `RECALL` takes.
            seed: of the lists' centres.

        Raises:
            InputError: faiss is missing.
        """
        faiss = import_faiss()
        codes = np.ascontiguousarray(codes)
        if exact or (exact is None and len(codes) <= EXACT_BELOW):
            flat = _flat_index(faiss, encoder)
            _fill(faiss, flat, _stored(codes, encoder))
            return cls(encoder, codes, flat)
        centres, assigned = _centres(faiss, codes, encoder, seed)
        inverted = _inverted_index(faiss, encoder, centres)
        stored, order = _stored(codes, encoder), np.argsort(assigned, kind="stable")
        ends = np.searchsorted(assigned[order], np.arange(centres.ntotal + 1))
        for number in np.flatnonzero(np.diff(ends)):
            rows = order[ends[number] : ends[number + 1]]
            block = np.ascontiguousarray(stored[rows])
            inverted.invlists.add_entries(int(number), len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(block))
        inverted.ntotal = len(codes)
        found = cls(encoder, codes, inverted, centres)
        found._choose_visited(seed)
        return found

    def search(self, queries: Tensor, k: int) -> Hits:
        """The k best targets of each query.

        Args:
            queries: `(Q, r)`, of unit length, as the code map gives them.
            k: at most so many; fewer where there are fewer codes.
        """
        k = min(k, len(self.codes))
        wanted = min(CANDIDATES * k, len(self.codes)) if self.encoder.dtype in ("int8", "pq") else k
        parts = [self._search(part, k, wanted) for part in queries.split(QUERIES_AT_ONCE)]
        return Hits(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _search(self, queries: Tensor, k: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._candidates(queries, wanted)
        targets = torch.from_numpy(self.codes[rows.clip(0)])  # (Q, wanted, width)
        decoded = F.normalize(self.encoder.decode(targets.flatten(0, 1)), dim=1).unflatten(0, rows.shape)
        scores = torch.einsum("qr,qkr->qk", queries, decoded).numpy()
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _candidates(self, queries: Tensor, wanted: int) -> np.ndarray:
        ready = _filled(queries, self.encoder)
        if self._centres is None:
            return self.index.search(ready, wanted)[1]
        near, lists = self._centres.search(ready, self.index.nprobe)
        return self.index.search_preassigned(ready, wanted, lists, near)[1]

    def _choose_visited(self, seed: int) -> None:
        """Visit as few lists as find `RECALL` of the exact neighbours of some of the codes."""
        chosen = np.random.default_rng(seed).permutation(len(self.codes))[:TRIALS]
        queries = F.normalize(self.encoder.decode(torch.from_numpy(self.codes[chosen])), dim=1)
        self.index.nprobe = self.lists
        exact = self.search(queries, DEPTH).scores
        self.index.nprobe = 1
        while True:
            found = self.search(queries, DEPTH).scores
            # by score, since codes may be equal
            self.recall = float((found >= exact[:, -1:] - 1e-6).mean())
            self.visited = self.index.nprobe
            if self.recall >= RECALL or self.visited >= self.lists:
                break
            self.index.nprobe = min(2 * self.visited, self.lists)
        log.info("Inverted lists: %s, of which %s are visited: recall %.3f", self.lists, self.visited, self.recall)


def _filled(rows: Tensor, encoder: CodeEncoder) -> np.ndarray:
    """Rows `(N, r)` with zeros behind them where signs are stored, up to whole bytes."""
    return F.pad(rows, (0, -encoder.rank % BITS if encoder.dtype == "bit" else 0)).contiguous().numpy()


def _stored(codes: np.ndarray, encoder: CodeEncoder) -> np.ndarray:
    """Codes as the bytes that faiss keeps of them, `(N, bytes)` uint8."""
    if encoder.dtype == "int8":
        return (codes.astype(np.int16) + 128).astype(np.uint8)
    return codes.view(np.uint8) if encoder.dtype == "float32" else codes


def _byte_codebooks(encoder: CodeEncoder) -> Tensor:
    """What each value of each byte stands for, `(M, 256, block)`: eight signs are a centroid like any other."""
    if encoder.codebooks is not None:
        return encoder.codebooks
    assert encoder.scale is not None
    bits = torch.arange(CENTROIDS)[:, None].bitwise_right_shift(torch.arange(BITS)) & 1  # (256, 8)
    scale = F.pad(encoder.scale, (0, -encoder.rank % BITS)).unflatten(0, (-1, BITS))  # (M, 8)
    return (bits.float() * 2 - 1) * scale[:, None]


def _quantiser(index: Any, faiss: Any, encoder: CodeEncoder) -> None:
    faiss.copy_array_to_vector(_byte_codebooks(encoder).numpy().ravel(), index.pq.centroids)
    index.is_trained = True


def _int8_scales(index: Any, faiss: Any, encoder: CodeEncoder) -> None:
    """Give faiss the scales, as the ranges from which it decodes a byte `c`: `low + range · (c + 0.5) / 255`.

    Its type for plain signed bytes would store none, but rounds queries to integers where the processor has AVX2 and
    no AVX-512 and the rank is a multiple of 16 (seen in faiss 1.15.1).
    """
    assert encoder.scale is not None
    ranges = torch.cat([-128.5 * encoder.scale, 255 * encoder.scale])
    faiss.copy_array_to_vector(ranges.float().numpy(), index.sq.trained)
    index.is_trained = True


def _flat_index(faiss: Any, encoder: CodeEncoder) -> Any:
    rank = encoder.rank
    if encoder.dtype == "float32":
        return faiss.IndexFlatIP(rank)
    if encoder.dtype == "int8":
        index = faiss.IndexScalarQuantizer(rank, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        _int8_scales(index, faiss, encoder)
        return index
    books, _, block = _byte_codebooks(encoder).shape
    # by distance: of centroids that fall short of the unit sphere it is nearer to the cosine than the inner product
    index = faiss.IndexPQ(books * block, books, BITS, faiss.METRIC_L2)
    _quantiser(index, faiss, encoder)
    return index


def _inverted_index(faiss: Any, encoder: CodeEncoder, centres: Any) -> Any:
    rank, lists = encoder.rank, centres.ntotal
    if encoder.dtype == "float32":
        index = faiss.IndexIVFFlat(centres, rank, lists, faiss.METRIC_INNER_PRODUCT)
    elif encoder.dtype == "int8":
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(centres, rank, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        _int8_scales(index, faiss, encoder)
    else:
        books, _, block = _byte_codebooks(encoder).shape
        index = faiss.IndexIVFPQ(centres, books * block, lists, books, BITS, faiss.METRIC_L2)
        index.by_residual = False
        _quantiser(index, faiss, encoder)
    index.is_trained = True
    return index


def _fill(faiss: Any, index: Any, stored: np.ndarray) -> None:
    faiss.copy_array_to_vector(np.ascontiguousarray(stored).ravel(), index.codes)
    index.ntotal = len(stored)


def _centres(faiss: Any, codes: np.ndarray, encoder: CodeEncoder, seed: int) -> tuple[Any, np.ndarray]:
    """Centres of inverted lists by spherical k-means on decoded codes, and the list of each code, `(N,)`."""

    def decoded(rows: np.ndarray | slice) -> np.ndarray:
        return _filled(F.normalize(encoder.decode(torch.from_numpy(codes[rows])), dim=1), encoder)

    lists = max(1, round(LISTS_PER_ROOT * len(codes) ** 0.5))
    chosen = np.random.default_rng(seed).permutation(len(codes))[: SAMPLE_PER_LIST * lists]
    sample = decoded(np.sort(chosen))
    dim = sample.shape[1]
    kmeans = faiss.Kmeans(dim, lists, niter=ROUNDS, spherical=True, seed=seed + 1, min_points_per_centroid=1)
    kmeans.train(sample)
    centres = faiss.IndexFlatIP(dim)
    centres.add(kmeans.centroids)
    size = 65_536
    parts = [centres.search(decoded(slice(start, start + size)), 1)[1][:, 0] for start in range(0, len(codes), size)]
    return centres, np.concatenate(parts)
