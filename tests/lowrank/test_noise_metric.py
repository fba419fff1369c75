"""Generalised eigenvectors against scipy, gradient descent, scikit-learn's discriminants and today's closed form."""

import pytest
import scipy.linalg
import torch
from distil_rank.lowrank.pair_moments import WithinSums
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.noise_metric import noise_closed_form, noise_directions, whitening_directions
from distil_rank.lowrank.solvers import solve


def spd(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def weighted_error(factors, W, bias, x, N) -> torch.Tensor:
    error = x @ W.T + bias - (x @ factors.A.T @ factors.B.T + factors.c)
    return (error @ torch.linalg.inv(N) * error).sum(1).mean()


def test_the_same_as_scipy():
    S, N = spd(12, 0), spd(12, 1)
    found = noise_directions(S, N)
    values = scipy.linalg.eigh(S.numpy(), N.numpy(), eigvals_only=True)[::-1]
    assert torch.allclose(found.values, torch.from_numpy(values.copy()))
    assert torch.allclose(S @ found.V, N @ found.V * found.values, atol=1e-9)
    assert torch.allclose(found.V.T @ N @ found.V, torch.eye(12, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.dual, N @ found.V)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_noise_of_identity_is_the_closed_form(shape):
    W, bias = torch.randn(*shape).double(), torch.randn(shape[0]).double()
    moments = Moments.of(torch.randn(200, shape[1]) @ torch.randn(shape[1], shape[1]) + 3)
    ours = noise_closed_form(W, bias, 4, moments, torch.eye(shape[0]))
    theirs = solve(W, bias, 4, "closed_form", moments)
    assert torch.allclose(ours.B @ ours.A, theirs.B @ theirs.A, atol=1e-8)
    assert torch.allclose(ours.c, theirs.c, atol=1e-8)


def test_no_other_map_of_the_rank_has_less_weighted_error():
    torch.manual_seed(0)
    x, W, bias, N = torch.randn(300, 7).double() @ spd(7, 2) + 1, torch.randn(6, 7).double(), torch.zeros(6), spd(6, 3)
    ours = noise_closed_form(W, None, 2, Moments.of(x), N)
    least = weighted_error(ours, W, bias, x, N)
    dropped = noise_directions(W @ Moments.of(x).covariance @ W.T, N).values[2:].sum()
    assert torch.allclose(least, dropped)
    start = solve(W, None, 2, "closed_form", Moments.of(x))
    trained = [part.clone(memory_format=torch.contiguous_format).requires_grad_() for part in start]
    optimiser = torch.optim.LBFGS(trained, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimiser.zero_grad()
        loss = weighted_error(type(start)(*trained), W, bias, x, N)
        loss.backward()
        return loss

    assert weighted_error(start, W, bias, x, N) > 1.01 * least
    optimiser.step(closure)
    assert weighted_error(type(start)(*trained), W, bias, x, N).item() == pytest.approx(least.item(), rel=1e-5)


def test_within_classes_it_is_linear_discriminant_analysis():
    torch.manual_seed(1)
    centres, y = torch.randn(4, 5).double() * 2, torch.arange(400) % 4
    x = centres[y] + torch.randn(400, 5).double() @ spd(5, 4)
    sums = WithinSums.zeros(5)
    sums.add_groups(x, y)
    ours = x @ noise_directions(Moments.of(x).covariance, sums.covariance()).V[:, :3]
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), y.numpy()).transform(x.numpy())
    for mine, other in zip((ours - ours.mean(0)).T, torch.from_numpy(theirs).T, strict=True):
        assert abs(torch.corrcoef(torch.stack([mine, other]))[0, 1]) > 1 - 1e-9


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_whitening_is_a_noise_of_the_outputs_own_covariance(power):
    S = spd(8, 5)
    variances, Q = torch.linalg.eigh(S)
    found = whitening_directions(S, power)
    N = Q @ torch.diag(variances**power) @ Q.T
    assert torch.allclose(found.V.T @ N @ found.V, torch.eye(8, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(S @ found.V, N @ found.V * found.values, atol=1e-9)
    if power < 1:
        assert torch.allclose(found.values, noise_directions(S, N).values)


def test_ranks_are_nested():
    W, moments, N = torch.randn(6, 6), Moments.of(torch.randn(50, 6)), spd(6, 6)
    small, large = (noise_closed_form(W, None, rank, moments, N) for rank in (2, 5))
    assert torch.equal(large.A[:2], small.A) and torch.equal(large.B[:, :2], small.B)


def test_what_is_refused():
    few = torch.zeros(5, 5)
    few[0, 0] = 1
    for call, message in [
        (lambda: noise_directions(spd(5, 0), few), "regularisation"),
        (lambda: noise_directions(spd(5, 0), torch.zeros(5, 5)), "differ"),
        (lambda: whitening_directions(few), "regularisation"),
        (lambda: whitening_directions(torch.zeros(5, 5)), "all are the same"),
        (lambda: whitening_directions(spd(5, 0), 1.5), "[0, 1]"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
    assert noise_directions(spd(5, 0), few, 0.01).values.isfinite().all()
    assert whitening_directions(few, 1.0, 0.01).values.isfinite().all()
