"""The covariance of what differs within pairs or groups of rows that mean the same, in one streaming pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WithinSums(NamedTuple):
    """Plain float64 sums over groups of rows, from which their pooled within-group covariance follows.

    With rows `x_i` of group g and their mean `m_g`,

        N = Σ_g Σ_i (x_i − m_g)(x_i − m_g)ᵀ / Σ_g (n_g − 1),

    the estimate of linear discriminant analysis (Fisher 1936; Rao 1948). For pairs it is half the mean outer product of
    their differences. Groups may come in any order, the rows of one group together; memory is O(d²).

    Attributes:
        freedom: `()`, the sum of `n_g − 1`.
        scatter: `(d, d)`, the sum of outer products.
    """

    freedom: Tensor
    scatter: Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device | str | None = None) -> WithinSums:
        """Sums over no groups yet."""
        scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(scatter.new_zeros(()), scatter)

    def add_groups(self, x: Tensor, group: Tensor) -> None:
        """Add whole groups, in place.

        Args:
            x: rows `(n, d)`.
            group: of each row, `(n,)` integers; equal numbers in one call are one group.

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

    def add_pairs(self, a: Tensor, b: Tensor) -> None:
        """Add pairs of rows, each `(n, d)`, in place: groups of two."""
        difference = a.detach().to(self.scatter) - b.detach().to(self.scatter)
        self.scatter.addmm_(difference.T, difference, alpha=0.5)
        self.freedom.add_(len(difference))

    def covariance(self) -> Tensor:
        """N, `(d, d)` float64; zeros where no group has two rows."""
        covariance = self.scatter / self.freedom.clamp_min(1)
        return (covariance + covariance.T) / 2
