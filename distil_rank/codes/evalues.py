"""E-values of hits: how many targets as near as this one a query without relatives would find, told by decoys.

Decoys are proteins that have no relatives by construction, sent through the same backbone, code map and search as the
queries. All that they find is false (target-decoy estimation: Elias and Gygi, Nature Methods 4, 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import genpareto

from distil_rank.errors import InputError

TAIL = 0.002  # share of the decoys' scores that the tail is fitted to
LEAST = 200  # scores in the tail, as far as there are any
LEAST_SHARE = 1e-300  # a bounded tail ends, but an E-value of 0 would claim certainty


@dataclass(frozen=True)
class Tail:
    """The upper tail of the decoys' scores.

    Up to a high threshold the share of decoy scores that reach s is counted; the excess over it follows a generalised
    Pareto distribution (Pickands, Annals of Statistics 3, 1975). Its shape is fitted: scores end at 1, so that an
    exponential tail, right for the unbounded scores of alignments, would state far too many false hits.

    Attributes:
        scores: the sorted scores below the threshold, thinned.
        threshold: u.
        rate: share of all scores above u.
        scale: of the excess over u.
        shape: of the excess; below 0 the tail ends.
    """

    scores: np.ndarray
    threshold: float
    rate: float
    scale: float
    shape: float

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
        excess = np.maximum(flat[-count:].astype(np.float64) - threshold, np.finfo(np.float32).eps)
        shape, _, scale = genpareto.fit(excess, floc=0)
        below = flat[: -count : max(1, len(flat) // 10_000)]
        return cls(below, threshold, count / len(flat), float(scale), float(shape))

    def share(self, scores: np.ndarray) -> np.ndarray:
        """Share of the targets that a decoy finds at these scores or better, any shape."""
        below = 1 - np.searchsorted(self.scores, scores) / len(self.scores) * (1 - self.rate)
        excess = np.maximum(scores - self.threshold, 0)
        beyond = np.maximum(self.rate * genpareto.sf(excess, self.shape, scale=self.scale), LEAST_SHARE)
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
