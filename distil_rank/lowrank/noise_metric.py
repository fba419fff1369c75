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


class Directions(NamedTuple):
    """Generalised eigenvectors of an output covariance S against a noise covariance N, best first.

    Attributes:
        values: λ, `(k,)`: signal over noise along each direction.
        V: `(d, k)`: the code of an output is `Vᵀ (y − μ)`; its noise has unit variance, its signal variance λ.
    """

    values: Tensor
    V: Tensor


def noise_directions(S: Tensor, N: Tensor, regularisation: float = 0.0) -> Directions:
    """All generalised eigenvectors of `S v = λ N v`, in float64, for covariances `(d, d)`.

    N becomes `N + ε (tr N / d) I`, with ε the regularisation, as for a covariance from few rows.

    >>> S, N = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 9.0]))
    >>> values, V = noise_directions(S, N)
    >>> values.tolist(), V.abs().round(decimals=4).tolist()
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
    return Directions(values.flip(0).clamp_min(0), root @ U.flip(1))


def whitening_directions(S: Tensor, power: float = 1.0, regularisation: float = 0.0) -> Directions:
    """`noise_directions` for `N = S^power`, in the order of variance: principal components, rescaled.

    Power 0 leaves principal components as they are, 1 gives each unit variance: all λ are then 1, and the order comes
    from the variance. S in N becomes `S + ε (tr S / d) I`, with ε the regularisation.

    >>> whitening_directions(torch.diag(torch.tensor([4.0, 9.0]))).V.abs().round(decimals=4).tolist()
    [[0.0, 0.5], [0.3333, 0.0]]
    """
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
    return Directions(variances / noise, Q * noise.rsqrt())


class WithinSums(NamedTuple):
    """Plain float64 sums over groups of rows, from which their pooled within-group covariance follows.

    With rows `x_i` of group g and their mean `m_g`,

        N = Σ_g Σ_i (x_i − m_g)(x_i − m_g)ᵀ / Σ_g (n_g − 1).

    Groups may come in any order, the rows of one group together; memory is O(d²).
    """

    freedom: Tensor
    scatter: Tensor

    @classmethod
    def zeros(cls, width: int) -> WithinSums:
        """Sums over no groups yet."""
        scatter = torch.zeros(width, width, dtype=torch.float64)
        return cls(scatter.new_zeros(()), scatter)

    def add_groups(self, x: Tensor, group: Tensor) -> None:
        """Add whole groups of rows `(n, d)`, in place; equal numbers in one call are one group.

        >>> sums = WithinSums.zeros(2)
        >>> sums.add_groups(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
        >>> sums.covariance().tolist()
        [[2.0, 0.0], [0.0, 0.0]]
        """
        x = x.detach().to(self.scatter)
        _, member, counts = torch.unique(group, return_inverse=True, return_counts=True)
        member, counts = member.to(x.device), counts.to(x.device)
        means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, member, x) / counts[:, None]
        deviations = x - means[member]
        self.scatter.addmm_(deviations.T, deviations)
        self.freedom.add_((counts - 1).sum())

    def covariance(self) -> Tensor:
        """N, `(d, d)` float64; zeros where no group has two rows."""
        covariance = self.scatter / self.freedom.clamp_min(1)
        return (covariance + covariance.T) / 2
