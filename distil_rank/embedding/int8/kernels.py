"""Numba kernels for the steps between two matrix products, of int8 or of attention; each works on one row at a time.

Activations come out of a product not yet multiplied by their rows' scales, (T, N), and go into the next one as unsigned
bytes with one scale per row, called a step. In torch each kernel is six to ten operations, which go through memory.

Every row is computed by itself, so that its bytes do not depend on the rows beside it. The kernels hold no lock of the
interpreter: threads run them side by side. Inputs and outputs are contiguous in their last dimension.
"""

from collections.abc import Callable
from math import erf, sqrt
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from distil_rank.embedding.int8.quantisation import LEVELS, SMALLEST, UNSIGNED_LEVELS, ZERO_POINT

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Tokens = NDArray[np.int64]
Numbers = NDArray[np.float32] | NDArray[np.uint16]  # the second are bfloat16's bits

END = 4.5  # from here on GELU is x or 0 within 2e-5
DEGREE = 8  # of the polynomial below, with which GELU is within 5e-5, and 3e-6 of x beyond 20
OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}


def _single(series: Chebyshev) -> tuple[np.float32, ...]:
    """Coefficients of the powers, highest first."""
    return tuple(np.float32(c) for c in series.convert(kind=Polynomial).coef[::-1])


# A polynomial for (Φ(a) − ½) / a in t = 2 a² / END² − 1, which runs from −1 to 1; GELU's error is a² times this one's.
_T = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
_A = END * np.sqrt((_T + 1) / 2)
_HALF_ERF = [erf(a / sqrt(2)) / (2 * a) for a in _A]
COEFFICIENTS = _single(Chebyshev.fit(_T, _HALF_ERF, DEGREE, domain=[-1, 1], w=_A**2))
_END, _PER_SQUARE = np.float32(END), np.float32(2 / END**2)
POWERS = _single(Chebyshev.interpolate(lambda t: 2**t, 3, [-0.5, 0.5]))  # 2**t within 1e-4 of itself
_FARTHEST = np.float32(126)  # exponent of a power on both sides of 0; float32 has no more
# Sums of a row's powers, with room for products and cut ones:
_LEAST_SUM, _MOST_SUM = np.float32(2**-100), np.float32(2**100)
_WHOLE = np.float32(1.5 * 2**23)  # a sum with it has no bits for fractions
_MASKED = np.uint16(0xFF7F)  # the lowest of bfloat16's numbers
_ONE, _HALF = np.float32(1), np.float32(0.5)
_SMALLEST = np.float32(SMALLEST).view(np.int32)
_LEVELS, _UNSIGNED = np.float32(LEVELS), np.float32(UNSIGNED_LEVELS)
_ZERO = np.float32(ZERO_POINT + 0.5)  # with what makes truncation round to the nearest
_WITHOUT_SIGN = np.int32(0x7FFFFFFF)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiles when first called."""
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


@njit(fastmath={"reassoc", "contract"})
def _plus(total, summand):  # type: ignore[no-untyped-def]
    """A sum in the order that the vector units want; elsewhere the compiler would make divisions of products."""
    return total + summand


@_inlined
def _polynomial(coefficients, x):  # type: ignore[no-untyped-def]
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


@_inlined
def _gelu(x):  # type: ignore[no-untyped-def]
    size = abs(x)
    a = size if size < _END else _END
    return _HALF * x + size * (a * _polynomial(COEFFICIENTS, a * a * _PER_SQUARE - _ONE))


@_inlined
def _power(x, scale, per_scale, coefficients):  # type: ignore[no-untyped-def]
    """2**(scale x), of which scale x is from -126 to 126, as bits."""
    whole = x * scale + _WHOLE
    rest = x - (whole - _WHOLE) * per_scale
    value = np.float32(_polynomial(coefficients, rest))
    return np.int32(value.view(np.int32) + np.int32(np.float32(whole).view(np.int32) << np.int32(23)))


@_inlined
def _round(row, levels, zero, out):  # type: ignore[no-untyped-def]
    """Rounds a row to bytes; returns what one step is worth. Floats without a sign are in the order of their bits."""
    bits = row.view(np.int32)
    largest = _SMALLEST
    for j in range(bits.size):
        largest = max(largest, np.int32(bits[j] & _WITHOUT_SIGN))
    step = np.int32(largest).view(np.float32) / levels
    per_step = _ONE / step
    for j in range(row.size):
        out[j] = np.uint8(np.int32(row[j] * per_step + zero))
    return step


@_inlined
def _normed(x, scale, eps, row):  # type: ignore[no-untyped-def]
    """LayerNorm without a shift, into `row`."""
    count = np.float32(x.size)
    total = np.float32(0)
    for j in range(x.size):
        total = _plus(total, x[j])
    mean = total / count
    squares = np.float32(0)
    for j in range(x.size):
        squares = _plus(squares, (x[j] - mean) * (x[j] - mean))
    factor = _ONE / np.sqrt(squares / count + eps)
    for j in range(x.size):
        row[j] = (x[j] - mean) * factor * scale[j]


@_inlined
def _add(x, product, step, bias):  # type: ignore[no-untyped-def]
    for j in range(x.size):
        x[j] += product[j] * step + bias[j]


@_inlined
def _rotate(row, size, rotations):  # type: ignore[no-untyped-def]
    """Pairs of neighbours among the first `size` numbers, by angles as in `split_rows`, in place."""
    pairs = rotations.size // 2
    for group in range(size // (2 * pairs)):
        for pair in range(pairs):
            j = 2 * (group * pairs + pair)
            a, b = row[j], row[j + 1]
            cosine, sine = rotations[pair], rotations[pairs + pair]
            row[j] = a * cosine - b * sine
            row[j + 1] = a * sine + b * cosine


@_compiled
def round_rows(x: Numbers, values: Bytes, steps: Floats) -> None:
    """Rounds x (T, C) to signed integers, kept as bytes around `ZERO_POINT`."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        for j in range(row.size):
            row[j] = _float(x[i, j])
        steps[i, 0] = _round(row, _LEVELS, _ZERO, values[i])


@_compiled
def norm_rows(x: Floats, scale: Floats, eps: np.float32, values: Bytes, steps: Floats) -> None:
    """LayerNorm of x (T, C) with a scale (C,), rounded as by `round_rows`."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        _normed(x[i], scale, eps, row)
        steps[i, 0] = _round(row, _LEVELS, _ZERO, values[i])


@_compiled
def add_and_norm_rows(x, product, product_steps, bias, scale, eps, values, steps):  # type: ignore[no-untyped-def]
    """Adds a product and its bias (C,) to x (T, C), then as `norm_rows`; both steps may be in the same memory."""
    row = np.empty(x.shape[1], np.float32)
    for i in range(len(x)):
        _add(x[i], product[i], product_steps[i, 0], bias)
        _normed(x[i], scale, eps, row)
        steps[i, 0] = _round(row, _LEVELS, _ZERO, values[i])


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
        steps[i, 0] = _round(row, _UNSIGNED, _HALF, values[i])


@_compiled
def split_rows(product: Numbers, product_steps: Floats, bias: Floats, rotations: Floats, qkv: Numbers) -> None:
    """Queries, keys and values out of their product, (T, 3 C); queries and keys with their bias (2 C,) and rotated.

    The rotations are cosines, then sines, of the angles of pairs of neighbours in G heads of width D, (T, G D); each G
    heads have the same.
    """
    row = np.empty(product.shape[1], np.float32)
    for i in range(len(product)):
        step = product_steps[i, 0]
        for j in range(row.size):
            row[j] = _float(product[i, j]) * step
        for j in range(bias.size):
            row[j] += bias[j]
        _rotate(row, bias.size, rotations[i])
        _store(row, qkv[i])


@_compiled
def look_up_rows(table: Floats, tokens: Tokens, rotations: Floats, qkv: Numbers) -> None:
    """The same out of a table with a row for each token, (tokens, 3 C), whose queries and keys have their bias."""
    row = np.empty(table.shape[1], np.float32)
    for i in range(len(tokens)):
        row[:] = table[tokens[i]]
        _rotate(row, row.size // 3 * 2, rotations[i])
        _store(row, qkv[i])


@_inlined
def _exponentiate(row, scale):  # type: ignore[no-untyped-def]
    """2**(scale s) in place of a row, with exponents beyond ± `_FARTHEST` cut off; returns the sum."""
    per_scale = _ONE / scale
    farthest = _FARTHEST * per_scale
    a, b, c, d = POWERS
    coefficients = (a * scale * scale * scale, b * scale * scale, c * scale, d)
    total = np.float32(0)
    for j in range(row.size):
        x = _float(row[j])
        x = x if x < farthest else farthest
        power = _power(x if x > -farthest else -farthest, scale, per_scale, coefficients)
        total = _plus(total, np.int32(power).view(np.float32))
        row[j] = np.uint16((np.uint32(power) + np.uint32(0x8000)) >> np.uint32(16))
    return total


@_inlined
def _in_range(total):  # type: ignore[no-untyped-def]
    """Whether a sum of powers says that none was cut off that matters, and none overflows when multiplied."""
    return total > _LEAST_SUM and total < _MOST_SUM


@_compiled
def exponentiate(scores: Numbers, queries: int, keys: int, scale: np.float32, sums: Floats) -> bool:
    """2**(scale s) in place of scores (H, Q, K), in bfloat16's bits; their sums into (H, Q).

    No maximum is subtracted: bfloat16 has float32's exponents, so that powers far from 1 are as precise. What is behind
    the queries is left as it is, and what is behind the keys becomes 0. Returns whether every row is in range; where
    not, `subtract_maxima` from the scores as they were.
    """
    good = True
    for head in range(scores.shape[0]):
        scores[head, :, keys:] = _MASKED  # before any is read: a wide load waits for narrow stores
        for i in range(queries):
            total = _exponentiate(scores[head, i], scale)
            sums[head, i] = total
            good &= _in_range(total)
        scores[head, :, keys:] = 0
    return good


@_compiled
def subtract_maxima(scores: Numbers, queries: int, keys: int, sums: Floats) -> None:
    """Subtracts from scores (H, Q, K) the largest of their row, where sums (H, Q) by `exponentiate` are out of range.

    Only there, so that a row's bytes do not depend on the rows beside it.
    """
    row = np.empty(keys, np.float32)
    for head in range(scores.shape[0]):
        for i in range(queries):
            if not _in_range(sums[head, i]):
                for j in range(keys):
                    row[j] = _float(scores[head, i, j])
                top = row.max()
                for j in range(keys):
                    row[j] -= top
                _store(row, scores[head, i])


@_compiled
def divide(mixed: Numbers, sums: Floats, out: Numbers, start: int, stop: int, first: int) -> None:
    """Divides (H, Q, D) by sums (H, Q) into rows of out (T, N, D), from the head `first` on; in bfloat16's bits."""
    heads, width = mixed.shape[0], mixed.shape[2]
    row = np.empty((heads, width), np.float32)
    for i in range(min(mixed.shape[1], stop - start)):
        for head in range(heads):
            per_sum = _ONE / sums[head, i]
            for j in range(width):
                row[head, j] = _float(mixed[head, i, j]) * per_sum
        _store(row.ravel(), out[start + i, first : first + heads].ravel())
