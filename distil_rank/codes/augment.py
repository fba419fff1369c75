"""Copies of a protein that a function should survive: windows of its sequence, and substitutions that evolution allows.

What changes between a protein and its perturbed copies is noise for whoever looks for homologues. Its covariance stands
in for the covariance within families where nobody has labelled any.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from distil_rank.errors import InputError

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
# BLOSUM62 in half bits, lower triangle, and its background frequencies (Henikoff and Henikoff, PNAS 89, 1992).
BLOSUM62 = """4
-1 5
-2 0 6
-2 -2 1 6
0 -3 -3 -3 9
-1 1 0 0 -3 5
-1 0 0 2 -4 2 5
0 -2 0 -1 -3 -2 -2 6
-2 0 1 -1 -3 0 0 -2 8
-1 -3 -3 -3 -1 -3 -3 -4 -3 4
-1 -2 -3 -4 -1 -2 -3 -4 -3 2 4
-1 2 0 -1 -3 1 1 -2 -1 -3 -2 5
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1 5
-2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7
1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7
0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1 4"""
BACKGROUND = np.array(
    [74, 52, 45, 54, 25, 34, 54, 74, 26, 68, 99, 58, 25, 47, 39, 57, 51, 13, 32, 73], dtype=np.float64
)
LAMBDA = np.log(2) / 2  # of scores in half bits


def substitution_probabilities() -> np.ndarray:
    """What an amino acid is replaced by when it is, `(20, 20)` in the order of `AMINO_ACIDS`; rows sum to 1.

    `P(b | a) ∝ p_b exp(λ s_ab)` for `b ≠ a`: the target frequencies behind the scores (Karlin and Altschul 1990).

    >>> table = substitution_probabilities()
    >>> AMINO_ACIDS[table[AMINO_ACIDS.index("I")].argmax()], bool(np.allclose(table.sum(1), 1))
    ('V', True)
    """
    scores = np.zeros((20, 20))
    for row, line in enumerate(BLOSUM62.splitlines()):
        values = np.array(line.split(), dtype=np.float64)
        scores[row, : row + 1] = values
        scores[: row + 1, row] = values
    table = BACKGROUND * np.exp(LAMBDA * scores)
    np.fill_diagonal(table, 0.0)
    return table / table.sum(axis=1, keepdims=True)


_CUMULATIVE = substitution_probabilities().cumsum(axis=1)


@dataclass(frozen=True)
class Augmentation:
    """How proteins are perturbed: each copy is a window of the sequence in which residues are substituted.

    Args:
        proteins: how many are perturbed, at most.
        copies: of each protein.
        window: share of the sequence that a copy keeps, in (0, 1].
        substitutions: share of its residues that are substituted, in [0, 1].
        seed: of the draws; the same protein gets the same copies in any company.

    Raises:
        InputError: a share or a number out of range.
    """

    proteins: int = 1000
    copies: int = 2
    window: float = 0.7
    substitutions: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.window <= 1 or not 0 <= self.substitutions <= 1:
            raise InputError(
                "Expected a window in (0, 1] and substitutions in [0, 1] but got "
                f"{self.window} and {self.substitutions}."
            )
        if self.window == 1 and self.substitutions == 0:
            raise InputError("Expected copies that differ from the protein; lower the window or raise substitutions.")
        if self.proteins < 1 or self.copies < 1:
            raise InputError(
                f"Expected at least 1 protein and 1 copy of each but got {self.proteins} and {self.copies}."
            )

    def of(self, sequence: str) -> list[str]:
        """The perturbed copies of one sequence.

        >>> [len(copy) for copy in Augmentation(copies=3).of("MKVLAAGICW")]
        [7, 7, 7]
        """
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {sequence}".encode()).digest()[:8])
        dice = np.random.default_rng(seed)
        return [self._substituted(self._window(sequence, dice), dice) for _ in range(self.copies)]

    def _window(self, sequence: str, dice: np.random.Generator) -> str:
        length = max(1, round(self.window * len(sequence)))
        start = int(dice.integers(len(sequence) - length + 1))
        return sequence[start : start + length]

    def _substituted(self, sequence: str, dice: np.random.Generator) -> str:
        letters = list(sequence)
        for place in dice.permutation(len(letters))[: round(self.substitutions * len(letters))]:
            known = AMINO_ACIDS.find(letters[place])  # X and the like stay
            draw = dice.random()
            if known >= 0:
                chosen = min(int(np.searchsorted(_CUMULATIVE[known], draw, "right")), 19)
                letters[place] = AMINO_ACIDS[chosen]
        return "".join(letters)
