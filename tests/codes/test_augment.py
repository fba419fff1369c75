"""Perturbed copies: their rates, their seeds, and what substitutions look like."""

from collections import Counter

import numpy as np
import pytest

from distil_rank.codes.augment import AMINO_ACIDS, BACKGROUND, Augmentation, substitution_probabilities
from distil_rank.errors import InputError

PROTEIN = "".join(np.random.default_rng(0).choice(list(AMINO_ACIDS), 400))


def test_windows_and_substitutions_at_their_rates():
    [window] = Augmentation(copies=1, window=0.6, substitutions=0).of(PROTEIN)
    assert len(window) == 240 and window in PROTEIN
    [mutant] = Augmentation(copies=1, window=1, substitutions=0.25).of(PROTEIN)
    assert len(mutant) == 400 and sum(a != b for a, b in zip(mutant, PROTEIN, strict=True)) == 100
    assert {len(copy) for copy in Augmentation(copies=5).of(PROTEIN)} == {280}


def test_the_same_protein_gets_the_same_copies():
    assert Augmentation(copies=4).of(PROTEIN)[:2] == Augmentation(copies=2).of(PROTEIN)
    assert Augmentation(seed=1).of(PROTEIN) != Augmentation(seed=2).of(PROTEIN)
    assert len(set(Augmentation(copies=8).of(PROTEIN))) == 8


def test_substitutions_follow_blosum():
    counts = Counter(
        (a, b)
        for seed in range(60)
        for a, b in zip(PROTEIN, Augmentation(window=1, substitutions=1, seed=seed).of(PROTEIN)[0], strict=True)
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
    for copy in Augmentation(copies=4).of(sequence):
        assert copy


def test_what_is_refused():
    for options in (
        {"window": 0.0},
        {"window": 1.5},
        {"substitutions": -0.1},
        {"window": 1.0, "substitutions": 0.0},
        {"copies": 0},
        {"proteins": 0},
    ):
        with pytest.raises(InputError):
            Augmentation(**options)
