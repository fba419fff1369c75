"""E-values of hits: how many targets as near as this one a query without relatives would find, told by decoys.

Decoys are proteins that have no relatives by construction, sent through the same backbone, code map and search as the
queries. All that they find is false (target-decoy estimation: Elias and Gygi, Nature Methods 4, 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distil_rank.errors import InputError

TAIL = 0.002  # share of the decoys' scores that the tail is fitted to
LEAST = 200  # scores in the tail, as far as there are any


@dataclass(frozen=True)
class Tail:
    """The upper tail of the decoys' scores.

    Up to the highest scores the share of decoy scores that reach s is counted; beyond the threshold it falls as
    `rate · exp(−(s − threshold) / scale)`, the excess over a high threshold being exponential for scores whose maxima
    are Gumbel distributed (Pickands, Annals of Statistics 3, 1975), as those of alignments are.

    Attributes:
        scores: the sorted scores below the threshold, thinned.
        threshold: u.
        rate: share of all scores above u.
        scale: mean excess over u.
    """

    scores: np.ndarray
    threshold: float
    rate: float
    scale: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Tail:
        """The tail of decoy scores, any shape.

        Raises:
            InputError: fewer than two scores.

        >>> tail = Tail.of(np.random.default_rng(0).exponential(0.1, 100_000))
        >>> bool(abs(tail.share(np.array([1.0]))[0] / np.exp(-10) - 1) < 0.5)
        True
        """
        flat = np.sort(scores, axis=None)
        if len(flat) < 2:
            raise InputError(f"Expected at least 2 scores of decoys but got {len(flat)}; use more decoys.")
        count = min(max(round(TAIL * len(flat)), min(LEAST, len(flat) // 2)), len(flat) - 1)
        threshold = float(flat[-count - 1])
        scale = max(float(flat[-count:].mean()) - threshold, float(np.finfo(np.float32).eps))
        return cls(flat[: -count : max(1, len(flat) // 10_000)], threshold, count / len(flat), scale)

    def share(self, scores: np.ndarray) -> np.ndarray:
        """Share of the targets that a decoy finds at these scores or better, any shape."""
        below = 1 - np.searchsorted(self.scores, scores) / len(self.scores) * (1 - self.rate)
        beyond = self.rate * np.exp(-np.maximum(scores - self.threshold, 0) / self.scale)
        return np.where(scores > self.threshold, beyond, np.maximum(below, self.rate))

    def evalues(self, scores: np.ndarray, targets: int) -> np.ndarray:
        """False hits of this score or better to expect for one query among so many targets."""
        return targets * self.share(scores)


def reversed_decoy(sequence: str) -> str:
    """The sequence read from its end: the same composition, repeats and low complexity, and no relative.

    >>> reversed_decoy("MKV")
    'VKM'
    """
    return sequence[::-1]
