"""Whole groups of proteins for three purposes: what is fitted on, chosen on, confirmed on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distil_rank.data.split import split_groups

FIT, VALIDATE, CONFIRM = range(3)
SHARES = (0.5, 0.25, 0.25)  # of the proteins that go to each
LEAST = 10  # groups in each: an interval over fewer says nothing


def split_parts(group: np.ndarray, shares: Sequence[float] = SHARES, seed: int = 0) -> np.ndarray:
    """`split_groups` for a recommendation: which of the purposes each protein serves, `(N,)`."""
    return split_groups(group, shares, seed, least=LEAST)
