"""What is fitted, chosen and confirmed on."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.recommendation.parts import LEAST, SHARES, split_parts


@pytest.mark.parametrize("shares", [SHARES, (0.25,) * 4])
def test_no_group_is_cut_and_shares_are_about_right(shares):
    group = np.random.default_rng(0).integers(200, size=3000)
    part = split_parts(group, shares, seed=3)
    for number in range(200):
        assert len(set(part[group == number])) <= 1
    assert np.bincount(part) / len(part) == pytest.approx(shares, abs=0.03)
    assert (split_parts(group, shares, seed=4) != part).any()


def test_every_purpose_has_enough_groups_or_the_message_says_how_many():
    group = np.concatenate([np.zeros(5000, int), np.arange(1, 40)])
    part = split_parts(group)
    assert all(len(set(group[part == side])) >= LEAST for side in range(3))
    with pytest.raises(InputError, match=r"at least 30 groups .* but got 7"):
        split_parts(np.arange(7))
