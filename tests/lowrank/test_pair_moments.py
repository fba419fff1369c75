"""Sums over pairs and groups against the textbook formula."""

import torch
from distil_rank.lowrank.pair_moments import WithinSums


def test_groups_in_any_order_and_in_any_number_of_calls():
    torch.manual_seed(0)
    x, group = torch.randn(60, 5), torch.randint(0, 9, (60,))
    expected, freedom = torch.zeros(5, 5).double(), 0
    for number in group.unique():
        rows = x[group == number].double()
        expected += torch.cov(rows.T, correction=0).reshape(5, 5) * len(rows)
        freedom += len(rows) - 1
    at_once, streamed = WithinSums.zeros(5), WithinSums.zeros(5)
    at_once.add_groups(x, group)
    for number in group.unique():
        streamed.add_groups(x[group == number], group[group == number])
    assert at_once.freedom == streamed.freedom == freedom
    assert torch.allclose(at_once.covariance(), expected / freedom)
    assert torch.allclose(streamed.covariance(), at_once.covariance())


def test_pairs_are_groups_of_two():
    torch.manual_seed(1)
    a, b = torch.randn(30, 4), torch.randn(30, 4)
    pairs, groups = WithinSums.zeros(4), WithinSums.zeros(4)
    pairs.add_pairs(a, b)
    groups.add_groups(torch.cat([a, b]), torch.arange(30).repeat(2))
    assert torch.allclose(pairs.covariance(), groups.covariance())
    assert torch.allclose(pairs.covariance(), ((a - b).double().T @ (a - b).double()) / 60)


def test_rows_that_are_alone_say_nothing():
    sums = WithinSums.zeros(3)
    sums.add_groups(torch.randn(4, 3), torch.arange(4))
    assert sums.freedom == 0 and not sums.covariance().any()
