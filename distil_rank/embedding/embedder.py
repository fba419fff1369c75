"""Sequences to vectors in memory: batches without padding, windows for long proteins, halving when out of memory."""

import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.embedding.esm2 import WIDE
from distil_rank.embedding.gpu import AHEAD, GpuEncoder, Outbox, prepared
from distil_rank.embedding.model import Backbone, Encoder
from distil_rank.options.embed import Pooling

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAST, LEAST = 4, 4  # a batch has a quarter of the tokens that are left, but not less than a quarter of the most
RECOVERY = 8  # passes that fit into memory, after which twice as many tokens are tried; doubled when they do not fit
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


class _Pieces(NamedTuple):
    """Parts of sequences that each go through the model in one pass; arrays over them but the last two."""

    owner: NDArray[np.int64]  # the sequence
    start: NDArray[np.int64]  # in the joined text
    length: NDArray[np.int64]
    number: NDArray[np.int64]  # among those of its owner
    text: NDArray[np.uint8]  # of all sequences, joined
    weights: NDArray[np.float32]  # in a sum over pieces, of each residue of the text; of each sequence's BOS


class _Pass(NamedTuple):
    """Pieces as the model takes them together, on the host; E results, of pieces or residues, add to rows."""

    tokens: Tensor  # (T,)
    lengths: list[int]  # tokens of each piece
    places: tuple[Tensor, ...]  # what a `GpuEncoder` takes beside these
    weights: Tensor  # of the hidden states in a sum, (T, 1) for means, otherwise (E, 1)
    each: Tensor | None  # tokens of each piece, whose states are summed; None where states are taken one by one
    taken: Tensor | None  # which results, (E,), in which order; None: all
    rows: Tensor  # to which each adds, (E,)
    steps: list[int]  # how many add at once, no two of them to the same row

    def pinned(self) -> Self:
        """In memory that a GPU copies from by itself."""
        return type(self)(*map(_pinned, self))


def _pinned(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_pinned, part))
    return part.pin_memory() if isinstance(part, Tensor) else part


class _Job(NamedTuple):
    """Sequences that are ready for the device: their pieces, and groups of these with what each is packed as."""

    counts: list[int]  # of the vectors of each sequence
    pieces: _Pieces
    passes: Iterable[tuple[NDArray[np.int64], _Pass]]


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
        self._most, self._passed, self._patience = max_tokens, 0, RECOVERY

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
                share = max(rest // LAST, self.max_tokens // LEAST) if tapered and self._narrow else self.max_tokens
                if isinstance(self.encoder, GpuEncoder):
                    share = ceil(rest / ceil(rest / self.max_tokens))  # no small rest, which would leave it idle
                free = min(share, self.max_tokens)
            groups[-1].append(i)
            free -= tokens
            rest -= tokens
        return groups

    def embed(self, sequences: Sequence[str]) -> Embedded:
        """Embeds sequences of cleaned amino acids."""
        return self._run(self._job(sequences))

    def _job(self, sequences: Sequence[str]) -> _Job:
        """Cuts sequences into pieces; these are packed when they are asked for."""
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        first = lengths.cumsum() - lengths
        owner, start, length, number = np.arange(len(lengths)), first, lengths, np.zeros_like(lengths)
        cover, pieces_of = np.ones(lengths.sum(), np.float32), np.ones(len(lengths), np.float32)
        if self.window is not None and lengths.max(initial=0) > self.window:
            extents = [
                (sequence, begin, end - begin, number)
                for sequence, residues in enumerate(lengths.tolist())
                for number, (begin, end) in enumerate(windows(residues, self.window))
            ]
            owner, start, length, number = np.array(extents).T
            start = start + first[owner]
            starts, stops = (np.bincount(at, minlength=len(cover) + 1) for at in (start, start + length))
            cover = (starts - stops)[:-1].cumsum().astype(np.float32)
            pieces_of = np.bincount(owner).astype(np.float32)
        if self.pooling == "mean":
            cover *= lengths.astype(np.float32).repeat(lengths)
        weights = np.reciprocal(pieces_of if self.pooling == "bos" else cover)
        text = np.frombuffer("".join(sequences).encode(), np.uint8)
        pieces = _Pieces(owner, start, length, number, text, weights)
        groups = map(np.array, self.batches(length.tolist(), tapered=False))
        counts = lengths.tolist() if self.pooling == "residue" else [1] * len(lengths)
        return _Job(counts, pieces, ((group, self._packed(pieces, group)) for group in groups))

    def _packed(self, pieces: _Pieces, group: NDArray[np.int64]) -> _Pass:
        """Some pieces as the model takes them, each between its special tokens."""
        owner, start, length, number = (column[group] for column in pieces[:4])
        before, after = self.tokens.before, self.tokens.after
        tokens_of = length + self.tokens.specials
        ends = tokens_of.cumsum()
        begins = ends - tokens_of
        tokens, inner = np.empty(ends[-1], np.int64), np.ones(ends[-1], bool)
        for i, token in enumerate(before):
            tokens[begins + i], inner[begins + i] = token, False
        for i, token in enumerate(after, start=-len(after)):
            tokens[ends + i], inner[ends + i] = token, False
        residues = (np.arange(len(inner)) + np.repeat(start - begins - len(before), tokens_of))[inner]  # in the text
        tokens[inner] = self.tokens.table[pieces.text[residues]]

        each = taken = None
        rows, weights = owner, pieces.weights[owner if self.pooling == "bos" else residues]
        if self.pooling == "mean":
            each, weights = torch.from_numpy(tokens_of), np.zeros(len(inner), np.float32)
            weights[inner] = pieces.weights[residues]
        elif self.pooling == "bos":
            taken = begins
        else:
            rows, taken, number = residues, inner.nonzero()[0], number.repeat(length)
        steps = [len(rows)]
        if number.any():  # overlapping windows follow each other, so that their sum has one order
            order, steps = number.argsort(kind="stable"), [n for n in np.bincount(number).tolist() if n]
            rows, taken = rows[order], order if taken is None else taken[order]
            weights = weights if each is not None else weights[order]
        return _Pass(
            tokens=torch.from_numpy(tokens),
            lengths=(lengths := tokens_of.tolist()),
            places=self.encoder.placed(lengths) if isinstance(self.encoder, GpuEncoder) else (),
            weights=torch.from_numpy(weights)[:, None],
            each=each,
            taken=None if taken is None else torch.from_numpy(taken),
            rows=torch.from_numpy(rows),
            steps=steps,
        )

    @property
    def _narrow(self) -> bool:
        """Whether one core is enough for a batch; independent of their number, on which no vector may depend."""
        return self.encoder.device.type == "cpu" and self.dim < WIDE

    def stream(self, batches: Iterable[tuple[Name, list[str]]]) -> Iterator[tuple[Name, Embedded]]:
        """Embeds named batches and yields the vectors of each with its name, in order.

        On a CPU each core computes its own batch where the model is narrow, which avoids synchronising after every
        operation. A wide model's operations are large enough for all cores to share each. Batches are read ahead by at
        most the number of cores. The process no longer returns freed memory to the system from here on.

        On a GPU batches are read and packed in a thread, and the vectors of one are copied while it computes the next;
        they are on the CPU when they come.
        """
        if isinstance(self.encoder, GpuEncoder):
            yield from self._overlapped(batches, self.encoder.device)
            return
        threads = torch.get_num_threads() if self._narrow else 1  # batches at once
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

    def _overlapped(
        self, batches: Iterable[tuple[Name, list[str]]], device: torch.device
    ) -> Iterator[tuple[Name, Embedded]]:
        def prepare(batch: tuple[Name, list[str]]) -> tuple[Name, _Job]:
            job = self._job(batch[1])
            return batch[0], job._replace(passes=[(group, one.pinned()) for group, one in job.passes])

        outbox = Outbox(device)
        waiting: deque[tuple[Name, list[int], Callable[[], Tensor]]] = deque()
        for name, job in prepared(batches, prepare, device):
            result = self._run(job)
            waiting.append((name, result.counts, outbox.send(result.layers)))
            del result  # its memory is free as soon as it is copied
            if len(waiting) > AHEAD:
                first, counts, received = waiting.popleft()
                yield first, Embedded(received(), counts)
        yield from ((name, Embedded(received(), counts)) for name, counts, received in waiting)

    def _run(self, job: _Job) -> Embedded:
        """Computes what was prepared."""
        vectors = torch.zeros(len(self.layers), sum(job.counts), self.dim, device=self.encoder.device)
        skipped: set[int] = set()
        for group, one in job.passes:
            self._add(job.pieces, group, one, vectors, skipped)
        if not skipped:
            return Embedded(vectors, job.counts)
        fits = np.array([owner not in skipped for owner in range(len(job.counts))])
        rows = torch.from_numpy(fits.repeat(job.counts).nonzero()[0])
        return Embedded(vectors.index_select(1, rows.to(vectors.device)), (fits * job.counts).tolist())

    def _add(
        self, pieces: _Pieces, group: NDArray[np.int64], one: _Pass | None, vectors: Tensor, skipped: set[int]
    ) -> None:
        """Adds what a group of pieces gives, or its owners to those that do not fit into memory; packs what is None."""
        try:
            one = one or self._packed(pieces, group)
            parts, rows = self._pooled(one), self._moved(one.rows)
            for total, part in zip(vectors, parts, strict=True):
                for at, values in zip(rows.split(one.steps), part.split(one.steps), strict=True):
                    total.index_add_(0, at, values)
            self._passed += 1
            if self.max_tokens < self._most and self._passed % self._patience == 0:
                self.max_tokens = min(2 * self.max_tokens, self._most)
            return
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not full:
                raise
        # Outside the handler, where the tensors of the failed attempt are freed.
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(group) == 1:
            logger.warning("skipped a sequence: %s residues do not fit into memory", f"{pieces.length[group[0]]:,}")
            skipped.add(int(pieces.owner[group[0]]))
            return
        tokens = int(pieces.length[group].sum()) + self.tokens.specials * len(group)
        if tokens // 2 < self.max_tokens:
            self.max_tokens, self._passed, self._patience = tokens // 2, 0, 2 * self._patience
            logger.warning("out of memory with %s tokens at once; continuing with half of them", f"{tokens:,}")
        self._add(pieces, group[: len(group) // 2], None, vectors, skipped)
        self._add(pieces, group[len(group) // 2 :], None, vectors, skipped)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.encoder.device, non_blocking=True)

    @torch.no_grad()
    def _pooled(self, one: _Pass) -> list[Tensor]:
        """What a pass adds to the rows, (E, dim) for each layer."""
        weights = self._moved(one.weights)
        each, taken = (None if part is None else self._moved(part) for part in (one.each, one.taken))
        parts = []
        for number, hidden in enumerate(self.encoder.states(one.tokens, one.lengths, *one.places)):
            if number not in self.layers:
                continue
            states = self.encoder.normed(hidden) if number == self.encoder.depth else hidden
            if each is not None:  # unsafe: its check of the lengths would wait for the device
                sums = torch.segment_reduce(states * weights, "sum", lengths=each, axis=0, unsafe=True)
                parts.append(sums if taken is None else sums.index_select(0, taken))
            elif taken is not None:
                parts.append(states.index_select(0, taken) * weights)
        return parts


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
