"""The student layer."""

import copy

import pytest
import torch
from torch import nn

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.lowrank.moments import Moments


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 2


@pytest.fixture
def dense() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 12)


def test_parameters_of_the_published_size():
    student = LowRankLinear(1280, 1280, 64)
    assert sum(p.numel() for p in student.parameters()) == parameter_count(1280, 1280, 64) == 165_120
    assert sum(p.numel() for p in nn.Linear(1280, 1280).parameters()) == parameter_count(1280, 1280) == 1_639_680


def test_full_rank_is_the_layer(dense, rows):
    for solver in ("svd", "closed_form"):
        student = LowRankLinear.from_linear(dense, 12, Moments.of(rows), solver)
        torch.testing.assert_close(student(rows), dense(rows), rtol=1e-4, atol=1e-4)


def test_a_truncated_student_is_the_optimum_of_its_rank(dense, rows):
    moments = Moments.of(rows)
    student = LowRankLinear.from_linear(dense, 8, moments)
    for rank in (1, 3, 8):
        direct = LowRankLinear.from_linear(dense, rank, moments)
        torch.testing.assert_close(student.truncate(rank)(rows), direct(rows), rtol=1e-4, atol=1e-4)


def test_a_share_of_variance_chooses_the_rank(dense, rows):
    student = LowRankLinear.from_linear(dense, 0.9, Moments.of(rows))
    target = dense(rows)
    retained = 1 - (student(rows) - target).square().sum() / (target - target.mean(0)).square().sum()
    fewer = student.truncate(student.rank - 1)
    lost = 1 - (fewer(rows) - target).square().sum() / (target - target.mean(0)).square().sum()
    assert lost < 0.9 <= retained


def test_as_one_dense_layer(dense, rows):
    student = LowRankLinear.from_linear(dense, 4, Moments.of(rows))
    torch.testing.assert_close(student.to_linear()(rows), student(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_layers(dense, rows, dtype):
    student = LowRankLinear.from_linear(dense.to(dtype), 12, Moments.of(rows))
    assert student.A.dtype == student.B.dtype == dtype
    assert student(rows.to(dtype)).dtype == dtype


def test_a_layer_without_bias(rows):
    dense = nn.Linear(16, 12, bias=False)
    student = LowRankLinear.from_linear(dense, 12, Moments.of(rows))
    torch.testing.assert_close(student(rows), dense(rows), rtol=1e-4, atol=1e-4)


def test_any_leading_dimensions(dense, rows):
    student = LowRankLinear.from_linear(dense, 3, Moments.of(rows))
    assert student(rows.reshape(4, 50, 16)).shape == (4, 50, 12)


def test_impossible_ranks_are_refused(dense, rows):
    with pytest.raises(InputError, match=r"\[1, 12\]"):
        LowRankLinear.from_linear(dense, 13, Moments.of(rows))
    with pytest.raises(InputError, match=r"\[1, 4\]"):
        LowRankLinear.from_linear(dense, 4, Moments.of(rows)).truncate(5)


@torch.no_grad()
def test_what_half_precision_rounds_away_does_not_shift_the_mean():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    x = torch.randn(4000, 64) * torch.logspace(0, -1, 64) + 50
    moments = Moments.of(x)
    student = LowRankLinear.from_linear(linear, 16, moments)
    target = linear.double()(x.double())
    output = copy.deepcopy(student).double()(x.double())
    measured = 1 - (output - target).square().sum() / (target - target.mean(0)).square().sum()
    assert measured == pytest.approx(student.provenance["r2"][-1], abs=1e-3)
    off = (output - target).mean(0).abs().max()
    assert off < 2 * student.bias.abs().max() * 2**-8  # no more than the bias itself is rounded by
