"""ESM-2's encoder with its matrix products in int8; everything between them stays in float32.

Exact remain the norms, rotations, attention, GELU, the residual stream, and what `int8_weights` leaves exact. Each
thread's rows go through the products in large blocks, and what is between two of them in pieces that fit its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.embedding.esm2 import KEYS, WIDE, Affine, FusedEncoder, attend_sequentially, rotated
from distil_rank.embedding.int8_linear import (
    ZERO_POINT,
    Int8Linear,
    Rounded,
    round_positive_rows,
    round_rows,
)
from distil_rank.embedding.int8_weights import Int8Weights

HEADS = 5  # of a sequence, at once in one thread
BLOCK = 640  # rows of a product at most
PIECE = 64 * 5120  # numbers that go through the activation at once: 1.3 MB


class _Int8Layer(NamedTuple):
    """The parameters of one layer; each norm's scale is what migrates its outputs."""

    norm1: Affine
    qk: Affine | None  # queries and keys, where they are exact
    qkv: Int8Linear | None  # of values alone, where they are; None in the first layer, which is a table
    qk_bias: Tensor
    out: Int8Linear
    out_bias: Tensor
    norm2: Affine
    fc1: Int8Linear
    fc1_bias: Tensor
    raised: Affine  # migrates GELU's outputs: scale and shift
    fc2: Int8Linear
    fc2_bias: Tensor

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> _Int8Layer:
        """Brings a layer of `Int8Weights` into the kernels' order."""

        def product(name: str, zero_point: int = ZERO_POINT) -> Int8Linear:
            return Int8Linear(weights[f"{name}.weight"], weights[f"{name}.scales"], zero_point)

        no_shift = torch.zeros_like(weights["norm1"])
        return cls(
            norm1=(weights["norm1"], no_shift),
            qk=(weights["qk.weight"], weights["qk.bias"]) if "qk.weight" in weights else None,
            qkv=product("qkv") if "qkv.weight" in weights else None,
            qk_bias=weights["qk.bias"],
            out=product("out"),
            out_bias=weights["out.bias"],
            norm2=(weights["norm2"], no_shift),
            fc1=product("fc1"),
            fc1_bias=weights["fc1.bias"],
            raised=(weights["raised.scale"], weights["raised.shift"]),
            fc2=product("fc2", zero_point=0),
            fc2_bias=weights["fc2.bias"],
        )


class Int8Encoder(FusedEncoder):
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference on a CPU with int8 units.

    Args:
        weights: Of its layers, none of which is kept as it comes.
    """

    def __init__(self, weights: Int8Weights):
        self.layer, self.dtype, self.device = len(weights.layers), torch.int8, torch.device("cpu")
        self.bos_only_after = None
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1  # of the pool, or the caller's own
        self._assemble(weights.parts, [_Int8Layer.of(layer) for layer in weights.layers])

    @torch.no_grad()
    def states(self, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """As in `FusedEncoder`; a wide model's threads share the rows and sequences of a pass."""
        threads = torch.get_num_threads()
        if threads == 1 or len(self.embedding[0]) < WIDE:
            yield from super().states(tokens, lengths)
            return
        torch.set_num_threads(1)  # of each operation; a pass has as many operations at once as there are threads
        try:
            self._threads = threads
            with ThreadPoolExecutor(threads) as self._pool:
                yield from super().states(tokens, lengths)
        finally:
            self._pool, self._threads = None, 1
            torch.set_num_threads(threads)

    def _each(self, function: Callable[[Any], object], parts: Sequence[Any]) -> None:
        """Applies a function to parts of a pass, which do not depend on one another."""
        if self._pool is None:
            for part in parts:
                function(part)
        else:
            mode = partial(_in_mode, function, torch.is_inference_mode_enabled())
            list(self._pool.map(mode, parts))

    def _blocks(self, total: int) -> list[slice]:
        """Equally many for every thread, of equal size as far as rows go in 16."""
        number = self._threads * ceil(total / (self._threads * BLOCK))
        return _slices(total, 16 * ceil(total / (16 * number)))

    def _apply(self, layer: Any, x: Tensor, projected: Any, rotations: Tensor, lengths: list[int]) -> None:
        qk, v = self._project_in_blocks(x, layer) if projected is None else projected
        attended = self._attend(qk, v, rotations, lengths)

        def finish(rows: slice) -> None:
            values, scales = round_rows(attended[rows])
            x[rows].addcmul_(layer.out(values), scales).add_(layer.out_bias)
            self._feed_forward(x[rows], layer)

        self._each(finish, self._blocks(len(x)))

    def _attend(self, qk: Tensor, v: Tensor, rotations: Tensor, lengths: list[int]) -> Tensor:
        if self._pool is None:
            return super()._attend(qk, v, rotations, lengths)
        heads = qk.unflatten(-1, (2 * self.heads, -1))
        self._each(lambda rows: rotated(heads[rows], rotations[rows]), self._blocks(len(qk)))
        q, k = heads.chunk(2, dim=1)
        values = v.unflatten(-1, (self.heads, -1))
        attended = torch.empty_like(values)

        def one(part: tuple[int, int, int]) -> None:
            start, stop, head = part
            rows, some = slice(start, stop + KEYS), slice(head, head + HEADS)  # with the keys that complete its own
            result = attend_sequentially(q[rows, some], k[rows, some], values[rows, some], [stop - start])
            attended[start:stop, some] = result[: stop - start]

        ends = np.cumsum([0, *lengths]).tolist()
        parts = [(*extent, head) for extent in pairwise(ends) for head in range(0, self.heads, HEADS)]
        self._each(one, parts)
        return attended.flatten(1)

    def _project_in_blocks(self, x: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        width = x.shape[1]
        qk, v = x.new_empty(len(x), 2 * width), torch.empty_like(x)

        def project(rows: slice) -> None:
            normed = self._norm(x[rows], layer.norm1)
            values, scales = round_rows(normed)
            product = layer.qkv(values)
            torch.mul(product[:, -width:], scales, out=v[rows])
            if layer.qk is None:
                torch.addcmul(layer.qk_bias, product[:, : 2 * width], scales, out=qk[rows])
            else:
                qk[rows] = F.linear(normed, *layer.qk)

        self._each(project, self._blocks(len(x)))
        return qk, v

    def _feed_forward(self, x: Tensor, layer: Any) -> Tensor:
        values, scales = round_rows(self._norm(x, layer.norm2))
        inner = layer.fc1(values)
        pieces = _slices(len(x), max(PIECE // inner.shape[1], 1))
        rounded = [_activated(inner[rows], scales[rows], layer) for rows in pieces]
        values, scales = (torch.cat(parts) for parts in zip(*rounded, strict=True))
        return x.addcmul_(layer.fc2(values), scales).add_(layer.fc2_bias)


def _activated(product: Tensor, scales: Tensor, layer: _Int8Layer) -> Rounded:
    """The second product's inputs from the first one's integers."""
    hidden = F.gelu(torch.addcmul(layer.fc1_bias, product, scales))
    scale, shift = layer.raised
    return round_positive_rows(torch.addcmul(shift, hidden, scale))


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _in_mode(function: Callable[[Any], object], inference: bool, part: Any) -> None:
    """Calls the function with the mode of the thread that asks for it; each thread has its own."""
    with torch.no_grad(), torch.inference_mode(inference):
        function(part)
