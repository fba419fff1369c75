"""Representations of the same proteins, side by side: the full vector, students, other matrices.

What has to be fitted (a mean, directions) is fitted on the rows of the fit groups only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve

BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
FULL = "full vector"
Role = Literal["reference", "student", "matrix", "baseline", "chance"]
Rows = tuple[Tensor, Tensor]  # queries and targets, `(N, d)` float32 of unit length; they differ where codes are stored


@dataclass(frozen=True)
class Representation:
    """Vectors to be compared by their inner product, made when their turn comes, so that one set is in memory."""

    name: str
    role: Role
    bytes: float  # stored for each protein
    make: Callable[[np.ndarray], Rows]  # maps the rows to fit on, (N,) bool, to the vectors
    note: str | None = None  # what a reader must know of it


def full_vector(x: np.ndarray, name: str = FULL, role: Role = "reference") -> Representation:
    """The vectors themselves, `(N, d)`, centred on the mean of the fit rows."""

    def make(fit: np.ndarray) -> Rows:
        mean = x[fit].mean(axis=0, dtype=np.float64).astype(np.float32)
        rows = F.normalize(torch.from_numpy(np.asarray(x) - mean))  # a new array: a mapped one cannot be written to
        return rows, rows

    return Representation(name, role, 4 * x.shape[1], make)


def variance_student(x: np.ndarray, rank: int) -> Representation:
    """The student of `rank` that retains most variance: the closed form of the identity layer, in its inner activation.

    Angles and distances of its outputs are those of the `rank` numbers inside, so that these are what is stored.
    """
    if not 1 <= rank <= x.shape[1]:
        raise InputError(f"Expected ranks in [1, {x.shape[1]}], the width of the vectors, but got {rank}.")

    def make(fit: np.ndarray) -> Rows:
        moments = Moments.of(torch.from_numpy(np.asarray(x)[rows]) for rows in _blocks(np.flatnonzero(fit)))
        factors = solve(torch.eye(x.shape[1]), None, rank, "closed_form", moments)
        blocks = (torch.from_numpy(np.asarray(x)[rows]).double() for rows in _blocks(np.arange(len(x))))
        inner = torch.cat([block @ factors.A.T for block in blocks]) - factors.A @ moments.mean
        rows = F.normalize(inner.float())
        return rows, rows

    return Representation(f"student, rank {rank}", "student", 4 * rank, make)


def module_output(name: str, module: nn.Module, x: np.ndarray, note: str | None = None) -> Representation:
    """What a student or an encoder makes of the vectors `(N, d)`.

    A student's outputs are centred on those of the fit rows; stored is its inner activation in float32. An encoder's
    output is the query, and what it decodes of the stored code is the target.
    """

    @torch.no_grad()
    def make(fit: np.ndarray) -> Rows:
        blocks = [torch.from_numpy(np.array(x[rows])) for rows in _blocks(np.arange(len(x)))]
        output = torch.cat([module(block) for block in blocks])
        if hasattr(module, "encode") and hasattr(module, "decode"):
            encode, decode = cast(Callable[..., Tensor], module.encode), cast(Callable[..., Tensor], module.decode)
            targets = torch.cat([decode(encode(block)) for block in blocks])
            return F.normalize(output), F.normalize(targets)
        rows = F.normalize(output - output[torch.from_numpy(fit)].mean(0))
        return rows, rows

    stored = float(getattr(module, "bytes_per_protein", 0)) or 4.0 * (getattr(module, "rank", None) or x.shape[1])
    return Representation(name, "student", stored, make, note)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))
