"""Reduced-rank ridge regression against scikit-learn and against the rows themselves."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import Ridge

from distil_rank.errors import InputError
from distil_rank.lowrank import regression
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.regression import JointMoments, RidgePath, choose_ridge, joint_r2


def nonlinear_rows(rows: int = 300, n: int = 12, m: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, n, dtype=torch.float64)
    x = torch.randn(rows, n, generator=draw, dtype=torch.float64) * scales + 2.0
    mixing = torch.randn(n, m, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = torch.tanh((x - 2) / scales @ mixing / 3) + 0.1 * torch.randn(rows, m, generator=draw, dtype=torch.float64)
    return x, y + 5


def predicted(factors, x):
    A, B, c = factors
    return x @ A.T @ B.T + c


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_full_rank_is_scikit_learns_ridge_on_standardised_features(ridge):
    x, y = nonlinear_rows()
    scale = x.std(0, correction=0)
    reference = Ridge(alpha=ridge * len(x), solver="svd").fit((x / scale).numpy(), y.numpy())
    found = predicted(RidgePath(JointMoments.of([(x, y)])).solve(ridge), x)
    assert np.allclose(found.numpy(), reference.predict((x / scale).numpy()), atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lower_rank_is_the_truncated_projection_of_augmented_rows(ridge, rank):
    """The penalty as rows of its own below the data: then it is least squares, truncated by a plain SVD."""
    x, y = nonlinear_rows()
    z, t = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    z = np.vstack([z, np.diag((ridge * len(x)) ** 0.5 * z.std(axis=0))])
    t = np.vstack([t, np.zeros((x.shape[1], t.shape[1]))])
    coefficients = scipy.linalg.lstsq(z, t)[0]
    _, _, Vt = scipy.linalg.svd(z @ coefficients, full_matrices=False)
    reference = (x - x.mean(0)).numpy() @ coefficients @ Vt[:rank].T @ Vt[:rank] + y.mean(0).numpy()
    found = predicted(RidgePath(JointMoments.of([(x, y)])).solve(ridge, rank), x)
    assert np.allclose(found.numpy(), reference, atol=1e-8)


def test_r2_at_every_rank_is_that_of_the_truncated_layer_on_the_rows():
    x, y = nonlinear_rows()
    other_x, other_y = nonlinear_rows(seed=1)
    fitted, other = JointMoments.of([(x, y)]), JointMoments.of([(other_x, other_y)])
    factors = RidgePath(fitted).solve(0.1)
    curve = joint_r2(factors, other, fitted)
    layer = LowRankLinear.from_factors(factors, fitted.x.mean, dtype=torch.float64)
    total = (other_y - y.mean(0)).square().sum()
    for rank in range(1, 8):
        with torch.no_grad():
            residual = (other_y - layer.truncate(rank)(other_x)).square().sum()
        assert curve[rank - 1].item() == pytest.approx(1 - float(residual / total), abs=1e-10)


def test_moments_stream_and_no_unit_of_measurement_matters():
    x, y = nonlinear_rows()
    whole, parts = JointMoments.of([(x, y)]), JointMoments.of(zip(x.split(70), y.split(70), strict=True))
    assert torch.allclose(whole.cross, parts.cross) and torch.allclose(whole.y.covariance, parts.y.covariance)
    units = torch.logspace(-3, 3, x.shape[1], dtype=torch.float64)
    scaled = RidgePath(JointMoments.of([(x * units, y)])).solve(0.5)
    assert torch.allclose(predicted(RidgePath(whole).solve(0.5), x), predicted(scaled, x * units), atol=1e-7)


def test_constant_and_repeated_features_do_no_harm():
    x, y = nonlinear_rows()
    more = torch.cat([x, x[:, :3], torch.full((len(x), 2), 4.0, dtype=torch.float64)], dim=1)
    plain, found = (predicted(RidgePath(JointMoments.of([(f, y)])).solve(0.0), f) for f in (x, more))
    assert torch.allclose(plain, found, atol=1e-6)


def test_the_ridge_is_chosen_on_rows_that_were_not_fitted_to():
    x, y = nonlinear_rows(rows=14)
    few = RidgePath(JointMoments.of([(x, y)]))
    unseen = JointMoments.of([nonlinear_rows(rows=2000, seed=2)])
    choice = choose_ridge(few, unseen, ridges=(1e-9, 0.1, 1.0, 1e6))
    assert choice.ridge in (0.1, 1.0)
    assert dict(choice.curve)[choice.ridge] > max(dict(choice.curve)[1e-9], dict(choice.curve)[1e6])


def test_targets_that_never_vary():
    x, _ = nonlinear_rows()
    fitted = JointMoments.of([(x, torch.ones(len(x), 2))])
    assert joint_r2(RidgePath(fitted).solve(0.1), fitted, fitted).tolist() == [1.0, 1.0]


def test_refusals(monkeypatch):
    x, y = nonlinear_rows()
    path = RidgePath(JointMoments.of([(x, y)]))
    with pytest.raises(InputError, match=r"in \[1, 7\]"):
        path.solve(0.1, 8)
    with pytest.raises(InputError, match="ridge"):
        path.solve(-1.0)
    monkeypatch.setattr(regression, "MOMENTS_BYTES", 8 * 18**2)
    with pytest.raises(InputError, match="at most 18 columns"):
        JointMoments.of([(x, y)])
