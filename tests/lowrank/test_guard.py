"""The guard's estimate is the true error, on average, wherever the input lies."""

import pytest
import torch
from torch import nn

from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.errors import InputError
from distil_rank.lowrank.guard import QUANTILE, Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments

N, M = 48, 40


@pytest.fixture
def case():
    torch.manual_seed(0)
    spread = torch.logspace(0.5, -1.5, N)
    teacher = nn.Linear(N, M)
    train, held_out = (torch.randn(2000, N) * spread + 1 for _ in range(2))
    student = LowRankLinear.from_linear(teacher, 8, Moments.of(train))
    return teacher, student, held_out


def true_error(teacher, student, x, scale):
    return (teacher(x) - student(x)).square().sum(-1) / scale


@torch.no_grad()
def test_the_estimate_is_calibrated_on_data_like_those_it_was_made_for(case):
    teacher, student, x = case
    guard = Guard.of(teacher, student, x, size=32)
    true = true_error(teacher, student, x, guard.scale)
    y = teacher(x)
    r2 = 1 - (y - student(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert float(guard(x).mean()) == pytest.approx(float(1 - r2), rel=1e-4)
    assert float(guard.flags(x).float().mean()) == pytest.approx(1 - QUANTILE, abs=0.002)
    relative = (guard(x) / true - 1).square().mean().sqrt()
    assert relative < 1.3 * (2 / 32) ** 0.5


@torch.no_grad()
def test_it_sees_far_off_inputs_that_the_student_gets_wrong(case):
    teacher, student, x = case
    guard = Guard.of(teacher, student, x)
    strange = torch.randn(500, N) * 3  # energy where the calibration data had none
    assert guard.flags(strange).float().mean() > 0.99
    ratio = guard(strange) / true_error(teacher, student, strange, guard.scale)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.15)


@torch.no_grad()
def test_far_off_inputs_that_the_student_still_gets_right_pass(case):
    teacher, student, x = case
    guard = Guard.of(teacher, student, x)
    along = torch.linalg.pinv(student.A) @ torch.randn(student.rank, 200) * 10  # within what A sees, but far away
    error = teacher(along.T) - student(along.T)
    right = error.square().sum(1) / guard.scale < guard.threshold / 4
    assert not guard.flags(along.T)[right].any()


@torch.no_grad()
def test_a_truncated_student_has_the_guard_and_threshold_of_its_own_rank(case):
    teacher, student, x = case
    student.guard = Guard.of(teacher, student, x)
    assert len(student.guard.thresholds) == student.rank
    for rank in (1, 3, 7):
        small = student.truncate(rank)
        direct = Guard.of(teacher, small, x)
        errors = small.expected_error(x) * small.guard.scale, direct(x) * direct.scale
        torch.testing.assert_close(*errors, rtol=1e-3, atol=1e-5)
        assert len(small.guard.thresholds) == rank
        assert float(small.guard.flags(x).float().mean()) == pytest.approx(1 - QUANTILE, abs=0.002)
        assert small.guard.calibrated(small, x).thresholds == pytest.approx(small.guard.thresholds, rel=1e-4)


@torch.no_grad()
def test_a_guard_that_knows_the_saved_rank_only_says_so_at_a_lower_one(case):
    teacher, student, x = case
    guard = Guard.of(teacher, student, x)
    student.guard = Guard(guard.sketch, guard.offset, guard.scale, [guard.threshold])
    small = student.truncate(3)
    assert student.guard.flags(x).any()
    with pytest.raises(InputError, match="calibrated guard"):
        small.guard.flags(x)
    assert small.guard.calibrated(small, x).flags(x).any()


@torch.no_grad()
def test_thresholds_of_an_int8_student_hold_at_every_rank(case):
    teacher, student, x = case
    student.guard = Guard.of(teacher, student, x)
    small = Int8LowRankLinear.from_low_rank(student).truncate(4)
    assert float(small.guard.flags(x).float().mean()) == pytest.approx(1 - QUANTILE, abs=0.005)


@torch.no_grad()
def test_an_int8_student_brings_the_error_of_its_rounding(case):
    teacher, _, x = case
    exact = LowRankLinear.from_linear(teacher, M, Moments.of(x))
    exact.guard = Guard.of(teacher, exact, x)
    small = Int8LowRankLinear.from_low_rank(exact)
    true = (teacher(x) - small(x)).square().sum(1).mean() / (teacher(x) - teacher(x).mean(0)).square().sum(1).mean()
    assert small.expected_error(x).mean() == pytest.approx(float(true), rel=0.3)
    assert small.expected_error(x).mean() > 1e3 * exact.expected_error(x).mean()


def test_it_moves_with_the_layer_but_stays_out_of_its_state(case):
    teacher, student, x = case
    before = set(student.state_dict())
    student.guard = Guard.of(teacher, student, x)
    assert set(student.state_dict()) == before
    assert student.to("meta").guard.sketch.device.type == "meta"


def test_no_guard_and_no_rows_are_clear_errors(case):
    teacher, student, x = case
    with pytest.raises(InputError, match="this one has none"):
        student.expected_error(x)
    with pytest.raises(InputError, match="at least 2 rows"):
        Guard.of(teacher, student, x[:1])
