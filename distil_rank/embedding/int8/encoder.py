"""ESM-2's encoder with its matrix products in int8; what is between two of them is in `kernels`.

In float32 remain the norms, rotations, GELU and the residual stream. Attention, and the queries and keys that
`Int8Layer` leaves exact, are in bfloat16 where the processor multiplies it, otherwise in float32 too. Each thread's
rows go through the products in large blocks.

torch's own attention in bfloat16 multiplies small blocks of queries and keys, at a third of the processor's rate. Here
it is two batched products of oneDNN, of as many queries and heads as go into its cache with their scores, and a
compiled softmax between them.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import ceil, e, log2
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.embedding.esm2 import WIDE, FusedEncoder, attend_sequentially, has_bf16_units, return_freed_memory
from distil_rank.embedding.int8 import kernels
from distil_rank.embedding.int8.quantisation import Calibration, CalibrationEncoder, Int8Layer
from distil_rank.errors import InputError

HEADS = 5  # of a long sequence, at once in one thread
BLOCK, NUMBERS = 256, 512 * 320  # rows of a product at most, or as many as have so many numbers
MULTIPLE = 16  # of queries and keys: oneDNN compiles a product for each shape
SCORES = 5 * 2**19  # at once; two bytes each
PAIRS = 64  # of rotations in a row at least: they fill vector units, with little left over


class Int8Encoder(FusedEncoder):
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference on a CPU with int8 units.

    Args:
        exact: The exact encoder, up to the layer that int8 is to go to; its layers are rounded one by one.
        calibration: The activations' ranges, of at least these layers.
    """

    @torch.no_grad()
    def __init__(self, exact: CalibrationEncoder, calibration: Calibration):
        self.layer, self.dtype, self.device = exact.layer, torch.int8, torch.device("cpu")
        self.heads, self.depth, self.eps = exact.heads, exact.depth, exact.eps
        self.frequencies, self.embedding, self.norm_after = exact.frequencies, exact.embedding, exact.norm_after
        width, widths = self.embedding.shape[1], [len(maxima.qkv) for maxima in calibration.layers[: self.layer]]
        if widths != [width] * self.layer:
            raise InputError(
                f"Expected a calibration of {self.layer} layers of width {width} but got {len(calibration.layers)} of "
                f"width {widths[0] if widths else 0}; leave --calibration out, or name one of this backbone."
            )
        self._low = torch.bfloat16 if has_bf16_units() else torch.float32  # of attention and its inputs
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1  # of the pool, or the caller's own
        self._table = torch.cat(exact.first, dim=1)  # of the first layer's queries, keys and values
        if self.layer:
            migration = calibration.migration(calibration.layers[0].out, exact.exact_layer(exact.layers[0]).out[0])
            self._table[:, 2 * width :] /= migration
        self.layers = [
            Int8Layer.rounded(number, exact.exact_layer(module), calibration, self._low)
            for number, module in enumerate(exact.layers)
        ]
        return_freed_memory()

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
        inference = torch.is_inference_mode_enabled()  # each thread has its own

        def in_mode(part: Any) -> None:
            with torch.no_grad(), torch.inference_mode(inference):
                function(part)

        list(map(in_mode, parts) if self._pool is None else self._pool.map(in_mode, parts))

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
        parts = qkv.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # (3, H, T + padding, D)
        attended = torch.empty(sum(lengths), self.heads, parts.shape[3], dtype=qkv.dtype)
        function = attend if qkv.dtype == torch.bfloat16 else _attend_in_fp32

        def attend_to(part: tuple[int, int, slice]) -> None:
            function(parts, *part, attended)

        self._each(attend_to, self._attention_parts(lengths))
        self._each(lambda rows: self._finish(x[rows], layer, attended[rows].flatten(1)), self._blocks(len(x)))

    def _project_rows(self, x: Tensor, layer: Int8Layer, rotations: Tensor, qkv: Tensor) -> None:
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

    def _attention_parts(self, lengths: list[int]) -> list[tuple[int, int, slice]]:
        """Start and length of each sequence, and heads: all, or a part of them where all keep one thread too long."""
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        share = sum(length**2 for length in lengths) / self._threads
        parts = []
        for start, length in sorted(zip(starts, lengths, strict=True), key=lambda part: -part[1]):  # longest first
            size = HEADS if self._pool is not None and 2 * length**2 > share else self.heads
            parts += [(start, length, slice(head, head + size)) for head in range(0, self.heads, size)]
        return parts

    def _finish(self, x: Tensor, layer: Int8Layer, attended: Tensor) -> None:
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
    """How many heads, of so many pairs, are rotated at once: a divisor of their number; narrow ones fill vector units.

    >>> together(40, 8), together(40, 12), together(40, 32)
    (8, 8, 2)
    """
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n * pairs >= PAIRS or n == heads))


def attend(qkv: Tensor, start: int, length: int, heads: slice, attended: Tensor) -> None:
    """Attention of some heads within one sequence.

    Args:
        qkv: Queries, keys and values of all heads, (3, H, T + `MULTIPLE`, D) bfloat16. What is in the rows behind a
            sequence has no effect, but has to be finite.
        attended: (T, H, D) bfloat16, where the result is written.
    """
    q, k, v = qkv[:, heads, start : start + length + -length % MULTIPLE]  # (heads, rows, D)
    k = k.transpose(1, 2)
    scale = np.float32(log2(e) / q.shape[2] ** 0.5)
    size = max(SCORES // q.shape[1] // MULTIPLE, 1) * MULTIPLE  # queries
    together = max(SCORES // (min(size, q.shape[1]) * q.shape[1]), 1)
    out = _array(attended)
    for first in range(0, len(q), together):
        some = slice(first, first + together)
        for row in range(0, length, size):
            scores = torch.bmm(q[some, row : row + size], k[some])
            sums = np.empty(scores.shape[:2], np.float32)
            visible = min(length - row, scores.shape[1]), length  # queries and keys
            if not kernels.exponentiate(_array(scores), *visible, scale, sums):
                scores = torch.bmm(q[some, row : row + size], k[some])
                kernels.subtract_maxima(_array(scores), *visible, sums)
                kernels.exponentiate(_array(scores), *visible, scale, sums)
            mixed = torch.bmm(scores, v[some])
            kernels.divide(_array(mixed), sums, out, start + row, start + length, heads.start + first)


def _attend_in_fp32(qkv: Tensor, start: int, length: int, heads: slice, attended: Tensor) -> None:
    """As `attend`, in float32."""
    q, k, v = qkv[:, heads, start : start + length + -length % MULTIPLE].transpose(1, 2)
    attended[start : start + length, heads] = attend_sequentially(q, k, v, [length])[:length]


def _rounded_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the bytes of rows like those of x, and their steps."""
    return torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)


def _run(kernel: Callable[..., None], *arguments: Tensor | float) -> None:
    """Calls a kernel with the memory of tensors; bfloat16 goes as its bits."""
    kernel(*(_array(argument) if isinstance(argument, Tensor) else np.float32(argument) for argument in arguments))


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's memory as numpy, which does not know bfloat16; the kernels take its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
