"""Augmented copies: their rates, their seeds, and what substitutions look like."""

from collections import Counter

import numpy as np
import pytest

from distil_rank.codes.augment import AMINO_ACIDS, BACKGROUND, augmented, substitution_probabilities
from distil_rank.options.codes import AugmentationOptions

PROTEIN = "".join(np.random.default_rng(0).choice(list(AMINO_ACIDS), 400))


def test_windows_and_substitutions_at_their_rates():
    [window] = augmented(PROTEIN, AugmentationOptions(copies=1, window=0.6, substitutions=0))
    assert len(window) == 240 and window in PROTEIN
    [mutant] = augmented(PROTEIN, AugmentationOptions(copies=1, window=1, substitutions=0.25))
    assert len(mutant) == 400 and sum(a != b for a, b in zip(mutant, PROTEIN, strict=True)) == 100
    assert {len(copy) for copy in augmented(PROTEIN, AugmentationOptions(copies=5))} == {280}


def test_the_same_protein_gets_the_same_copies():
    assert augmented(PROTEIN, AugmentationOptions(copies=4))[:2] == augmented(PROTEIN, AugmentationOptions(copies=2))
    assert augmented(PROTEIN, AugmentationOptions(seed=1)) != augmented(PROTEIN, AugmentationOptions(seed=2))
    assert len(set(augmented(PROTEIN, AugmentationOptions(copies=8)))) == 8


def test_substitutions_follow_blosum():
    counts = Counter(
        (a, b)
        for seed in range(60)
        for a, b in zip(
            PROTEIN, augmented(PROTEIN, AugmentationOptions(window=1, substitutions=1, seed=seed))[0], strict=True
        )
    )
    seen = np.array([[counts[a, b] for b in AMINO_ACIDS] for a in AMINO_ACIDS], dtype=float)
    assert not seen.diagonal().any()
    assert np.abs(seen / seen.sum(1, keepdims=True) - substitution_probabilities()).max() < 0.05


def test_the_table_is_blosum62():
    """Symmetric scores whose target frequencies with the background sum to about one, as their definition says."""
    table = substitution_probabilities()
    p = BACKGROUND / BACKGROUND.sum()
    odds = table / p  # up to a factor for each row
    for a, b, c, d in [("I", "V", "I", "P"), ("K", "R", "K", "W"), ("F", "Y", "F", "G"), ("D", "E", "D", "L")]:
        i, j, k, m = (AMINO_ACIDS.index(letter) for letter in (a, b, c, d))
        assert odds[i, j] > 4 * odds[k, m]


@pytest.mark.parametrize("sequence", ["M", "MK", "XXXXXXXX", "ACDXU"])
def test_short_and_odd_sequences(sequence):
    for copy in augmented(sequence, AugmentationOptions(copies=4)):
        assert copy
