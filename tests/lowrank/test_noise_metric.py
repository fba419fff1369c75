"""Generalised eigenvectors against scipy, gradient descent, scikit-learn's discriminants and today's closed form."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from distil_rank.codes import fit
from distil_rank.codes.fit import group_noise
from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors, noise_directions, solve


def spd(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def projection(W, bias, rank, moments, N, V) -> Factors:
    """The rank-r map of a layer that projects its outputs on the first directions and comes back by their duals."""
    A, B = V[:, :rank].T @ W, N @ V[:, :rank]
    mean = W @ moments.mean.double()
    return Factors(A, B, bias + mean - B @ (V[:, :rank].T @ mean))


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


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_noise_of_identity_is_the_closed_form(shape):
    W, bias = torch.randn(*shape).double(), torch.randn(shape[0]).double()
    moments = Moments.of(torch.randn(200, shape[1]) @ torch.randn(shape[1], shape[1]) + 3)
    identity = torch.eye(shape[0]).double()
    V = noise_directions(W @ moments.covariance @ W.T, identity, 0.0).V
    ours = projection(W, bias, 4, moments, identity, V)
    theirs = solve(W, bias, 4, "closed_form", moments)
    assert torch.allclose(ours.B @ ours.A, theirs.B @ theirs.A, atol=1e-8)
    assert torch.allclose(ours.c, theirs.c, atol=1e-8)


def test_no_other_map_of_the_rank_has_less_weighted_error():
    torch.manual_seed(0)
    x, W, bias, N = torch.randn(300, 7).double() @ spd(7, 2) + 1, torch.randn(6, 7).double(), torch.zeros(6), spd(6, 3)
    values, V = noise_directions(W @ Moments.of(x).covariance @ W.T, N)
    least, dropped = weighted_error(projection(W, bias, 2, Moments.of(x), N, V), W, bias, x, N), values[2:].sum()
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
    within = group_noise(x.numpy(), np.ones(400, bool), y.numpy())
    ours = x @ noise_directions(Moments.of(x).covariance, within).V[:, :3]
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), y.numpy()).transform(x.numpy())
    for mine, other in zip((ours - ours.mean(0)).T, torch.from_numpy(theirs).T, strict=True):
        assert abs(torch.corrcoef(torch.stack([mine, other]))[0, 1]) > 1 - 1e-9


def test_noise_of_the_outputs_own_covariance_whitens_them():
    S = spd(8, 5)
    variances, Q = torch.linalg.eigh(S)
    found = noise_directions(S, S, 0.1)
    N = S + 0.1 * variances.mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(found.V.T @ N @ found.V, torch.eye(8, dtype=torch.float64), atol=1e-9)
    scale = (variances + 0.1 * variances.mean()).rsqrt()
    assert torch.allclose((Q.T @ found.V).abs(), torch.diag(scale).flip(1), atol=1e-9), "principal components, rescaled"


def test_what_is_refused():
    few = torch.zeros(5, 5)
    few[0, 0] = 1
    for call, message in [
        (lambda: noise_directions(spd(5, 0), few), "regularisation"),
        (lambda: noise_directions(spd(5, 0), torch.zeros(5, 5)), "differ"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
    assert noise_directions(spd(5, 0), few, 0.01).values.isfinite().all()


@pytest.mark.parametrize("rows_at_once", [1, 7, 10_000])
def test_within_groups_in_any_order_and_in_any_number_of_blocks(monkeypatch, rows_at_once):
    monkeypatch.setattr(fit, "BLOCK_ROWS", rows_at_once)
    torch.manual_seed(0)
    x, group = torch.randn(60, 5), torch.randint(0, 9, (60,))
    expected, freedom = torch.zeros(5, 5).double(), 0
    for number in group.unique():
        rows = x[group == number].double()
        expected += torch.cov(rows.T, correction=0).reshape(5, 5) * len(rows)
        freedom += len(rows) - 1
    found = group_noise(x.numpy(), np.ones(60, bool), group.numpy())
    assert torch.allclose(found, expected / freedom)


@pytest.mark.parametrize("count", [0, 4])
def test_rows_that_are_alone_say_nothing(count):
    with pytest.raises(InputError, match="alone in its own"):
        group_noise(np.ones((count, 3)), np.ones(count, bool), np.arange(count))
