"""Tell, without the teacher, on which inputs a student cannot be trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError

QUANTILE = 0.99  # share of the calibration rows whose estimated error stays under the threshold


class Factored(Protocol):
    """A layer `y = B (A x) + c` that can drop its last directions, as `TwoFactors` is."""

    @property
    def bias(self) -> Tensor | None:
        """c, `(m,)`."""

    @property
    def kept_mean(self) -> Tensor | None:
        """`A mean`, `(r,)`, whose image under dropped columns of B moves into the bias; None where the bias stays."""

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A `(r, n)` and B `(m, r)`."""


class Guard(nn.Module):
    """Estimates a student's error on each input row.

    Teacher and student are affine, so the error is too: `e(x) = (W − B A) x + (b − c)`. The guard keeps k random
    mixtures of its m elements, `S e(x)` with signs `S ∈ {±1/√k}^(k×m)`. Whatever x is, near the calibration data or
    far off, `‖S e(x)‖²` estimates `‖e(x)‖²` without bias and with a relative standard deviation of at most `√(2/k)`
    (Achlioptas, J. Comput. Syst. Sci. 66, 2003). It costs k rows beside the student's r + m.

    Args:
        sketch: `S (W − B A)`, `(k, n)`.
        offset: `S (b − c)`, `(k,)`.
        scale: what estimates are divided by: the teacher's output variance over the calibration rows, and the ratio of
            mean estimate to mean error there, so that on those rows the shares average to 1 − R² exactly.
        thresholds: the estimate that `QUANTILE` of the calibration rows stay under, at ranks …, r − 1, r of the
            student, as far down as they are known; empty where none is.
    """

    sketch: Tensor
    offset: Tensor

    def __init__(self, sketch: Tensor, offset: Tensor, scale: float, thresholds: Sequence[float] = ()) -> None:
        super().__init__()
        # Not persistent: a state dict with and without a guard is the same.
        self.register_buffer("sketch", sketch, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.scale, self.thresholds = scale, tuple(thresholds)

    @property
    def threshold(self) -> float | None:
        """At the student's own rank; None where it is not known."""
        return self.thresholds[-1] if self.thresholds else None

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: nn.Linear, student: Factored, x: Tensor, size: int = 16) -> Self:
        """The guard of a student, calibrated at each of its ranks on rows that neither was fitted to.

        Args:
            teacher: the dense layer.
            student: its replacement.
            x: calibration rows `(N, n)`, N ≥ 2.
            size: k.

        Raises:
            InputError: fewer than two rows.

        >>> from distil_rank.lowrank.low_rank import LowRankLinear
        >>> teacher, x = nn.Linear(8, 6), torch.randn(500, 8)
        >>> guard = Guard.of(teacher, LowRankLinear.from_linear(teacher, 6, solver="svd"), x)
        >>> guard(x).max().item() < 1e-9, len(guard.thresholds)
        (True, 6)
        """
        if len(x) < 2:
            raise InputError(f"Expected at least 2 rows to calibrate a guard on but got {len(x)}.")
        signs = _signs(size, teacher.out_features).to(x.device)
        A, B = student.factors(torch.float64)
        weight = teacher.weight.double() - B @ A
        bias = sum(
            (sign * term.double() for sign, term in ((1, teacher.bias), (-1, student.bias)) if term is not None),
            torch.zeros_like(weight[:, 0]),
        )
        target = F.linear(x.double(), teacher.weight.double())
        scale = float((target - target.mean(0)).square().sum(1).mean())
        guard = cls((signs @ weight).float(), (signs @ bias).float(), scale if scale > 0 else 1.0)
        exact = float(F.linear(x.double(), weight, bias).square().sum(1).mean())
        if exact > 0:
            guard.scale *= float(guard(x).mean()) * guard.scale / exact
        return guard.calibrated(student, x)

    @torch.no_grad()
    def calibrated(self, student: Factored, x: Tensor) -> Self:
        """The same guard of the same student with the thresholds that these rows give, at each of its ranks."""
        A, B = student.factors(torch.float64)
        directions = _signs(len(self.offset), len(B)).to(B.device) @ B  # (k, r)
        scores = x.double() @ A.T  # (N, r)
        if student.bias is not None and student.kept_mean is not None:
            scores = scores - student.kept_mean.double()
        error = F.linear(x.double(), self.sketch.double(), self.offset.double())  # (N, k), sketched
        thresholds = []
        for rank in range(len(A), 0, -1):
            thresholds.append(float(torch.quantile(error.square().sum(1) / self.scale, QUANTILE)))
            error = error + scores[:, rank - 1, None] * directions[:, rank - 1]  # of the student one rank lower
        return type(self)(self.sketch, self.offset, self.scale, thresholds[::-1])

    def forward(self, x: Tensor) -> Tensor:
        """The estimated squared error of each row as a share of the output's variance: `(…, n)` → `(…,)`."""
        return F.linear(x.to(self.sketch), self.sketch, self.offset).square().sum(-1) / self.scale

    def flags(self, x: Tensor) -> Tensor:
        """Which rows lie beyond the threshold, so that no fidelity is promised for them: `(…, n)` → `(…,)` bool.

        Raises:
            InputError: the threshold is not known.
        """
        if self.threshold is None:
            raise InputError(
                "Expected a calibrated guard but the threshold at this rank is not known; set "
                "`layer.guard = layer.guard.calibrated(layer, rows)` with rows like those the layer is for."
            )
        return self(x) > self.threshold

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"size={len(self.offset)}, threshold={self.threshold}"

    @torch.no_grad()
    def without(self, A: Tensor, B: Tensor, kept_mean: Tensor | None) -> Self:
        """The guard of the student that lost the directions `B A`.

        Args:
            A: dropped rows `(k', n)`; with none dropped the guard stays as it is.
            B: dropped columns `(m, k')`.
            kept_mean: `A mean`, `(k',)`, whose image under B went into the bias; None where the bias stayed.
        """
        if len(A) == 0:
            return self
        return self.plus(A, B, None if kept_mean is None else -B @ kept_mean, self.thresholds[: -len(A)])

    @torch.no_grad()
    def plus(self, A: Tensor, B: Tensor, c: Tensor | None, thresholds: Sequence[float] = ()) -> Self:
        """The guard of a student whose error is greater by `B A x + c`."""
        signs = _signs(len(self.offset), len(B)).to(B.device)
        sketch = self.sketch.double() + signs @ B.double() @ A.double()
        offset = self.offset.double() + (0 if c is None else signs @ c.double())
        return type(self)(sketch.float(), offset.float(), self.scale, thresholds)


def _signs(size: int, width: int) -> Tensor:
    """`S`, `(k, m)` float64. From a hash, not a generator: it must be the same in every version of torch."""
    stream = hashlib.shake_256(b"distil-rank guard").digest((size * width + 7) // 8)
    bits = torch.frombuffer(bytearray(stream), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (bits.flatten()[: size * width].double() * 2 - 1).reshape(size, width) / size**0.5
