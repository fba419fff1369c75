"""Sequences to vectors in memory: batches without padding, windows for long proteins, halving when out of memory."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from distil_rank.embedding.backbone import Backbone, Encoder
from distil_rank.embedding.esm2 import WIDE
from distil_rank.options.embed import Pooling

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAST, LEAST = 4, 4  # a batch has a quarter of the tokens that are left, but not less than a quarter of the most
OVERLAP = 4  # windows overlap by a quarter of their length, so that each residue has context on both sides in one


# glibc's M_MMAP_THRESHOLD (at most 32), M_TRIM_THRESHOLD and M_TOP_PAD, in MiB
MALLOC_OPTIONS = {-3: 32, -1: 1024, -2: 64}

Name = TypeVar("Name")  # of a batch


@dataclass(frozen=True)
class Embedded:
    """The vectors of some sequences, concatenated."""

    layers: Tensor  # (layers, sum of counts, dim) float32, on the device that computed them
    counts: list[int]  # of the vectors of each sequence: 1, or its residues; 0 if it did not fit into memory

    @property
    def vectors(self) -> Tensor:
        """Those of the last of the layers, (sum of counts, dim)."""
        return self.layers[-1]


class _Piece(NamedTuple):
    """Part of a sequence that goes through the model in one pass."""

    owner: int
    text: str
    rows: slice  # of the result, to which it adds
    weights: Tensor  # of its residues, (L,), or of its BOS, (1,), in that sum


class Embedder:
    """Embeds sequences with one backbone on one device.

    Args:
        backbone: The model.
        pooling: `mean` over residues (without BOS and EOS), `bos`, or `residue` for one vector per residue.
        precision: `fp32` or `bf16`, of the matrix products; see `FusedEncoder`. Pooling sums in fp32.
        device: Where to compute.
        layers: Whose hidden states are pooled, ascending; the last layer's by default.
        window: Residues per pass; longer sequences are computed in overlapping windows, and a residue in several of
            them gets their mean. None: whole sequences, whatever their length.
        max_tokens: Tokens per pass.
        encoder: Another than `precision` names; up to the last of `layers`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: Pooling = "mean",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        layers: Sequence[int] | None = None,
        window: int | None = None,
        max_tokens: int = 2048,
        encoder: Encoder | None = None,
    ):
        self.layers = tuple(layers or [backbone.num_layers])
        self.encoder = encoder or backbone.encoder(DTYPES[precision], device, self.layers)
        self.tokens, self.dim = backbone.tokens, backbone.dim
        self.pooling, self.window, self.max_tokens = pooling, window, max_tokens

    def batches(self, lengths: Sequence[int], tapered: bool = True) -> list[list[int]]:
        """Groups sequences of similar length, each group within `max_tokens` where it has more than one.

        Long ones come first, so that running out of memory happens early.

        Args:
            lengths: Residues of each sequence, into which the result has indices.
            tapered: Where cores compute batches side by side, the last ones get smaller, so that no core waits long for
                the others.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        groups: list[list[int]] = []
        free, rest = 0, sum(lengths) + self.tokens.specials * len(lengths)
        for i in order:
            tokens = lengths[i] + self.tokens.specials
            if tokens > free:
                groups.append([])
                share = max(rest // LAST, self.max_tokens // LEAST)
                free = min(share, self.max_tokens) if tapered and self._narrow else self.max_tokens
            groups[-1].append(i)
            free -= tokens
            rest -= tokens
        return groups

    def embed(self, sequences: Sequence[str]) -> Embedded:
        """Embeds sequences of cleaned amino acids."""
        per_residue = self.pooling == "residue"
        counts = [len(text) if per_residue else 1 for text in sequences]
        pieces = []
        for owner, (text, first) in enumerate(zip(sequences, np.cumsum([0, *counts[:-1]]).tolist(), strict=False)):
            extents = windows(len(text), self.window)
            covered = torch.zeros(len(text))
            for start, stop in extents:
                covered[start:stop] += 1
            weights = 1 / (covered if per_residue else covered * len(text))
            for start, stop in extents:
                rows = slice(first + start, first + stop) if per_residue else slice(first, first + 1)
                own = torch.full((1,), 1 / len(extents)) if self.pooling == "bos" else weights[start:stop]
                pieces.append(_Piece(owner, text[start:stop], rows, own))
        vectors = torch.zeros(len(self.layers), sum(counts), self.dim, device=self.encoder.device)
        skipped: set[int] = set()
        for group in self.batches([len(piece.text) for piece in pieces], tapered=False):
            self._add([pieces[i] for i in group], vectors, skipped)
        if not skipped:
            return Embedded(vectors, counts)
        fits = np.array([owner not in skipped for owner in range(len(counts))])
        return Embedded(vectors[:, torch.from_numpy(fits.repeat(counts))], (fits * counts).tolist())

    @property
    def _narrow(self) -> bool:
        """Whether one core is enough for a batch; independent of their number, on which no vector may depend."""
        return self.encoder.device.type == "cpu" and self.dim < WIDE

    @property
    def parallel_batches(self) -> int:
        """Batches that `stream` computes at once."""
        return torch.get_num_threads() if self._narrow else 1

    def stream(self, batches: Iterable[tuple[Name, list[str]]]) -> Iterator[tuple[Name, Embedded]]:
        """Embeds named batches and yields the vectors of each with its name, in order.

        On a CPU each core computes its own batch where the model is narrow, which avoids synchronising after every
        operation. A wide model's operations are large enough for all cores to share each. A GPU computes one batch
        after the other. Batches are read ahead by at most the number of cores. On a CPU the process no longer returns
        freed memory to the system from here on.
        """
        threads = self.parallel_batches
        if self.encoder.device.type == "cpu":
            keep_freed_memory()
        if threads == 1:
            yield from ((name, self.embed(texts)) for name, texts in batches)
            return
        waiting: deque[tuple[Name, Future[Embedded]]] = deque()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for name, texts in batches:
                    waiting.append((name, pool.submit(self.embed, texts)))
                    if len(waiting) > threads:
                        first, future = waiting.popleft()
                        yield first, future.result()
                yield from ((name, future.result()) for name, future in waiting)
        finally:
            torch.set_num_threads(threads)

    def _add(self, pieces: list[_Piece], vectors: Tensor, skipped: set[int]) -> None:
        """Adds these pieces' contributions to the vectors, or their owners to those that do not fit into memory."""
        pieces = [piece for piece in pieces if piece.owner not in skipped]
        if not pieces:
            return
        try:
            contributions = self._contributions(pieces)
            sizes = [piece.rows.stop - piece.rows.start for piece in pieces]
            for piece, part in zip(pieces, contributions.split(sizes, dim=1), strict=True):
                vectors[:, piece.rows] += part
            return
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not full:
                raise
        # Outside the handler, where the tensors of the failed attempt are freed.
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pieces) == 1:
            logger.warning("skipped a sequence: %s residues do not fit into memory", f"{len(pieces[0].text):,}")
            skipped.add(pieces[0].owner)
            return
        tokens = sum(len(piece.text) + self.tokens.specials for piece in pieces)
        if tokens // 2 < self.max_tokens:
            self.max_tokens = tokens // 2
            logger.warning("out of memory with %s tokens at once; continuing with half of them", f"{tokens:,}")
        self._add(pieces[: len(pieces) // 2], vectors, skipped)
        self._add(pieces[len(pieces) // 2 :], vectors, skipped)

    @torch.no_grad()
    def _contributions(self, pieces: list[_Piece]) -> Tensor:
        """What pieces add to their rows, one after the other, (layers, rows, dim)."""
        tokens, lengths = self.tokens.pack([piece.text for piece in pieces])
        starts, device = np.cumsum([0, *lengths[:-1]]), self.encoder.device
        first, after = len(self.tokens.before), len(self.tokens.after)
        extents = zip(starts, lengths, strict=True)
        residues = [np.arange(start + first, start + length - after) for start, length in extents]
        taken = torch.from_numpy(starts if self.pooling == "bos" else np.concatenate(residues)).to(device)
        weights = torch.cat([piece.weights for piece in pieces]).to(device)[:, None]
        each = torch.tensor([len(piece.text) for piece in pieces], device=device)
        parts = []
        for number, hidden in enumerate(self.encoder.states(tokens, lengths)):
            if number in self.layers:
                weighted = (self.encoder.normed(hidden) if number == self.encoder.depth else hidden)[taken] * weights
                mean = self.pooling == "mean"
                parts.append(torch.segment_reduce(weighted, "sum", lengths=each, axis=0) if mean else weighted)
        return torch.stack(parts)


def windows(length: int, window: int | None) -> list[tuple[int, int]]:
    """Start and end of the windows over a sequence; neighbours overlap by at least a quarter.

    >>> windows(10, None), windows(10, 8)
    ([(0, 10)], [(0, 8), (2, 10)])
    >>> windows(20, 8)
    [(0, 8), (6, 14), (12, 20)]
    """
    if window is None or length <= window:
        return [(0, length)]
    step = max(window - window // OVERLAP, 1)
    number = -(-(length - window) // step) + 1
    starts = [round(i * (length - window) / (number - 1)) for i in range(number)]
    return [(start, start + window) for start in starts]


@cache
def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones, instead of returning it after every batch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, mebibytes in MALLOC_OPTIONS.items():
            mallopt(option, mebibytes << 20)
