"""The best rank-r map when errors are weighed by the noise that they are seen against.

With the outputs `y = W x + b` of covariance `S = W C Wᵀ` and a noise covariance `N` of these outputs, the error of a
student is measured in units of the noise, `E (y − ŷ)ᵀ N⁻¹ (y − ŷ)`. In the coordinates `N^-½ y` that is the squared
error, so its best rank-r answer is known (Eckart and Young 1936; Izenman 1975): with the generalised eigenvectors

    S v = λ N v,   vᵀ N v = 1,   λ₁ ≥ λ₂ ≥ …,

project on the first r of them and come back by their duals, `ŷ = μ + N V Vᵀ (y − μ)`. The lost error is the sum of the
dropped λ. These are the directions of linear discriminant analysis when N is a covariance within classes (Fisher 1936;
Rao 1948), of a minimum noise fraction transform when it is one of noise (Green et al. 1988), and principal components
when N is the identity. They are nested: the first k are the answer for rank k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors, check_rank


class Directions(NamedTuple):
    """Generalised eigenvectors of an output covariance S against a noise covariance N, best first.

    Attributes:
        values: λ, `(k,)`: signal over noise along each direction.
        V: `(d, k)`: the code of an output is `Vᵀ (y − μ)`; its noise has unit variance, its signal variance λ.
        dual: `N V`, `(d, k)`: `y ≈ μ + dual Vᵀ (y − μ)`.
    """

    values: Tensor
    V: Tensor
    dual: Tensor

    def first(self, rank: int) -> Directions:
        """The best `rank` of them."""
        return Directions(self.values[:rank], self.V[:, :rank], self.dual[:, :rank])


def noise_directions(S: Tensor, N: Tensor, regularisation: float = 0.0) -> Directions:
    """All generalised eigenvectors of `S v = λ N v`.

    Args:
        S: covariance of the outputs, `(d, d)`.
        N: covariance of the noise, `(d, d)`, on any scale.
        regularisation: ε: N becomes `N + ε (tr N / d) I`, as for a covariance from few rows.

    Returns:
        Float64.

    Raises:
        InputError: N has no energy, or is singular without regularisation.

    >>> S, N = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 9.0]))
    >>> found = noise_directions(S, N)
    >>> found.values.tolist(), found.V.abs().round(decimals=4).tolist()
    ([4.0, 1.0], [[1.0, 0.0], [0.0, 0.3333]])
    """
    S, N = S.double(), N.double()
    scale = N.diagonal().mean()
    if not scale > 0:
        raise InputError("Expected noise that varies but all its differences are zero; give pairs that differ.")
    N = N / scale + regularisation * torch.eye(len(N), dtype=N.dtype, device=N.device)
    variances, Q = torch.linalg.eigh((N + N.T) / 2)
    if not variances[0] > variances[-1] * len(N) * torch.finfo(N.dtype).eps:
        raise InputError(
            f"Expected noise in all {len(N)} dimensions but its covariance is singular: fewer pairs than dimensions, "
            "or a dimension that never changes; give more pairs, or a regularisation above 0."
        )
    root = Q * (variances * scale).rsqrt()  # rootᵀ N root = I
    values, U = torch.linalg.eigh(root.T @ ((S + S.T) / 2) @ root)
    V = root @ U.flip(1)
    return Directions(values.flip(0).clamp_min(0), V, (N * scale) @ V)


def whitening_directions(S: Tensor, power: float = 1.0, regularisation: float = 0.0) -> Directions:
    """`noise_directions` for `N = S^power`, in the order of variance: principal components, rescaled.

    Every output counts as signal and as noise alike, so that at power 1 all λ are 1, and the order has to come from
    elsewhere: from the variance, as for any power below 1.

    Args:
        S: covariance of the outputs, `(d, d)`.
        power: from 0, principal components as they are, to 1, each at unit variance.
        regularisation: ε: `S + ε (tr S / d) I` in the place of S in N.

    Raises:
        InputError: the power is out of [0, 1], S has no energy, or is singular without regularisation.

    >>> whitening_directions(torch.diag(torch.tensor([4.0, 9.0]))).V.abs().round(decimals=4).tolist()
    [[0.0, 0.5], [0.3333, 0.0]]
    """
    if not 0 <= power <= 1:
        raise InputError(f"Expected a whitening power in [0, 1] but got {power}.")
    S = S.double()
    variances, Q = torch.linalg.eigh((S + S.T) / 2)
    variances, Q = variances.flip(0).clamp_min(0), Q.flip(1)
    if not variances[0] > 0:
        raise InputError("Expected outputs that vary but all are the same; give other proteins.")
    noise = variances + regularisation * variances.mean()
    if power > 0 and not noise[-1] > noise[0] * len(S) * torch.finfo(S.dtype).eps:
        raise InputError(
            f"Expected outputs that vary in all {len(S)} dimensions but some do not: fewer rows than dimensions; give "
            "more rows, or a regularisation above 0."
        )
    noise = noise**power
    return Directions(variances / noise, Q * noise.rsqrt(), Q * noise.sqrt())


def noise_closed_form(
    weight: Tensor, bias: Tensor | None, rank: int, moments: Moments, noise: Tensor, regularisation: float = 0.0
) -> Factors:
    """The rank-r student of a dense layer with the least error in units of a noise at its outputs.

    Args:
        weight: `W`, `(m, n)`.
        bias: `b`, `(m,)`, or None for zeros.
        rank: r in [1, min(m, n)].
        moments: of the layer's inputs.
        noise: N, `(m, m)`; the identity gives `solve(..., "closed_form")`.
        regularisation: of N, see `noise_directions`.

    Returns:
        Factors in float64 with `A = Vᵀ W` and `B = N V`.

    Raises:
        InputError: the rank is out of range, or N is singular.

    >>> W, moments = torch.eye(2), Moments(torch.zeros(2), torch.diag(torch.tensor([4.0, 9.0])).double(), 9)
    >>> A, B, c = noise_closed_form(W, None, 1, moments, torch.diag(torch.tensor([1.0, 9.0])))
    >>> (B @ A).abs().tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    check_rank(rank, weight)
    weight = weight.detach().double()
    mean, covariance = moments.mean.to(weight), moments.covariance.to(weight)
    found = noise_directions(weight @ covariance @ weight.T, noise.to(weight), regularisation).first(rank)
    A, B = found.V.T @ weight, found.dual
    offset = weight @ mean - B @ (A @ mean)
    return Factors(A, B, offset if bias is None else offset + bias.detach().to(weight))
