"""ESM-2's encoder with its matrix products in int8; everything between them stays in float32.

Exact remain the norms, rotations, attention, GELU and the residual stream; the first layer's queries, keys and
values, which are read from a table; and the next layers' queries and keys, as in bfloat16 (`esm2.EXACT`). Rows go
through in blocks that fit a core's cache, so that rounding and scaling cost little beside the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2
from torch import Tensor

from distil_rank.embedding.calibration import GELU_MINIMUM, Calibration
from distil_rank.embedding.esm2 import EXACT, KEYS, WIDE, Affine, FusedEncoder, attend_sequentially, folded, rotated
from distil_rank.embedding.int8_linear import ZERO_POINT, Int8Linear, round_positive_rows, round_rows, round_weight

HEADS = 5  # of a sequence, at once in one thread
BLOCK = 128  # rows; of the feed-forward layer's inner width they are 2.6 MB in float32 at 650M


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


class Int8Encoder(FusedEncoder):
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference on a CPU with int8 units.

    Args:
        model: fair-esm's model; its parameters are not kept.
        calibration: The activations' ranges.
        layer: The last layer to compute; the model's own by default.
    """

    def __init__(self, model: ESM2, calibration: Calibration, layer: int | None = None):
        self._calibration = calibration
        self._pool: ThreadPoolExecutor | None = None
        self._first_migration = torch.ones(model.embed_dim)
        super().__init__(model, torch.int8, "cpu", layer)
        qk, v = self.first
        self.first = qk, v / self._first_migration

    @torch.no_grad()
    def _convert(self, modules: Iterable[Any]) -> Sequence[Any]:
        return [self._rounded_layer(number, module) for number, module in enumerate(modules)]

    def _rounded_layer(self, number: int, module: Any) -> _Int8Layer:
        exact = self._layer(module, torch.float32, torch.float32)
        _, (fc1,) = folded(exact.norm2, exact.fc1)
        maxima, migration = self._calibration.layers[number], self._calibration.migration
        width = len(maxima.qkv)
        no_shift = torch.zeros(width)
        before_qkv = migration(maxima.qkv, torch.cat([exact.qk[0], exact.v]))
        before_out = migration(maxima.out, exact.out[0])
        before_fc1 = migration(maxima.fc1, fc1[0])
        before_fc2 = migration(maxima.fc2, exact.fc2[0])
        if number == 0:
            self._first_migration = before_out
        qk, v = exact.qk[0] * before_qkv, exact.v * before_qkv / before_out[:, None]
        keeps_qk = 0 < number < EXACT
        product = None if number == 0 else _int8(v if keeps_qk else torch.cat([qk, v]))
        fc2 = _int8(exact.fc2[0] * before_fc2, zero_point=0)
        return _Int8Layer(
            norm1=(1 / before_qkv, no_shift),
            qk=(qk, exact.qk[1]) if keeps_qk else None,
            qkv=product,
            qk_bias=exact.qk[1],
            out=_int8(exact.out[0] * before_out),
            out_bias=exact.out[1],
            norm2=(1 / before_fc1, no_shift),
            fc1=_int8(fc1[0] * before_fc1),
            fc1_bias=fc1[1],
            raised=(1 / before_fc2, GELU_MINIMUM / before_fc2),
            fc2=fc2,
            fc2_bias=exact.fc2[1] - GELU_MINIMUM * exact.fc2[0].sum(1),
        )

    @torch.no_grad()
    def states(self, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """As in `FusedEncoder`; a wide model's threads share the rows and sequences of a pass."""
        threads = torch.get_num_threads()
        if threads == 1 or len(self.embedding[0]) < WIDE:
            yield from super().states(tokens, lengths)
            return
        torch.set_num_threads(1)  # of each operation; a pass has as many operations at once as there are threads
        try:
            with ThreadPoolExecutor(threads) as self._pool:
                yield from super().states(tokens, lengths)
        finally:
            self._pool = None
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
        return [slice(start, start + BLOCK) for start in range(0, total, BLOCK)]

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
        hidden = F.gelu(torch.addcmul(layer.fc1_bias, layer.fc1(values), scales))
        scale, shift = layer.raised
        values, scales = round_positive_rows(torch.addcmul(shift, hidden, scale))
        return x.addcmul_(layer.fc2(values), scales).add_(layer.fc2_bias)


def _in_mode(function: Callable[[Any], object], inference: bool, part: Any) -> None:
    """Calls the function with the mode of the thread that asks for it; each thread has its own."""
    with torch.no_grad(), torch.inference_mode(inference):
        function(part)


def _int8(weight: Tensor, zero_point: int = ZERO_POINT) -> Int8Linear:
    return Int8Linear(*round_weight(weight), zero_point)
