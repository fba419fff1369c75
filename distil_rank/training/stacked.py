"""Students of several seeds as one model: their parameters have a leading dimension, their batches too.

One training step of the stack is one step of each student. Their losses are added up and share no parameter, and AdamW
works element by element, so every student gets the gradients, and takes the steps, that it would alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from distil_rank.data.datamodule import Rows
from distil_rank.lowrank.low_rank import LowRankLinear

Batch = tuple[Tensor, Tensor | None]  # rows, and the teacher's output for them if it is at hand


class StackedStudents(nn.Module):
    """S low-rank students of one shape, each applied to its own rows.

    Args:
        students: of one shape.

    >>> students = [LowRankLinear(8, 6, rank=2) for _ in range(3)]
    >>> x = torch.randn(3, 5, 8)
    >>> y = StackedStudents(students)(x)
    >>> all(torch.allclose(y[i], students[i](x[i]), atol=1e-6) for i in range(3))
    True
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    input_mean: Tensor | None

    def __init__(self, students: Sequence[LowRankLinear]) -> None:
        super().__init__()
        first = students[0]
        for name in ("A", "B", "bias"):
            values = [getattr(student, name) for student in students]
            stacked = None if values[0] is None else nn.Parameter(torch.stack([value.detach() for value in values]))
            self.register_parameter(name, stacked)
        self.register_buffer("input_mean", first.input_mean)
        self.provenance = first.provenance

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, index: int) -> LowRankLinear:
        """A copy of one student."""
        _, rank, n = self.A.shape
        has_mean = self.input_mean is not None
        shape = (n, self.B.shape[1], rank, self.bias is not None, has_mean)
        with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which must not move anybody's batches
            student = LowRankLinear(*shape, device=self.A.device, dtype=self.A.dtype)
        with torch.no_grad():
            for name in ("A", "B", "bias"):
                if (value := getattr(self, name)) is not None:
                    getattr(student, name).copy_(value[index])
            if self.input_mean is not None and student.input_mean is not None:
                student.input_mean.copy_(self.input_mean)
        student.provenance = dict(self.provenance)
        return student

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[1]

    def forward(self, x: Tensor, rank: int | None = None) -> Tensor:
        """`(S, N, n)`, or `(N, n)` for all alike, → `(S, N, m)`, at full rank or at a lower one."""
        if rank is None or rank == self.rank:
            if self.bias is None or torch.is_autocast_enabled(x.device.type):
                y = x @ self.A.mT @ self.B.mT
                return y if self.bias is None else y + self.bias[:, None]
            output: Tensor = _TwoFactors.apply(x, self.A, self.B, self.bias)
            return output
        y = x @ self.A[:, :rank].mT @ self.B[:, :, :rank].mT
        if self.bias is None:
            return y
        bias: Tensor = self.bias
        if self.input_mean is not None:  # as `LowRankLinear.truncate` does
            bias = bias + (self.B[:, :, rank:] @ (self.A[:, rank:] @ self.input_mean)[..., None]).squeeze(-1)
        return y + bias[:, None]


class _TwoFactors(torch.autograd.Function):
    """`y = B A x + b` with the gradients in the parameters' own layout; autograd's come transposed and are copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        """`(S, N, n)` or `(N, n)`, `(S, r, n)`, `(S, m, r)` and `(S, m)` → `(S, N, m)`."""
        assert not ctx.needs_input_grad[0], "the rows have no gradient"
        hidden = x @ A.mT
        ctx.save_for_backward(x, B, hidden)
        return torch.baddbmm(bias[:, None], hidden, B.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """∂L/∂A = (g B)ᵀ x, ∂L/∂B = gᵀ h and ∂L/∂b = Σ g, with g = ∂L/∂y and h = A x."""
        (gradient,) = gradients
        x, B, hidden = ctx.saved_tensors
        return None, (gradient @ B).mT @ x, gradient.mT @ hidden, gradient.sum(1)


class RowsWithTargets(Dataset[Batch]):
    """Rows of a matrix with the teacher's output for each, where that was computed once and for all.

    Args:
        rows: inputs.
        targets: outputs, `(N, m)`, or None.
    """

    def __init__(self, rows: Rows, targets: Tensor | None) -> None:
        self.rows, self.targets = rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index], None if self.targets is None else self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch."""
        return self.rows.__getitems__(indices), None if self.targets is None else self.targets[indices]


class Numbers(Dataset[Tensor]):
    """The numbers 0, 1, …: batches of them are the row numbers that a sampler draws."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A whole batch."""
        return torch.tensor(indices)


class SeedBatches:
    """Batches of several seeds side by side: those that each seed's loader gives when it is alone.

    Args:
        rows: to take batches from.
        loaders: one per seed, of the same length, over the `Numbers` of the rows; their samplers draw from torch's
            global generator.
        states: of that generator, one per seed (`torch.get_rng_state`).
        validated: a validation pass precedes each epoch. Its loader draws a number too, and so it changes the batches
            that a seed gets when it is alone.
    """

    def __init__(
        self, rows: RowsWithTargets, loaders: Sequence[DataLoader[Tensor]], states: Sequence[Tensor], validated: bool
    ) -> None:
        self.rows, self.loaders, self.states, self.validated = rows, loaders, list(states), validated

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Batch]:
        """Rows `(S, N, n)` and targets `(S, N, m)`."""
        drawn = []
        for seed, loader in enumerate(self.loaders):
            with self._random_state(seed):
                if self.validated:
                    torch.empty((), dtype=torch.int64).random_()
                drawn.append(list(loader))
        for numbers in zip(*drawn, strict=True):
            x, targets = self.rows.__getitems__(torch.cat(numbers).tolist())  # one gather for all seeds
            shape = (len(numbers), len(numbers[0]))
            yield x.unflatten(0, shape), None if targets is None else targets.unflatten(0, shape)

    @contextmanager
    def _random_state(self, seed: int) -> Iterator[None]:
        """Torch's global generator as this seed left it."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states[seed])
            yield
            self.states[seed] = torch.get_rng_state()
