"""Every solver against an independent reference."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import (
    SOLVERS,
    Factors,
    choose_rank,
    nested_r2,
    output_spectrum,
    r2_curve,
    solve,
)


def correlated_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing.T + 3.0


def dense_layer(m: int, n: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n, m).double()


def error(factors, layer: nn.Linear, x: torch.Tensor) -> float:
    A, B, c = factors
    with torch.no_grad():
        return float(((x @ A.T @ B.T + c - layer(x)) ** 2).sum(1).mean())


def brute_force_error(layer: nn.Linear, x: torch.Tensor, rank: int) -> float:
    """Reduced-rank regression by the generalised singular value decomposition of the data themselves.

    min over rank(M) ≤ r of ‖Y − X M‖ with the intercept in the centring: project Y on the column space of X, and
    truncate the SVD of the projection.
    """
    X = (x - x.mean(0)).numpy()
    Y = layer(x).detach().numpy()
    Y = Y - Y.mean(0)
    M, *_ = scipy.linalg.lstsq(X, Y, lapack_driver="gelsd")
    U, S, Vt = scipy.linalg.svd(X @ M, full_matrices=False)
    fitted = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return float(((Y - fitted) ** 2).sum(1).mean())


@pytest.mark.parametrize(("m", "n", "rows"), [(20, 20, 200), (12, 30, 200), (30, 12, 200), (40, 50, 25)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_closed_form_equals_brute_force(m, n, rows, rank):
    layer, x = dense_layer(m, n), correlated_rows(rows, n)
    reference = brute_force_error(layer, x, rank)
    moments = Moments.of(x)
    solved = solve(layer.weight, layer.bias, rank, "closed_form", moments)
    assert error(solved, layer, x) == pytest.approx(reference, rel=1e-8)
    # The dropped eigenvalues are the residual.
    assert float(output_spectrum(layer.weight, moments)[0][rank:].sum()) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_full_rank_reproduces_the_layer(solver):
    layer, x = dense_layer(9, 14), correlated_rows(100, 14)
    factors = solve(layer.weight, layer.bias, 9, solver, Moments.of(x))
    assert error(factors, layer, x) < 1e-18


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(16, 10), (10, 16)])
def test_lower_ranks_are_slices_of_higher_ones(solver, shape):
    layer, moments = dense_layer(*shape), Moments.of(correlated_rows(100, shape[1]))
    full = solve(layer.weight, layer.bias, 8, solver, moments)
    low = solve(layer.weight, layer.bias, 3, solver, moments)
    torch.testing.assert_close(full.B[:, :3] @ full.A[:3], low.B @ low.A)


def test_svd_error_is_the_dropped_singular_values():
    layer = dense_layer(18, 25)
    A, B, _ = solve(layer.weight, layer.bias, 7, "svd")
    dropped = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)[7:]
    assert float(((layer.weight - B @ A) ** 2).sum()) == pytest.approx(float((dropped**2).sum()), rel=1e-10)
    torch.testing.assert_close(A @ A.T, B.T @ B)  # the singular values are shared evenly


def test_the_ladder_climbs():
    layer, x = dense_layer(20, 20), correlated_rows(300, 20)
    moments = Moments.of(x)
    errors = {solver: error(solve(layer.weight, layer.bias, 4, solver, moments), layer, x) for solver in SOLVERS}
    assert errors["closed_form"] < errors["svd_bias"] < errors["svd"]
    assert errors["closed_form"] <= errors["whitened_svd"] < errors["svd"]
    for _ in range(50):  # no small step in any direction improves on it
        A, B, c = solve(layer.weight, layer.bias, 4, "closed_form", moments)
        moved = (A + 1e-3 * torch.randn_like(A), B + 1e-3 * torch.randn_like(B), c + 1e-3 * torch.randn_like(c))
        assert error(moved, layer, x) > errors["closed_form"]


def test_whitened_svd_minimises_the_uncentred_error_with_the_bias_retained():
    layer, x = dense_layer(15, 15), correlated_rows(300, 15)
    factors = solve(layer.weight, layer.bias, 3, "whitened_svd", Moments.of(x))
    Y = (x @ layer.weight.T).detach()
    dropped = torch.linalg.svdvals(Y)[3:]
    assert error(factors, layer, x) == pytest.approx(float((dropped**2).sum()) / len(x), rel=1e-8)
    torch.testing.assert_close(factors.c, layer.bias.detach())


def test_a_missing_bias_is_zero():
    layer, moments = nn.Linear(6, 5, bias=False).double(), Moments.of(correlated_rows(50, 6))
    assert error(solve(layer.weight, None, 5, "closed_form", moments), layer, correlated_rows(50, 6)) < 1e-18


def test_ranks_from_shares_knees_and_integers():
    values = torch.tensor([50.0, 30.0, 10.0, 6.0, 3.0, 1.0])
    assert [choose_rank(values, share) for share in (0.5, 0.51, 0.9, 0.95, 0.999)] == [1, 2, 3, 4, 6]
    assert choose_rank(values, "auto") == 2
    assert choose_rank(values, 6) == 6
    assert choose_rank(values, 4.0) == 4
    with pytest.raises(InputError, match=r"share of variance in \(0, 1\)"):
        choose_rank(values, 1.0)  # the whole variance, or the first direction?
    assert choose_rank(values, np.float32(0.9)) == 3 and choose_rank(values, np.int64(4)) == 4
    for wrong in (None, [3], True):
        with pytest.raises(InputError, match="an integer rank"):
            choose_rank(values, wrong)
    assert r2_curve(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rank", [0, -1, 7, 1.5, -0.2, "best", True])
def test_impossible_ranks_are_refused_in_words(rank):
    with pytest.raises(InputError, match="Expected"):
        choose_rank(torch.ones(6), rank)


def test_what_is_missing_or_does_not_fit_is_refused_in_words():
    layer, moments = dense_layer(5, 6), Moments.of(correlated_rows(50, 7))
    with pytest.raises(InputError, match="Expected moments"):
        solve(layer.weight, layer.bias, 2)
    with pytest.raises(InputError, match="width 6"):
        solve(layer.weight, layer.bias, 2, "closed_form", moments)
    with pytest.raises(InputError, match=r"\[1, 5\]"):
        solve(layer.weight, layer.bias, 6, "svd")


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
