"""Representations of the same proteins, side by side: the full vector, students, other matrices, and baselines.

What has to be fitted (a mean, directions) is fitted on the rows of the fit groups only. The baselines need no
embedding: amino-acid composition, and MMseqs2 search among the evaluated sequences.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn

from distil_rank.data.mmseqs import MMSEQS_INSTALLATION, best_hits, mmseqs_binary, mmseqs_search
from distil_rank.errors import InputError
from distil_rank.evaluation.retrieval import Scores
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve

BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
FULL, COMPOSITION, ALIGNMENT = "full vector", "composition", "MMseqs2"
CHANCE, MAJORITY = "chance", "majority"  # permuted labels; one answer for every protein
NO_MMSEQS = f"MMseqs2 is not installed, so not compared with it: {MMSEQS_INSTALLATION}."
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
Role = Literal["reference", "student", "matrix", "baseline", "chance"]
Sides = tuple[Tensor, Tensor]  # queries and targets, `(N, d)` float32; they differ where codes are stored


@dataclass(frozen=True)
class Representation:
    """Vectors as they are stored, or scores, made when their turn comes: one set is in memory."""

    name: str
    role: Role
    bytes: float | None  # stored for each protein; None where nothing is
    # of the rows to fit on, (N,) bool; scores are among the other rows, predictions of them
    make: Callable[[np.ndarray], Sides | Scores | np.ndarray]
    note: str | None = None  # what a reader must know of it


def full_vector(x: np.ndarray, name: str = FULL, role: Role = "reference") -> Representation:
    """The vectors themselves, `(N, d)`, centred on the mean of the fit rows."""

    def make(fit: np.ndarray) -> Sides:
        mean = x[fit].mean(axis=0, dtype=np.float64).astype(np.float32)
        rows = torch.from_numpy(np.asarray(x) - mean)  # a new array: a mapped one cannot be written to
        return rows, rows

    return Representation(name, role, 4 * x.shape[1], make)


def principal_components(x: np.ndarray, rank: int) -> Representation:
    """The first principal components: the closed form of the identity layer, in its inner activation.

    Angles and distances of its outputs are those of the `rank` numbers inside, so that these are what is stored.
    """
    if not 1 <= rank <= x.shape[1]:
        raise InputError(f"Expected ranks in [1, {x.shape[1]}], the width of the vectors, but got {rank}.")

    def make(fit: np.ndarray) -> Sides:
        moments = Moments.of(torch.from_numpy(np.asarray(x)[rows]) for rows in _blocks(np.flatnonzero(fit)))
        factors = solve(torch.eye(x.shape[1]), None, rank, "closed_form", moments)
        blocks = (torch.from_numpy(np.asarray(x)[rows]).double() for rows in _blocks(np.arange(len(x))))
        inner = torch.cat([block @ factors.A.T for block in blocks]) - factors.A @ moments.mean
        rows = inner.float()
        return rows, rows

    return Representation(f"student, rank {rank}", "student", 4 * rank, make)


def module_output(name: str, module: nn.Module, x: np.ndarray, note: str | None = None) -> Representation:
    """What a student or an encoder makes of the vectors `(N, d)`.

    A student's outputs are centred on those of the fit rows; stored is its inner activation in float32. An encoder's
    output is the query, and what it decodes of the stored code is the target.
    """

    @torch.no_grad()
    def make(fit: np.ndarray) -> Sides:
        blocks = [torch.from_numpy(np.array(x[rows])) for rows in _blocks(np.arange(len(x)))]
        output = torch.cat([module(block) for block in blocks])
        if hasattr(module, "encode") and hasattr(module, "decode"):
            encode, decode = cast(Callable[..., Tensor], module.encode), cast(Callable[..., Tensor], module.decode)
            return output, torch.cat([decode(encode(block)) for block in blocks])
        rows = output - output[torch.from_numpy(fit)].mean(0)
        return rows, rows

    stored = float(getattr(module, "bytes_per_protein", 0)) or 4.0 * (getattr(module, "rank", None) or x.shape[1])
    return Representation(name, "student", stored, make, note)


def composition(sequences: Sequence[str]) -> Representation:
    """Shares of the twenty amino acids and the logarithm of the length, each standardised on the fit rows."""

    def make(fit: np.ndarray) -> Sides:
        counts = np.array([[sequence.upper().count(letter) for letter in AMINO_ACIDS] for sequence in sequences])
        lengths = np.maximum([len(sequence) for sequence in sequences], 1)[:, None]
        features = np.hstack([counts / lengths, np.log(lengths)])
        spread = features[fit].std(axis=0)
        features = (features - features[fit].mean(axis=0)) / np.where(spread > 0, spread, 1)
        rows = torch.from_numpy(features).float()
        return rows, rows

    return Representation(COMPOSITION, "baseline", 4.0 * (len(AMINO_ACIDS) + 1), make)


def alignment(sequences: Sequence[str]) -> Representation:
    """MMseqs2's search among the evaluated sequences, by bit score; −∞ where no alignment was found."""

    def make(fit: np.ndarray) -> Scores:
        evaluated = [sequences[row] for row in np.flatnonzero(~fit).tolist()]
        with tempfile.TemporaryDirectory(prefix="distil-rank-") as folder:
            found = mmseqs_search(evaluated, evaluated, Path(folder))
        values = found.column("bits").astype(np.float32)
        bits = csr_array((values, (found.query, found.target)), shape=(len(evaluated), len(evaluated)))

        def scores(queries: np.ndarray, targets: np.ndarray) -> Tensor:
            block = bits[queries][:, targets].toarray()
            return torch.from_numpy(np.where(block > 0, block, -np.inf).astype(np.float32))

        return scores

    return Representation(ALIGNMENT, "baseline", None, make)


def nearest_neighbour(x: np.ndarray, y: np.ndarray) -> Representation:
    """The label of the fit protein whose centred vector has the smallest angle to each other protein's."""

    def make(fit: np.ndarray) -> np.ndarray:
        unit = F.normalize(torch.from_numpy(x - x[fit].mean(axis=0)))
        return y[fit][(unit[torch.from_numpy(~fit)] @ unit[torch.from_numpy(fit)].T).argmax(1).numpy()]

    return Representation("nearest neighbour", "baseline", None, make)


def best_hit(sequences: Sequence[str], y: np.ndarray) -> Representation:
    """The label of MMseqs2's best hit among the fit proteins; where it finds none, the mean, or the most frequent."""

    def make(fit: np.ndarray) -> np.ndarray:
        queries, targets = ([sequences[row] for row in np.flatnonzero(side).tolist()] for side in (~fit, fit))
        hit, _ = best_hits(queries, targets)
        rows, counts = np.unique(y[fit], axis=0, return_counts=True)
        answers = y[fit][hit]
        answers[hit < 0] = y[fit].mean() if y.dtype.kind == "f" else rows[counts.argmax()]
        return answers

    return Representation(f"{ALIGNMENT} best hit", "baseline", None, make)


def sequence_baselines(
    sequences: Sequence[str] | None, align: Callable[[Sequence[str]], Representation] | None
) -> tuple[list[Representation], list[str]]:
    """Composition and, where it is asked for and MMseqs2 is installed, `align`; and notes on what is missing."""
    if sequences is None:
        return [], ["No sequences in the data: not compared with composition and MMseqs2."]
    if align is None or mmseqs_binary() is None:
        return [composition(sequences)], [] if align is None else [NO_MMSEQS]
    return [composition(sequences), align(sequences)], []


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))
