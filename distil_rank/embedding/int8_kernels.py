"""What stands between two products, of int8 or of attention, each step over rows that stay in a core's cache; by numba.

Activations come out of a product short of their rows' scales, (T, N), and go into the next one as unsigned
bytes with one step per row. In torch each of these steps is six to ten operations, which go through memory.

Every row is computed by itself, so that its bytes do not depend on the rows beside it. The kernels hold no lock of the
interpreter: threads run them side by side. Inputs and outputs are contiguous in their last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, sqrt
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from distil_rank.embedding.int8_linear import LEVELS, SMALLEST, UNSIGNED_LEVELS, ZERO_POINT

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float32] | NDArray[np.uint16]  # the second are bfloat16's bits

END = 5.0  # from here on GELU is x or 0 within 1.5e-6
DEGREE = 12  # of the polynomial below, with which GELU is within 3e-6
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _half_erf(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Φ(a) − ½) / a as a function of t = 2 a² / END² − 1, which runs from −1 to 1."""
    a = END * np.sqrt(np.maximum(t + 1, 1e-12) / 2)
    return np.array([erf(value / sqrt(2)) / (2 * value) for value in a])


COEFFICIENTS = tuple(
    np.float32(c) for c in Chebyshev.interpolate(_half_erf, DEGREE).convert(kind=Polynomial).coef[::-1]
)
_END, _PER_SQUARE = np.float32(END), np.float32(2 / END**2)
POWERS = tuple(
    np.float32(c) for c in Chebyshev.interpolate(lambda t: 2**t, 4, [-0.5, 0.5]).convert(kind=Polynomial).coef[::-1]
)  # 2**t within 4e-6 of itself
_LOWEST = np.float32(-126)
_MASKED = np.uint16(0xFF7F)  # the lowest of bfloat16's numbers
_ONE, _HALF = np.float32(1), np.float32(0.5)
_SMALLEST = np.float32(SMALLEST).view(np.int32)
_LEVELS, _UNSIGNED = np.float32(LEVELS), np.float32(UNSIGNED_LEVELS)
_ZERO = np.float32(ZERO_POINT + 0.5)  # with what makes truncation round to the nearest
_WITHOUT_SIGN = np.int32(0x7FFFFFFF)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiles when first called; sums may be taken in the order that the vector units want."""
    try:
        return njit(cache=True, nogil=True, **OPTIONS)(function)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True, **OPTIONS)(function)


def _inlined(function: Callable[..., Any]) -> Any:
    return njit(inline="always", **OPTIONS)(function)


def _float(x: Any) -> Any:
    """A number of `Numbers` in float32."""


@overload(_float, inline="always")
def _float_of(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def _store(row: Any, out: Any) -> None:
    """Writes float32 into `Numbers`, rounded to the nearest, half to even."""


@overload(_store, inline="always")
def _store_in(row, out):  # type: ignore[no-untyped-def]
    def as_they_are(row, out):  # type: ignore[no-untyped-def]
        for j in range(row.size):
            out[j] = row[j]

    def in_bfloat16(row, out):  # type: ignore[no-untyped-def]
        bits = row.view(np.uint32)
        for j in range(row.size):
            odd = (bits[j] >> np.uint32(16)) & np.uint32(1)
            out[j] = np.uint16((bits[j] + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return in_bfloat16 if out.dtype == types.uint16 else as_they_are


@_inlined
def _ordered(bits):  # type: ignore[no-untyped-def]
    """bfloat16's bits as integers of the same order, and back."""
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@_inlined
def _gelu(x):  # type: ignore[no-untyped-def]
    a = x if x < _END else _END
    a = a if a > -_END else -_END
    t = a * a * _PER_SQUARE - _ONE
    value = np.float32(0)
    for coefficient in COEFFICIENTS:
        value = value * t + coefficient
    return x * (_HALF + a * value)


@_inlined
def _power(t):  # type: ignore[no-untyped-def]
    """2**t, of which t is at most 0, as bits."""
    t = t if t > _LOWEST else _LOWEST
    whole = np.int32(t - _HALF)
    rest = t - np.float32(whole)
    value = np.float32(0)
    for coefficient in POWERS:
        value = value * rest + coefficient
    return np.int32(np.float32(value).view(np.int32) + np.int32(whole << np.int32(23)))


@_inlined
def _step(row, levels):  # type: ignore[no-untyped-def]
    """What one step is worth in a row; the largest value of floats without their sign is that of their bits."""
    bits = row.view(np.int32)
    largest = _SMALLEST
    for j in range(bits.size):
        largest = max(largest, bits[j] & _WITHOUT_SIGN)
    return np.int32(largest).view(np.float32) / levels


@_inlined
def _round(row, step, zero, out):  # type: ignore[no-untyped-def]
    per_step = _ONE / step
    for j in range(row.size):
        out[j] = np.uint8(np.int32(row[j] * per_step + zero))


@_inlined
def _normed(x, scale, eps, row):  # type: ignore[no-untyped-def]
    """LayerNorm without a shift, into `row`."""
    count = np.float32(x.size)
    total = np.float32(0)
    for j in range(x.size):
        total += x[j]
    mean = total / count
    squares = np.float32(0)
    for j in range(x.size):
        squares += (x[j] - mean) * (x[j] - mean)
    factor = _ONE / np.sqrt(squares / count + eps)
    for j in range(x.size):
        row[j] = (x[j] - mean) * factor * scale[j]


@_inlined
def _add(x, product, step, bias):  # type: ignore[no-untyped-def]
    for j in range(x.size):
        x[j] += product[j] * step + bias[j]


@_compiled
def round_rows(x: Numbers, values: Bytes, steps: Floats) -> None:
    """Rounds x (T, C) to signed integers, kept as bytes around `ZERO_POINT`."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        for j in range(row.size):
            row[j] = _float(x[i, j])
        steps[i, 0] = _step(row, _LEVELS)
        _round(row, steps[i, 0], _ZERO, values[i])


@_compiled
def norm_rows(x: Floats, scale: Floats, eps: np.float32, values: Bytes, steps: Floats) -> None:
    """LayerNorm of x (T, C) with a scale (C,), rounded as by `round_rows`."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        _normed(x[i], scale, eps, row)
        steps[i, 0] = _step(row, _LEVELS)
        _round(row, steps[i, 0], _ZERO, values[i])


@_compiled
def add_and_norm_rows(
    x: Floats,
    product: Floats,
    product_steps: Floats,
    bias: Floats,
    scale: Floats,
    eps: np.float32,
    values: Bytes,
    steps: Floats,
) -> None:
    """Adds a product and its bias (C,) to x (T, C), then as `norm_rows`; both steps may be in the same memory."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        _add(x[i], product[i], product_steps[i, 0], bias)
        _normed(x[i], scale, eps, row)
        steps[i, 0] = _step(row, _LEVELS)
        _round(row, steps[i, 0], _ZERO, values[i])


@_compiled
def add_rows(x: Floats, product: Floats, product_steps: Floats, bias: Floats) -> None:
    """Adds a product and its bias (C,) to x (T, C)."""
    for i in range(len(x)):
        _add(x[i], product[i], product_steps[i, 0], bias)


@_compiled
def activate_rows(
    product: Numbers, product_steps: Floats, bias: Floats, scale: Floats, shift: Floats, values: Bytes, steps: Floats
) -> None:
    """GELU of a product (T, N) with its bias, then a scale and a shift (N,) after which nothing is negative, rounded
    to unsigned integers."""
    row = np.empty(product.shape[1], np.float32)
    for i in range(len(product)):
        step = product_steps[i, 0]
        for j in range(row.size):
            row[j] = _gelu(_float(product[i, j]) * step + bias[j]) * scale[j] + shift[j]
        steps[i, 0] = _step(row, _UNSIGNED)
        _round(row, steps[i, 0], _HALF, values[i])


@_compiled
def split_rows(product: Numbers, product_steps: Floats, bias: Floats, rotations: Floats, qkv: Numbers) -> None:
    """Queries, keys and values out of their product, (T, 3 C); queries and keys with their bias (2 C,) and rotated.

    Args:
        product: Of the norm's output.
        product_steps: (T, 1).
        bias: Of queries and keys.
        rotations: Cosine and sine of each pair's angle, (T, D) for heads of width D.
        qkv: (T, 3 C).
    """
    width, pairs = product.shape[1] // 3, rotations.shape[1] // 2
    row = np.empty(product.shape[1], np.float32)
    for i in range(len(product)):
        step = product_steps[i, 0]
        for j in range(row.size):
            row[j] = _float(product[i, j]) * step
        for head in range(width // pairs):
            for pair in range(pairs):
                j = 2 * (head * pairs + pair)
                a = row[j] + bias[j]
                b = row[j + 1] + bias[j + 1]
                cosine, sine = rotations[i, 2 * pair], rotations[i, 2 * pair + 1]
                row[j] = a * cosine - b * sine
                row[j + 1] = a * sine + b * cosine
        _store(row, qkv[i])


@_compiled
def exponentiate(scores: Numbers, visible: int, scale: np.float32, sums: Floats) -> None:
    """2**(scale (s − the largest s of its row)) in place of scores (H, Q, K), in bfloat16's bits; their sums, (H, Q).

    Args:
        visible: Keys; what is behind them becomes 0.
    """
    for head in range(scores.shape[0]):
        scores[head, :, visible:] = _MASKED  # before any is read: a wide load waits for narrow stores
        for i in range(scores.shape[1]):
            row = scores[head, i]
            largest = np.int16(-32768)
            signed = row.view(np.int16)
            for j in range(row.size):
                largest = max(largest, _ordered(signed[j]))
            top = _float(np.uint16(_ordered(largest))) * scale
            total = np.float32(0)
            for j in range(row.size):
                power = _power(_float(row[j]) * scale - top)
                total += np.int32(power).view(np.float32)
                row[j] = np.uint16((np.uint32(power) + np.uint32(0x8000)) >> np.uint32(16))
            sums[head, i] = total
        scores[head, :, visible:] = 0


@_compiled
def divide(mixed: Numbers, sums: Floats, out: Numbers, start: int, stop: int, first: int) -> None:
    """Divides (H, Q, D) by sums (H, Q) into rows of out (T, N, D), from the head `first` on; in bfloat16's bits."""
    row = np.empty(mixed.shape[2], np.float32)
    for i in range(min(mixed.shape[1], stop - start)):
        for head in range(mixed.shape[0]):
            per_sum = _ONE / sums[head, i]
            for j in range(row.size):
                row[j] = _float(mixed[head, i, j]) * per_sum
            _store(row, out[start + i, first + head])
