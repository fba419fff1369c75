"""Attention in bfloat16 on a CPU: two batched products of oneDNN, and a compiled softmax between them.

torch's own attention multiplies small blocks of queries and keys, at a third of the processor's rate. Here a product
has as many queries and heads as go into its cache with their scores, which are rounded to bfloat16.
"""

from __future__ import annotations

from math import e, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distil_rank.embedding.int8 import kernels

MULTIPLE = 16  # of queries and keys: oneDNN compiles a product for each shape
SCORES = 5 * 2**19  # at once; two bytes each


def padding(length: int) -> int:
    """Rows behind a sequence of that length that `attend` reads."""
    return -length % MULTIPLE


def attend(qkv: Tensor, start: int, length: int, heads: slice, attended: Tensor) -> None:
    """Attention of some heads within one sequence.

    Args:
        qkv: Queries, keys and values of all heads, (3, H, T + `MULTIPLE`, D) bfloat16. What is in the rows behind a
            sequence has no effect, but has to be finite.
        start: The sequence's first row.
        length: Its rows.
        heads: Which ones.
        attended: (T, H, D) bfloat16, where the result is written.
    """
    q, k, v = qkv[:, heads, start : start + length + padding(length)]  # (heads, rows, D)
    k = k.transpose(1, 2)
    scale = np.float32(log2(e) / q.shape[2] ** 0.5)
    size = max(SCORES // q.shape[1] // MULTIPLE, 1) * MULTIPLE  # queries
    together = max(SCORES // (min(size, q.shape[1]) * q.shape[1]), 1)
    out = bits(attended)
    for first in range(0, len(q), together):
        some = slice(first, first + together)
        for row in range(0, length, size):
            weights, sums = _weights(q[some, row : row + size], k[some], length - row, length, scale)
            mixed = torch.bmm(weights, v[some])
            kernels.divide(bits(mixed), sums, out, start + row, start + length, heads.start + first)


def _weights(q: Tensor, k: Tensor, queries: int, keys: int, scale: np.float32) -> tuple[Tensor, NDArray[np.float32]]:
    """Powers of the scores of so many queries and keys, (H, Q, K), and their sums, (H, Q)."""
    scores = torch.bmm(q, k)
    sums = np.empty(scores.shape[:2], np.float32)
    visible = min(queries, scores.shape[1]), keys
    if not kernels.exponentiate(bits(scores), *visible, scale, sums):
        scores = torch.bmm(q, k)
        kernels.subtract_maxima(bits(scores), *visible, sums)
        kernels.exponentiate(bits(scores), *visible, scale, sums)
    return scores, sums


def bits(x: Tensor) -> NDArray[np.uint16]:
    """A bfloat16 tensor's memory as numpy, which does not know the type, and the kernels take it."""
    array: NDArray[np.uint16] = x.view(torch.uint16).numpy()
    return array
