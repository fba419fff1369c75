"""Sequences to vectors in memory: batches without padding, windows for long proteins, halving when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.backbones import Backbone
from distil_rank.esm2 import FusedEncoder, tokenise

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "bos", "residue"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OVERLAP = 4  # windows share a quarter of their length, so that each residue has context on both sides in one of them


@dataclass(frozen=True)
class _Piece:
    """A stretch of a sequence that goes through the model at once."""

    owner: int
    start: int
    text: str


class Embedder:
    """Embeds sequences with one backbone on one device.

    Args:
        backbone: The model.
        pooling: `mean` over residues (without BOS and EOS), `bos`, or `residue` for one vector each.
        precision: `fp32` or `bf16`, of weights and activations; pooling sums in fp32.
        device: Where to compute.
        layer: Whose hidden states; the last by default.
        window: Residues that go through the model at once; longer sequences go in overlapping windows, and a residue
            in several of them gets their mean. None: whole sequences, whatever their length.
        max_tokens: Tokens that go through the model at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: Pooling = "mean",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        layer: int | None = None,
        window: int | None = None,
        max_tokens: int = 4096,
    ):
        self.encoder = FusedEncoder(backbone.model, DTYPES[precision], device, layer)
        self.alphabet = backbone.alphabet
        self.dim = backbone.dim
        self.pooling = pooling
        self.window = window
        self.max_tokens = max_tokens

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Groups sequences of similar length, each group within `max_tokens` where it has more than one.

        Long ones come first, so that memory runs short at the start if at all.

        Args:
            lengths: Residues of each sequence.

        Returns:
            Indices into `lengths`.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        groups: list[list[int]] = []
        room = 0
        for i in order:
            tokens = lengths[i] + 2
            if tokens > room:
                groups.append([])
                room = self.max_tokens
            groups[-1].append(i)
            room -= tokens
        return groups

    def embed(self, sequences: Sequence[str]) -> list[Tensor | None]:
        """Embeds sequences.

        Args:
            sequences: Cleaned amino acids.

        Returns:
            For each (1, dim), or (residues, dim) for `pooling="residue"`, float32 on the device; None for a sequence
            that does not fit into memory even alone.
        """
        pieces = [piece for owner, text in enumerate(sequences) for piece in self._pieces(owner, text)]
        results: list[Tensor | None] = [
            torch.zeros(len(text) if self.pooling == "residue" else 1, self.dim, device=self.encoder.device)
            for text in sequences
        ]
        weights = [self._weights(text) for text in sequences]
        for group in self.batches([len(piece.text) for piece in pieces]):
            self._add([pieces[i] for i in group], weights, results)
        return results

    def _pieces(self, owner: int, text: str) -> Iterable[_Piece]:
        return (_Piece(owner, start, text[start:stop]) for start, stop in windows(len(text), self.window))

    def _weights(self, text: str) -> Tensor:
        """What each residue counts in one of its windows: its share of the sum that makes the result, (L,)."""
        counts = torch.zeros(len(text))
        extents = windows(len(text), self.window)
        for start, stop in extents:
            counts[start:stop] += 1
        if self.pooling == "residue":
            return 1 / counts
        return 1 / (counts * len(text)) if self.pooling == "mean" else torch.full((1,), 1 / len(extents))

    def _add(self, pieces: list[_Piece], weights: list[Tensor], results: list[Tensor | None]) -> None:
        """Adds what these pieces contribute to their sequences' results."""
        pieces = [piece for piece in pieces if results[piece.owner] is not None]
        if not pieces:
            return
        try:
            contributions = self._contributions(pieces, weights)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            for piece, contribution in zip(pieces, contributions, strict=True):
                result = results[piece.owner]
                assert result is not None
                start = piece.start if self.pooling == "residue" else 0
                result[start : start + len(contribution)] += contribution
            return
        # Outside the handler, where the failed attempt's tensors are free.
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pieces) == 1:
            logger.warning("skipped a sequence: %s residues do not fit into memory", f"{len(pieces[0].text):,}")
            results[pieces[0].owner] = None
            return
        tokens = sum(len(piece.text) + 2 for piece in pieces)
        if tokens // 2 < self.max_tokens:
            self.max_tokens = tokens // 2
            logger.warning("out of memory with %s tokens at once; going on with half of them", f"{tokens:,}")
        self._add(pieces[: len(pieces) // 2], weights, results)
        self._add(pieces[len(pieces) // 2 :], weights, results)

    @torch.inference_mode()
    def _contributions(self, pieces: list[_Piece], weights: list[Tensor]) -> list[Tensor]:
        tokens, lengths = tokenise([piece.text for piece in pieces], self.alphabet)
        hidden = self.encoder(tokens, lengths)  # (T, dim)
        bounds = np.cumsum([0, *lengths]).tolist()
        if self.pooling == "bos":
            return [
                hidden[start : start + 1].float() * weights[piece.owner][0].item()
                for piece, start in zip(pieces, bounds, strict=False)
            ]
        per_token = torch.cat(
            [F.pad(weights[piece.owner][piece.start : piece.start + len(piece.text)], (1, 1)) for piece in pieces]
        )
        weighted = hidden.float() * per_token.to(hidden.device)[:, None]
        if self.pooling == "residue":
            return [weighted[start + 1 : start + length - 1] for start, length in zip(bounds, lengths, strict=False)]
        sizes = torch.tensor(lengths, device=hidden.device)
        return list(torch.segment_reduce(weighted, "sum", lengths=sizes, axis=0).split(1))


def windows(length: int, window: int | None) -> list[tuple[int, int]]:
    """Where the windows over a sequence begin and end; neighbours overlap by at least a quarter.

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


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
