"""Search among codes: faiss finds candidates for float queries, their exact scores order them."""

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder

log = logging.getLogger(__name__)

EXACT_BELOW = 200_000  # codes that are all looked at for every query; see docs/codes.md
RECALL = 0.95  # of a code's own exact neighbours that the inverted lists must reach
LISTS_PER_ROOT = 4  # inverted lists for √N codes
SAMPLE_PER_LIST = 40  # codes that the lists' centres are trained on
ROUNDS = 8  # of k-means
TRIALS = 256  # queries that the number of visited lists is chosen on
DEPTH = 10  # neighbours that recall is about
CANDIDATES = 4  # found for each one that is wanted, to be scored exactly, where faiss's own scores are rounded
NEAREST = 0.99  # cosines above it count as this: of two equal codes it would be infinite evidence
SAMPLE = 1000  # codes that tell what is usual of a query
DECILES = 2.5631  # standard deviations of a normal variable between its two outer deciles
QUERIES_AT_ONCE = 256
ROWS_AT_ONCE = 65_536  # of decoding


class CodeIndex:
    """Codes, ready to be searched.

    Args:
        codes: `(N, width)`, of this encoder.
        encoder: what made the codes.
        exact: whether every query looks at every code; by default up to `EXACT_BELOW` of them. Otherwise codes lie
            in inverted lists (Jégou, Douze and Schmid, TPAMI 2011), and as many are visited as `RECALL` takes.
        seed: of the lists' centres and of the sample.

    Attributes:
        lists: number of inverted lists; 0 where every code is looked at.
        visited: lists that are visited for each query.
        sample: some of the codes, decoded.
        recall: measured share of the exact neighbours that are then found; 1 where every code is looked at.
    """

    def __init__(self, codes: np.ndarray, encoder: CodeEncoder, exact: bool | None = None, seed: int = 0) -> None:
        faiss = import_faiss()
        self.codes, self.encoder = np.ascontiguousarray(codes), encoder
        self.visited, self.recall = 0, 1.0
        self.sample = self.decoded(np.sort(np.random.default_rng(seed).permutation(len(codes))[:SAMPLE]))
        inverted = not exact if exact is not None else len(codes) > EXACT_BELOW
        self.lists = max(1, round(LISTS_PER_ROOT * len(codes) ** 0.5)) if inverted else 0
        self.index = _empty_index(faiss, encoder, self._centres(faiss, seed) if inverted else None)
        for rows in self._decoded(np.arange(len(codes))):
            self.index.add(rows)
        if inverted:
            self._choose_visited(seed)

    def search(self, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best targets of queries `(Q, r)` of unit length, best first; fewer where there are fewer codes.

        Returns:
            Cosines of the float query and the decoded target, `(Q, k)` float32, and the rows of the targets, `(Q, k)`
            int64; −∞ and −1 where nothing more was found.
        """
        k = min(k, len(self.codes))
        wanted = min(CANDIDATES * k, len(self.codes)) if self.encoder.dtype == "int8" else k
        parts = []
        for part in queries.split(QUERIES_AT_ONCE):
            rows = self.index.search(_padded(part, self.encoder), wanted)[1]
            pairs = np.repeat(np.arange(len(part)), rows.shape[1]), rows.clip(0).ravel()
            scores = self.scores(part, *pairs).reshape(rows.shape)
            scores[rows < 0] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            parts.append((np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)))
        scores, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return scores, rows

    def decoded(self, rows: np.ndarray) -> Tensor:
        """What codes stand for, `(P, r)` of unit length."""
        return F.normalize(self.encoder.decode(torch.from_numpy(self.codes[rows])), dim=1)

    def scores(self, queries: Tensor, query: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Cosines of pairs, `(P,)`: rows of the queries `(Q, r)`, of unit length, and of the codes."""
        parts = [np.empty(0, np.float32)]
        for start in range(0, len(query), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            parts.append((queries[torch.from_numpy(query[part])] * self.decoded(target[part])).sum(1).numpy())
        return np.concatenate(parts)

    def background(self, queries: Tensor) -> np.ndarray:
        """What is usual of each query `(Q, r)`: centre and spread of artanh of its cosines with the sample, `(2, Q)`.

        From the median and the outer deciles, as a normal variable has them, which a few relatives do not change. The
        spread is at least that of random directions.
        """
        z = torch.atanh((queries @ self.sample.T).clamp(-NEAREST, NEAREST)).numpy()
        low, centre, high = np.quantile(z, (0.1, 0.5, 0.9), axis=1)
        return np.stack([centre, np.maximum((high - low) / DECILES, self.encoder.rank**-0.5)])

    def _decoded(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Decoded codes, some thousands at a time: a code of them is the very same code again."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = torch.from_numpy(self.codes[rows[start : start + ROWS_AT_ONCE]])  # a copy: a mapped one is read-only
            yield _padded(self.encoder.decode(part), self.encoder)

    def _centres(self, faiss: ModuleType, seed: int) -> Any:
        """Centres of inverted lists by spherical k-means on decoded codes."""
        chosen = np.random.default_rng(seed).permutation(len(self.codes))[: SAMPLE_PER_LIST * self.lists]
        sample = F.normalize(torch.from_numpy(np.concatenate(list(self._decoded(np.sort(chosen))))), dim=1).numpy()
        options = {"niter": ROUNDS, "spherical": True, "seed": seed + 1, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(sample.shape[1], self.lists, **options)
        kmeans.train(sample)
        centres = faiss.IndexFlatIP(sample.shape[1])
        centres.add(kmeans.centroids)
        return centres

    def _choose_visited(self, seed: int) -> None:
        """Visit as few lists as find `RECALL` of the exact neighbours of some of the codes."""
        chosen = np.random.default_rng(seed).permutation(len(self.codes))[:TRIALS]
        queries = self.decoded(chosen)
        self.index.nprobe = self.lists
        exact, _ = self.search(queries, DEPTH)
        self.visited = self.index.nprobe = 1
        # by score, since codes may be equal
        while (recall := float((self.search(queries, DEPTH)[0] >= exact[:, -1:] - 1e-6).mean())) < RECALL:
            if self.visited >= self.lists:
                break
            self.visited = self.index.nprobe = min(2 * self.visited, self.lists)
        self.recall = recall
        log.info("Inverted lists: %s, of which %s are visited: recall %.3f", self.lists, self.visited, self.recall)


def import_faiss() -> ModuleType:
    """faiss, an extra; `InputError` where it is not installed."""
    try:
        import faiss  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Expected faiss to search codes but it is missing; pip install faiss-cpu.") from error
    return faiss


def _padded(rows: Tensor, encoder: CodeEncoder) -> np.ndarray:
    """Rows `(N, r)` with zeros behind them where signs are stored, up to whole bytes."""
    return F.pad(rows, (0, -encoder.rank % 8 if encoder.dtype == "bit" else 0)).contiguous().numpy()


def _empty_index(faiss: Any, encoder: CodeEncoder, centres: Any) -> Any:
    """faiss's index for a type of code, trained; with centres, of inverted lists."""
    rank, inner = encoder.rank, faiss.METRIC_INNER_PRODUCT
    if encoder.dtype == "float32":
        index = faiss.IndexFlatIP(rank) if centres is None else faiss.IndexIVFFlat(centres, rank, centres.ntotal, inner)
    elif encoder.dtype == "int8":
        assert encoder.scale is not None
        kind = faiss.ScalarQuantizer.QT_8bit
        if centres is None:
            index = faiss.IndexScalarQuantizer(rank, kind, inner)
        else:
            index = faiss.IndexIVFScalarQuantizer(centres, rank, centres.ntotal, kind, inner, False)
        # Scales, as the ranges from which faiss decodes a byte `c`: `low + range · (c + 0.5) / 255`. Its type for plain
        # signed bytes would store none, but rounds queries to integers where the processor has AVX2 and no AVX-512 and
        # the rank is a multiple of 16 (seen in faiss 1.15.1).
        ranges = torch.cat([-128.5 * encoder.scale, 255 * encoder.scale])
        faiss.copy_array_to_vector(ranges.float().numpy(), index.sq.trained)
    else:
        # Eight signs are a centroid like any other. By distance: of centroids that fall short of the unit sphere it is
        # nearer to the cosine than the inner product.
        assert encoder.scale is not None
        bits = torch.arange(256)[:, None].bitwise_right_shift(torch.arange(8)) & 1  # (256, 8)
        scale = F.pad(encoder.scale, (0, -rank % 8)).unflatten(0, (-1, 8))  # (bytes, 8)
        centroids = (bits.float() * 2 - 1) * scale[:, None]  # (bytes, 256, 8)
        width = scale.numel()
        if centres is None:
            index = faiss.IndexPQ(width, len(scale), 8, faiss.METRIC_L2)
        else:
            index = faiss.IndexIVFPQ(centres, width, centres.ntotal, len(scale), 8, faiss.METRIC_L2)
            index.by_residual = False
        faiss.copy_array_to_vector(centroids.numpy().ravel(), index.pq.centroids)
    index.is_trained = True
    return index
