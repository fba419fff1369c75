"""Representations of the same proteins, side by side: the full vector, students, other matrices, and the baselines.

What has to be fitted (a mean, directions) is fitted on the rows of the fit groups only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
FULL, COMPOSITION, CHANCE, ALIGNMENT = "full vector", "composition", "chance", "MMseqs2"
Role = Literal["reference", "student", "matrix", "baseline", "chance"]


@dataclass(frozen=True)
class Representation:
    """Rows ready to be compared by their inner product.

    Attributes:
        name: in tables.
        queries: `(N, d)` float32, of unit length.
        targets: `(N, d)`, as they come out of what is stored; the same as `queries` where nothing is quantised.
        bytes: stored for each protein.
        cost: of computing it, as a share of the full backbone's; None where it is not known.
    """

    name: str
    queries: Tensor
    targets: Tensor
    bytes: float
    cost: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A representation that is made when its turn comes, so that one at a time is in memory.

    Attributes:
        name: in tables.
        role: what it is in the comparison.
        make: maps the rows to fit on, `(N,)` bool, to the representation.
        note: what a reader must know of it.
    """

    name: str
    role: Role
    make: Callable[[np.ndarray], Representation]
    note: str | None = None


def full_vector(x: np.ndarray, name: str = FULL, role: Role = "reference", cost: float | None = None) -> Candidate:
    """The vectors themselves, `(N, d)`, centred on the mean of the fit rows."""

    def make(fit: np.ndarray) -> Representation:
        mean = x[fit].mean(axis=0, dtype=np.float64).astype(np.float32)
        rows = _unit(torch.from_numpy(np.asarray(x) - mean))  # a new array: a mapped one cannot be written to
        return Representation(name, rows, rows, x.shape[1] * 4, cost)

    return Candidate(name, role, make)


def variance_student(x: np.ndarray, rank: int) -> Candidate:
    """The student of `rank` that keeps most variance: the closed form of the identity layer, in its inner activation.

    Angles and distances of its outputs are those of the `rank` numbers inside, so that these are what is stored.
    """
    if not 1 <= rank <= x.shape[1]:
        raise InputError(f"Expected ranks in [1, {x.shape[1]}], the width of the vectors, but got {rank}.")
    name = f"student, rank {rank}"

    def make(fit: np.ndarray) -> Representation:
        moments = Moments.of(torch.from_numpy(np.asarray(x)[rows]) for rows in _blocks(np.flatnonzero(fit)))
        factors = solve(torch.eye(x.shape[1]), None, rank, "closed_form", moments)
        offset = factors.A @ moments.mean
        parts = [torch.from_numpy(np.asarray(x)[rows]).double() @ factors.A.T - offset for rows in _blocks(len(x))]
        rows = _unit(torch.cat(parts).float())
        return Representation(name, rows, rows, 4 * rank)

    return Candidate(name, "student", make)


def module_output(
    name: str, module: nn.Module, x: np.ndarray, bytes_per_protein: float, cost: float | None
) -> Candidate:
    """What a student or a code map makes of the vectors `(N, d)`.

    A student's outputs are centred on those of the fit rows. A module with `encode` and `decode` is a code map: its
    output is the query, and what `decode` makes of the stored code is the target.
    """

    @torch.no_grad()
    def make(fit: np.ndarray) -> Representation:
        blocks = [torch.from_numpy(np.array(x[rows])) for rows in _blocks(len(x))]
        output = torch.cat([module(block) for block in blocks])
        if hasattr(module, "encode") and hasattr(module, "decode"):
            encode, decode = cast(Callable[..., Tensor], module.encode), cast(Callable[..., Tensor], module.decode)
            targets = torch.cat([decode(encode(block)) for block in blocks])
            return Representation(name, _unit(output), _unit(targets), bytes_per_protein, cost)
        rows = _unit(output - output[torch.from_numpy(fit)].mean(0))
        return Representation(name, rows, rows, bytes_per_protein, cost)

    note = f"{name} was fitted elsewhere: none of the judged proteins may have been among its calibration data"
    return Candidate(name, "student", make, note)


def student_bytes(module: nn.Module, dim: int) -> float:
    """Bytes that must be stored for each protein for a student to give its outputs: its inner activation in float32."""
    if hasattr(module, "bytes_per_protein"):
        return float(module.bytes_per_protein)  # type: ignore[arg-type]
    return 4.0 * (module.rank if isinstance(module, LowRankLinear) else dim)


def composition(sequences: Sequence[str]) -> Candidate:
    """Shares of the twenty amino acids and the logarithm of the length, each standardised on the fit rows."""

    def make(fit: np.ndarray) -> Representation:
        counts = np.array([[sequence.upper().count(letter) for letter in AMINO_ACIDS] for sequence in sequences])
        lengths = np.maximum([len(sequence) for sequence in sequences], 1)[:, None]
        features = np.hstack([counts / lengths, np.log(lengths)])
        spread = features[fit].std(axis=0)
        features = (features - features[fit].mean(axis=0)) / np.where(spread > 0, spread, 1)
        rows = _unit(torch.from_numpy(features).float())
        return Representation(COMPOSITION, rows, rows, 4.0 * features.shape[1], 0.0)

    return Candidate(COMPOSITION, "baseline", make)


def _blocks(rows: np.ndarray | int) -> list[np.ndarray]:
    rows = np.arange(rows) if isinstance(rows, int) else rows
    return np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)
