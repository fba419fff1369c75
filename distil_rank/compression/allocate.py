"""Sharing one budget of parameters among many layers."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import break_even_rank


def allocate(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int | None]:
    """Ranks that leave the least residual, as shares of each layer's output variance, within a number of weights.

    The next rank always goes where it removes the most residual for each weight it costs. Eigenvalues fall, so that is
    the best there is, up to the remainder that fits no further rank; a layer that reaches its break-even rank, from
    which two factors hold no fewer weights than the dense matrix, becomes dense instead.

    Args:
        spectra: eigenvalues of each layer's output covariance, largest first, from `output_spectrum`.
        shapes: `(m, n)` of each.
        budget: weights in all, biases not counted.

    Returns:
        A rank for each layer; None where it stays dense.

    Raises:
        InputError: not even rank 1 everywhere fits.

    >>> import torch
    >>> steep, flat = torch.tensor([8.0, 1.0, 0.5, 0.5]), torch.tensor([3.0, 3.0, 2.0, 2.0])
    >>> allocate({"a": steep, "b": flat}, {"a": (8, 8), "b": (8, 8)}, budget=64)
    {'a': 1, 'b': 3}
    """
    cost = dict.fromkeys(spectra, 0)
    rank: dict[str, int | None] = dict.fromkeys(spectra, 0)
    least = sum(sum(shapes[name]) for name in spectra)
    if budget < least:
        raise InputError(f"Expected room for rank 1 in all {len(spectra)} layers ({least} weights) but got {budget}.")

    def gain(name: str, k: int) -> float:
        total = float(spectra[name].sum())
        share = float(spectra[name][k]) / total if total > 0 else 0.0
        return (2.0 if k == 0 else share) / sum(shapes[name])  # no layer goes without

    queue = [(-gain(name, 0), name) for name in spectra]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        m, n = shapes[name]
        next_rank = (rank[name] or 0) + 1
        dense = next_rank >= break_even_rank(n, m)
        price = m * n if dense else next_rank * (m + n)
        if sum(cost.values()) - cost[name] + price > budget:
            continue
        cost[name], rank[name] = price, None if dense else next_rank
        if not dense and next_rank < len(spectra[name]) and spectra[name][next_rank] > 0:
            heapq.heappush(queue, (-gain(name, next_rank), name))
    return rank
