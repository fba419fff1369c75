"""Rounding to int8 changes little, costs a quarter of the bytes, and keeps the nested ranks."""

import pytest
import torch
from torch import nn

from distil_rank.compression.int8 import Int8LowRankLinear, quantise_rows
from distil_rank.errors import InputError
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments


@pytest.fixture
def student():
    torch.manual_seed(1)
    x = torch.randn(600, 40) * torch.logspace(0, -1, 40) + 2
    teacher = nn.Linear(40, 30)
    return teacher, LowRankLinear.from_linear(teacher, 12, Moments.of(x)), x


def test_no_element_is_off_by_more_than_half_a_step():
    matrix = torch.randn(50, 64) * torch.logspace(-9, 9, 50)[:, None]
    steps, scale = quantise_rows(matrix)
    off = (steps.double() * scale.double()[:, None] - matrix.double()).abs() / scale.double()[:, None]
    assert off.max() <= 0.76  # half a step, and a quarter where the largest element is cut at 127
    assert steps.abs().max() <= 127


def test_rows_of_zeros_stay_zero():
    steps, scale = quantise_rows(torch.zeros(2, 3))
    assert not steps.any() and not scale.any()


@torch.no_grad()
def test_fidelity_hardly_falls_and_the_mean_is_kept_exactly(student):
    teacher, exact, x = student
    small = Int8LowRankLinear.from_low_rank(exact)
    y = teacher(x)
    r2 = [float(1 - (y - s(x)).square().sum() / (y - y.mean(0)).square().sum()) for s in (exact, small)]
    assert r2[0] - r2[1] < 1e-3
    torch.testing.assert_close(small(x).mean(0), exact(x).mean(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_bytes(student):
    _, exact, _ = student
    small = Int8LowRankLinear.from_low_rank(exact)
    size = {name: value.element_size() * value.numel() for name, value in small.state_dict().items()}
    assert size == {"A": 480, "B": 360, "A_scale": 24, "B_scale": 60, "bias": 120, "kept_mean": 48}


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_slices_follow_the_float_student(student, rank):
    teacher, exact, x = student
    exact.guard = Guard.of(teacher, exact, x)
    small = Int8LowRankLinear.from_low_rank(exact)
    for layer in (small.truncate(rank), small.dequantised().truncate(rank)):
        torch.testing.assert_close(layer(x), exact.truncate(rank)(x), atol=0.02, rtol=0)
        assert layer.provenance["r2"] == exact.provenance["r2"][:rank]
        torch.testing.assert_close(layer.guard(x), exact.truncate(rank).guard(x), atol=0.05, rtol=0.05)
    torch.testing.assert_close(small.dequantised()(x), small(x), atol=1e-5, rtol=0)


def test_half_precision_inputs_and_no_bias():
    layer = Int8LowRankLinear.from_low_rank(LowRankLinear(8, 6, 2, bias=False))
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.truncate(1).bias is None
    with pytest.raises(InputError, match=r"\[1, 2\]"):
        layer.truncate(3)
