"""The exact fidelity from moments is the fidelity that the rows show, at every rank, for any student."""

import pytest
import torch
from torch import nn

from distil_rank.lowrank.fidelity import nested_r2
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors


@torch.no_grad()
def measured_r2(teacher, student, x, centre):
    y = teacher(x)
    return float(1 - (y - student(x)).square().sum() / (y - teacher(centre)).square().sum())


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_every_rank_of_any_student_on_held_out_rows(m, n, bias, trained):
    torch.manual_seed(m)
    mixing = torch.randn(n, n, dtype=torch.float64)
    train, test = (torch.randn(300, n, dtype=torch.float64) @ mixing + 2 for _ in range(2))
    teacher = nn.Linear(n, m, bias).double().requires_grad_(False)
    moments = Moments.of(train)
    student = LowRankLinear.from_linear(teacher, 4, moments).requires_grad_(False)
    if trained:
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    factors = Factors(student.A, student.B, student.bias)
    curve = nested_r2(teacher.weight, teacher.bias, factors, Moments.of(test), student.input_mean, moments.mean)
    expected = [measured_r2(teacher, student.truncate(k), test, moments.mean) for k in range(1, 5)]
    assert curve.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_bias_that_is_never_folded():
    x = torch.randn(200, 5, dtype=torch.float64) + 3
    weight, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in [(4, 5), (2, 5), (4, 2)])
    curve = nested_r2(weight, None, Factors(A, B, torch.zeros(4)), Moments.of(x))
    y = x @ weight.T
    for k in (1, 2):
        residual = (y - x @ A[:k].T @ B[:, :k].T).square().sum()
        assert float(curve[k - 1]) == pytest.approx(float(1 - residual / (y - y.mean(0)).square().sum()), rel=1e-9)


def test_constant_outputs_have_no_variance_to_explain():
    teacher = nn.Linear(3, 2)
    x = torch.ones(10, 3)
    student = LowRankLinear.from_linear(teacher.double(), 1, Moments.of(x))
    assert student.provenance["r2"][0] in (1.0, float("-inf"))


def test_a_student_carries_its_curve_and_where_it_comes_from():
    teacher, x = nn.Linear(8, 6), torch.randn(100, 8)
    student = LowRankLinear.from_linear(teacher, 4, Moments.of(x))
    papers = student.provenance
    assert len(papers["r2"]) == 4 and papers["rows"] == 100 and papers["solver"] == "closed_form"
    assert student.truncate(2).provenance["r2"] == papers["r2"][:2]
    other = LowRankLinear.from_linear(nn.Linear(8, 6), 4, Moments.of(x)).provenance
    assert other["teacher_sha256"] != papers["teacher_sha256"]
    assert other["moments_sha256"] == papers["moments_sha256"]
