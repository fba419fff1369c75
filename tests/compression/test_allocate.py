"""A budget goes where it removes the most residual, and is never exceeded."""

import itertools

import pytest
import torch

from distil_rank.compression.allocate import allocate
from distil_rank.errors import InputError


def cost(ranks, shapes):
    return sum(m * n if ranks[k] is None else ranks[k] * (m + n) for k, (m, n) in shapes.items())


def residual(ranks, spectra):
    return sum(0.0 if r is None else float(spectra[k][r:].sum() / spectra[k].sum()) for k, r in ranks.items())


def test_it_is_the_best_of_all_that_fit():
    torch.manual_seed(0)
    spectra = {
        name: torch.rand(6).sort(descending=True).values ** power for name, power in [("a", 1), ("b", 4), ("c", 2)]
    }
    shapes = dict.fromkeys(spectra, (16, 16))
    for budget in (96, 160, 320, 448):
        chosen = allocate(spectra, shapes, budget)
        assert cost(chosen, shapes) <= budget
        every = (dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(range(1, 7), repeat=3))
        best = min(residual(ranks, spectra) for ranks in every if cost(ranks, shapes) <= budget)
        assert residual(chosen, spectra) == pytest.approx(best)


def test_a_layer_past_its_break_even_becomes_dense():
    spectra = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0]), "b": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    shapes = {"a": (4, 4), "b": (4, 4)}
    assert allocate(spectra, shapes, 24) == {"a": None, "b": 1}
    assert allocate(spectra, shapes, 32)["a"] is None


def test_every_layer_gets_something():
    spectra = {"loud": torch.tensor([9.0, 9.0, 9.0]), "mute": torch.zeros(3)}
    assert allocate(spectra, dict.fromkeys(spectra, (8, 8)), 48) == {"loud": 2, "mute": 1}
    with pytest.raises(InputError, match=r"rank 1 in all 2 layers \(32 weights\) but got 31"):
        allocate(spectra, dict.fromkeys(spectra, (8, 8)), 31)
