"""How much of a layer a student keeps, exactly and at every rank at once, from the moments of the inputs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors


@torch.no_grad()
def nested_r2(
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    moments: Moments,
    folded_mean: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """R² of the first k directions of a student, for every k, over rows with these moments.

    Teacher and student are affine, so their mean squared difference is a quadratic form in the first two moments: no
    row is looked at again. With held-out moments this is the held-out R².

    Args:
        weight: `W` of the teacher, `(m, n)`.
        bias: `b`, `(m,)`, or None for zeros.
        factors: of any rank-r student, trained or not.
        moments: of the inputs.
        folded_mean: `(n,)`, the input mean whose image under the dropped directions goes into the bias; None where the
            bias stays the same at every rank.
        centre: `(n,)`, the inputs' training mean; its image under the teacher is what R² compares with. By default the
            mean of `moments`.

    Returns:
        `(r,)` float64, at rank 1, 2, …, r.

    >>> from distil_rank.lowrank.solvers import output_spectrum, r2_curve, solve
    >>> W, x = torch.randn(6, 8), torch.randn(400, 8)
    >>> moments = Moments.of(x)
    >>> curve = nested_r2(W, None, solve(W, None, 3, "closed_form", moments), moments, folded_mean=moments.mean)
    >>> torch.allclose(curve, r2_curve(output_spectrum(W, moments)[0])[:3])
    True
    """
    W, (A, B, c) = weight.double(), (factor.double() for factor in factors)
    mean, covariance = moments.mean.to(W), moments.covariance.to(W)
    folded = torch.zeros_like(mean) if folded_mean is None else folded_mean.to(W)

    AC = A @ covariance  # (r, n)
    variance = ((W @ covariance) * W).sum()
    shared = ((AC @ W.T) * B.T).sum(1).cumsum(0)  # E⟨W x, B_k A_k x⟩ about the mean
    own = ((B.T @ B) * (AC @ A.T)).cumsum(0).cumsum(1).diagonal()  # E‖B_k A_k x‖² about the mean
    whole = W @ mean - c - B @ (A @ folded) + (0 if bias is None else bias.double())
    offset = whole[:, None] - (B * (A @ (mean - folded))).cumsum(1)  # (m, r), the mean error
    residual = (variance - 2 * shared + own).clamp_min(0) + offset.square().sum(0)
    total = variance if centre is None else variance + (W @ (mean - centre.to(W))).square().sum()
    if total > 0 or total.isnan():
        return 1 - residual / total
    rounding = 1e-24 * (W @ mean).square().sum()  # inputs that never vary leave no more than this of a perfect student
    return torch.where(residual > rounding, -torch.inf, 1.0)
