"""ESM-2's encoder with its matrix products in int8; what is between two of them is in `int8_kernels`.

In float32 remain the norms, rotations, GELU and the residual stream. Attention, and the queries and keys that
`int8_weights` leaves exact, are in bfloat16 where the processor multiplies it, otherwise in float32 too. Each thread's
rows go through the products in large blocks.
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
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.embedding import int8_kernels as kernels
from distil_rank.embedding.bf16_attention import MULTIPLE, bits, padding
from distil_rank.embedding.bf16_attention import attend as attend_in_bf16
from distil_rank.embedding.esm2 import WIDE, Affine, FusedEncoder, attend_sequentially
from distil_rank.embedding.int8_linear import ZERO_POINT, Int8Linear
from distil_rank.embedding.int8_weights import Int8Weights
from distil_rank.embedding.processor import has_bf16_units

HEADS = 5  # of a long sequence, at once in one thread
BLOCK, NUMBERS = 256, 512 * 320  # rows of a product at most, or as many as have so many numbers
PAIRS = 64  # of rotations in a row at least: they fill vector units, with little left over
LOADED = 4  # layers from files at once, in memory twice each


class _Int8Layer(NamedTuple):
    """The parameters of one layer; each norm's scale is what migrates its outputs."""

    norm1: Tensor
    qk: Tensor | None  # weight of queries and keys, where it is not in int8
    qkv: Int8Linear | None  # of values alone, where they are; None in the first layer, which is a table
    qk_bias: Tensor
    out: Int8Linear
    out_bias: Tensor
    norm2: Tensor
    fc1: Int8Linear
    fc1_bias: Tensor
    raised: Affine  # migrates GELU's outputs: scale and shift
    fc2: Int8Linear
    fc2_bias: Tensor

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], low: torch.dtype) -> _Int8Layer:
        """Brings a layer of `Int8Weights` into the kernels' order; products that are rounded next are in `low`."""

        def product(name: str, zero_point: int = ZERO_POINT, dtype: torch.dtype = torch.float32) -> Int8Linear:
            return Int8Linear(weights[f"{name}.weight"], weights[f"{name}.scales"], zero_point, dtype)

        return cls(
            norm1=weights["norm1"],
            qk=weights["qk.weight"].to(low) if "qk.weight" in weights else None,
            qkv=product("qkv", dtype=low) if "qkv.weight" in weights else None,
            qk_bias=weights["qk.bias"],
            out=product("out"),
            out_bias=weights["out.bias"],
            norm2=weights["norm2"],
            fc1=product("fc1", dtype=low),
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
        self._low = torch.bfloat16 if has_bf16_units() else torch.float32  # of attention and its inputs
        self.bos_only_after = None
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1  # of the pool, or the caller's own
        self._assemble(weights.parts, _packed(weights, self._low))
        self._table = torch.cat(self.first, dim=1)  # of the first layer's queries, keys and values

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
        """Equally many for every thread where each gets 16 rows; sizes differ by 16 at the most."""
        most, units = max(BLOCK, NUMBERS // self.embedding.shape[1]), ceil(total / 16)
        number = min(self._threads * ceil(total / (self._threads * most)), units)
        ends = [min(16 * (i * units // number), total) for i in range(number + 1)]
        return [slice(*ends) for ends in pairwise(ends)]

    def _rotations(self, lengths: list[int]) -> Tensor:
        """Cosines, then sines, of each token's rotary angles, (T, G D) for G heads as in `kernels.split_rows`."""
        angles = super()._rotations(lengths)[:, 0].repeat(1, together(2 * self.heads, len(self.frequencies)))
        return torch.cat([angles.real, angles.imag], dim=1)

    def _look_up(self, tokens: Tensor) -> Tensor:
        return tokens  # a row of the table is rotated on its way, and not copied before

    def _apply(self, layer: Any, x: Tensor, projected: Any, rotations: Tensor, lengths: list[int]) -> None:
        qkv = x.new_empty(len(x) + MULTIPLE, 3 * x.shape[1], dtype=self._low)
        qkv[len(x) :] = 0  # read by attention, without an effect

        def project(rows: slice) -> None:
            if projected is None:
                self._project_rows(x[rows], layer, rotations[rows], qkv[rows])
            else:
                _run(kernels.look_up_rows, self._table, projected[rows], rotations[rows], qkv[rows])

        self._each(project, self._blocks(len(x)))
        attended = self._attend_to(qkv, lengths)
        self._each(lambda rows: self._finish(x[rows], layer, attended[rows]), self._blocks(len(x)))

    def _project_rows(self, x: Tensor, layer: _Int8Layer, rotations: Tensor, qkv: Tensor) -> None:
        """Rotated queries and keys, and values, of some rows."""
        values, steps = _rounded_like(x)
        _run(kernels.norm_rows, x, layer.norm1, self.eps, values, steps)
        assert layer.qkv is not None  # the first layer is a table
        product = layer.qkv(values)
        if layer.qk is not None:
            normed = F.layer_norm(x, x.shape[1:], layer.norm1, eps=self.eps)
            product = torch.cat([F.linear(normed.to(self._low), layer.qk), (product * steps).to(self._low)], dim=1)
            steps = torch.ones_like(steps)
        _run(kernels.split_rows, product, steps, layer.qk_bias, rotations, qkv)

    def _attend_to(self, qkv: Tensor, lengths: list[int]) -> Tensor:
        """Attention of packed queries, keys and values, (T + padding, 3 C), to (T, C)."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # (3, H, T + padding, D)
        attended = torch.empty(sum(lengths), self.heads, qkv.shape[3], dtype=qkv.dtype)
        attend = attend_in_bf16 if qkv.dtype == torch.bfloat16 else _attend_in_fp32

        def attend_to(part: tuple[int, int, slice]) -> None:
            attend(qkv, *part, attended)

        self._each(attend_to, self._attention_parts(lengths))
        return attended.flatten(1)

    def _attention_parts(self, lengths: list[int]) -> list[tuple[int, int, slice]]:
        """Start and length of each sequence, and heads: all, or a part of them where all keep one thread too long."""
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        share = sum(length**2 for length in lengths) / self._threads
        parts = []
        for start, length in sorted(zip(starts, lengths, strict=True), key=lambda part: -part[1]):  # longest first
            size = HEADS if self._pool is not None and 2 * length**2 > share else self.heads
            parts += [(start, length, slice(head, head + size)) for head in range(0, self.heads, size)]
        return parts

    def _finish(self, x: Tensor, layer: _Int8Layer, attended: Tensor) -> None:
        """Adds to some rows what follows from their attention."""
        values, steps = _rounded_like(x)
        _run(kernels.round_rows, attended, values, steps)
        product = layer.out(values)
        _run(kernels.add_and_norm_rows, x, product, steps, layer.out_bias, layer.norm2, self.eps, values, steps)
        product = layer.fc1(values)
        inner, inner_steps = _rounded_like(product)
        _run(kernels.activate_rows, product, steps, layer.fc1_bias, *layer.raised, inner, inner_steps)
        _run(kernels.add_rows, x, layer.fc2(inner), inner_steps, layer.fc2_bias)


def together(heads: int, pairs: int) -> int:
    """How many heads are rotated at once: a divisor of their number, so that narrow ones fill vector units.

    Args:
        heads: Of queries and keys.
        pairs: That are rotated in each.

    >>> together(40, 8), together(40, 12), together(40, 32)
    (8, 8, 2)
    """
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n * pairs >= PAIRS or n == heads))


def _attend_in_fp32(qkv: Tensor, start: int, length: int, heads: slice, attended: Tensor) -> None:
    """As `bf16_attention.attend`, in float32."""
    q, k, v = qkv[:, heads, start : start + length + padding(length)].transpose(1, 2)
    attended[start : start + length, heads] = attend_sequentially(q, k, v, [length])[:length]


def _packed(weights: Int8Weights, low: torch.dtype) -> list[_Int8Layer]:
    """All layers in the kernels' order; oneDNN's reordering, like the check of a file, is slow and on one core."""

    def pack(number: int) -> _Int8Layer:
        return _Int8Layer.of(weights.layers[number], low)

    threads, numbers = torch.get_num_threads(), range(len(weights.layers))
    if not weights.apart:
        return list(map(pack, numbers))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, LOADED)) as pool:
            return list(pool.map(pack, numbers))
    finally:
        torch.set_num_threads(threads)


def _rounded_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the bytes of rows like those of x, and their steps."""
    return torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)


def _run(kernel: Callable[..., None], *arguments: Tensor | float) -> None:
    """Calls a kernel with the memory of tensors; bfloat16 goes as its bits."""
    kernel(*(_array(argument) if isinstance(argument, Tensor) else np.float32(argument) for argument in arguments))


def _array(tensor: Tensor) -> NDArray[Any]:
    return bits(tensor) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _in_mode(function: Callable[[Any], object], inference: bool, part: Any) -> None:
    """Calls the function with the mode of the thread that asks for it; each thread has its own."""
    with torch.no_grad(), torch.inference_mode(inference):
        function(part)
