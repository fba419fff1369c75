"""Groups in parts."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.recommendation.parts import LEAST, SHARES, joined, split_parts


@pytest.mark.parametrize("shares", [SHARES, (0.25,) * 4])
def test_no_group_is_cut_and_shares_are_about_right(shares):
    group = np.random.default_rng(0).integers(200, size=3000)
    part = split_parts(group, shares, seed=3)
    for number in range(200):
        assert len(set(part[group == number])) <= 1
    assert np.bincount(part) / len(part) == pytest.approx(shares, abs=0.03)
    assert (split_parts(group, shares, seed=4) != part).any()


def test_one_group_that_holds_most_leaves_enough_for_every_part():
    group = np.concatenate([np.zeros(5000, int), np.arange(1, 40)])
    part = split_parts(group)
    assert all(len(set(group[part == side])) >= LEAST for side in range(3))


def test_too_few_groups_are_refused_with_how_many_are_needed():
    with pytest.raises(InputError, match=r"at least 30 groups .* but got 7"):
        split_parts(np.arange(7))


def test_joined_groups_are_cut_by_none():
    rng = np.random.default_rng(1)
    first, second = rng.integers(40, size=80), rng.integers(-1, 60, size=80)
    both = joined([first, second])
    for grouping in (first, second):
        for number in range(grouping.max() + 1):
            assert len(set(both[grouping == number])) <= 1
    assert both.max() + 1 > 1
