"""Fine-tune the students inside a model against the output of the whole original model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.compression.agreement import output_rows
from distil_rank.compression.batches import Batches, Forward, Mask
from distil_rank.compression.modules import evaluating, installed
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.training.losses import Outputs, head_loss

log = logging.getLogger(__name__)

CHECKS = 20  # how often in a run the students are compared with the best so far
RIDGE = 0.01  # of the mean variance, added to each: directions without any would otherwise be blown up
CHECK_BATCHES = 10  # every tenth batch that is not held out selects the best and is not trained on


@dataclass(frozen=True)
class Tuning:
    """How fine-tuning went, on batches it did not train on.

    Attributes:
        steps: optimiser steps taken.
        start_loss: of the closed form.
        best_loss: of what was kept; equal to `start_loss` where training did not help.
    """

    steps: int
    start_loss: float
    best_loss: float


class _Whitened(nn.Module):
    """A student in coordinates in which its inputs have mean zero and unit covariance.

    Embeddings spread their variance very unevenly, so in plain coordinates no one learning rate suits all directions;
    in these the same number of steps ends up to several times closer.
    """

    whiten: Tensor
    mean: Tensor

    def __init__(self, student: LowRankLinear, moments: Moments) -> None:
        super().__init__()
        values, V = torch.linalg.eigh(moments.covariance.to(student.A.device))
        scale = (values.clamp_min(0) + RIDGE * values.mean().clamp_min(1e-12)).sqrt()
        self.register_buffer("whiten", (V / scale @ V.T).to(student.A))
        self.register_buffer("mean", moments.mean.to(student.A))
        assert student.bias is not None
        self.A = nn.Parameter(student.A.detach() @ (V * scale @ V.T).to(student.A))
        self.B = nn.Parameter(student.B.detach().clone())
        self.c = nn.Parameter((student.bias + student.B @ (student.A @ self.mean)).detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x - self.mean, self.A @ self.whiten), self.B, self.c)

    @torch.no_grad()
    def rates(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups whose steps are a share of what they move, so that no unit of measurement matters."""
        spread = torch.linalg.matrix_norm(self.B @ self.A) / len(self.c) ** 0.5
        sizes = {self.A: self.A.square().mean().sqrt(), self.B: self.B.square().mean().sqrt(), self.c: spread}
        return [{"params": [parameter], "lr": lr * float(size)} for parameter, size in sizes.items()]

    @torch.no_grad()
    def write_to(self, student: LowRankLinear) -> None:
        """Write the same map into the student's own factors."""
        student.A.copy_(self.A @ self.whiten)
        student.B.copy_(self.B)
        assert student.bias is not None
        student.bias.copy_(self.c - self.B @ (student.A @ self.mean))


def match_outputs(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    moments: Mapping[str, Moments],
    batches: Batches,
    steps: int,
    outputs: Outputs,
    forward: Forward,
    mask: Mask,
    lr: float = 0.015,
) -> Tuning:
    """Train the students that stand in for `originals`, and nothing else; end with the best, the start included.

    Args:
        model: with the students in place.
        originals: the dense layers, by name; put back for a moment, they make the model that is to be matched.
        moments: of the inputs of each.
        batches: the data.
        steps: of Adam, the rate decaying to zero over a cosine.
        outputs: `classification` compares probabilities and logits, `regression` values (`head_loss`).
        forward: runs the model on a batch.
        mask: true for what is not padding.
        lr: the first step of a parameter, as a share of its size.

    Raises:
        InputError: half-precision students, or a model whose outputs are no tensor.
    """
    students = {name: cast(LowRankLinear, model.get_submodule(name)) for name in originals}
    if any(student.A.dtype not in (torch.float32, torch.float64) for student in students.values()):
        raise InputError("Expected float32 layers to fine-tune but got half precision; use model.float() first.")
    trained: dict[LowRankLinear, _Whitened] = {}  # one for each student, also where a layer is in several places
    for name, student in students.items():
        if student not in trained:
            trained[student] = _Whitened(student, moments[name])
    match = _OutputMatch(model, originals, batches, outputs, forward, mask)
    # Dropout would make the target a moving one, so the model is in evaluation mode.
    with (
        torch.enable_grad(),
        _frozen(model),
        evaluating(model),
        installed(model, {name: trained[student] for name, student in students.items()}),
    ):
        tuning, improved = _train(match, nn.ModuleList(trained.values()), steps, lr)
    if improved:
        for student, whitened in trained.items():
            whitened.write_to(student)
    return tuning


@dataclass(frozen=True)
class _OutputMatch:
    """The distance between the outputs of a model with students and those of the same model with the originals."""

    model: nn.Module
    originals: Mapping[str, nn.Module]
    batches: Batches
    outputs: Outputs
    forward: Forward
    mask: Mask

    def loss(self, batch: Any) -> Tensor:
        """Of one batch, a scalar."""
        with torch.no_grad(), installed(self.model, self.originals):
            target = output_rows(self.forward(self.model, batch), self.mask(batch))
        return head_loss(output_rows(self.forward(self.model, batch), self.mask(batch)), target, self.outputs).mean()

    @torch.no_grad()
    def check(self) -> float:
        """Mean loss of the batches that are not trained on; infinite where it is no number."""
        values = [float(self.loss(batch)) for batch, kind in _with_checks(self.batches) if kind == "check"]
        value = sum(values) / len(values)
        return value if math.isfinite(value) else math.inf


def _train(match: _OutputMatch, trained: nn.ModuleList, steps: int, lr: float) -> tuple[Tuning, bool]:
    """Train; end with the best parameters seen, and whether these are better than the start."""
    optimizer = torch.optim.Adam([group for one in trained for group in cast(_Whitened, one).rates(lr)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    best = start = match.check()
    best_state = copy.deepcopy(trained.state_dict())
    for step, batch in enumerate(_endless(match.batches, steps), start=1):
        optimizer.zero_grad(set_to_none=True)
        match.loss(batch).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            value = match.check()
            log.info("fine-tuning: step %d of %d, loss %.3g (at the start %.3g)", step, steps, value, start)
            if value < best:
                best, best_state = value, copy.deepcopy(trained.state_dict())
    trained.load_state_dict(best_state)
    return Tuning(steps, start, best), best < start


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model takes gradients inside; afterwards as before."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _with_checks(batches: Batches) -> Iterator[tuple[Any, Literal["train", "check"]]]:
    """The batches that are not held out; the first and every tenth after it check, the others train."""
    fitting = (batch for batch, held_out in batches if not held_out)
    for index, batch in enumerate(fitting):
        yield batch, "check" if index % CHECK_BATCHES == 0 else "train"


def _endless(batches: Batches, steps: int) -> Iterator[Any]:
    taken = 0
    while taken < steps:
        before = taken
        for batch, kind in _with_checks(batches):
            if kind == "train" and taken < steps:
                taken += 1
                yield batch
        if taken == before:
            raise InputError(
                "Expected at least two batches to fine-tune on, one of them to check; use smaller batches."
            )
