"""Fine-tune the students inside a model against what the whole original model puts out."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distil_rank.agreement import Outputs, output_rows
from distil_rank.capture import Batches, Forward, Mask, evaluating, installed
from distil_rank.errors import InputError

log = logging.getLogger(__name__)

CHECKS = 20  # how often in a run the students are compared with the best so far
CHECK_BATCHES = 10  # every tenth batch that is not held out chooses among them and is not trained on


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


def match_outputs(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Batches,
    steps: int,
    outputs: Outputs,
    forward: Forward,
    mask: Mask,
    lr: float = 1e-3,
) -> Tuning:
    """Train the students that stand in for `originals`, and nothing else; end with the best, the start included.

    Args:
        model: with the students in place.
        originals: the dense layers, by name; put back for a moment, they make the model that is to be matched.
        batches: the data.
        steps: of Adam, the rate decaying to zero over a cosine.
        outputs: `classification` compares probabilities and logits, `regression` values (`tail_loss`).
        forward: runs the model on a batch.
        mask: true for what is not padding.
        lr: the first rate.

    Raises:
        InputError: half-precision students, or a model whose outputs are no tensor.
    """
    from distil_rank.distil import tail_loss  # noqa: PLC0415, it brings Lightning

    students = {name: model.get_submodule(name) for name in originals}
    parameters = list(dict.fromkeys(one for student in students.values() for one in student.parameters()))
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in parameters):
        raise InputError("Expected float32 layers to fine-tune but got half precision; use model.float() first.")
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for student in students.values():
        student.requires_grad_(True)

    def loss(batch: Any) -> Tensor:
        with torch.no_grad(), installed(model, originals):
            target = output_rows(forward(model, batch), mask(batch))
        return tail_loss(output_rows(forward(model, batch), mask(batch)), target, outputs).mean()

    @torch.no_grad()
    def check() -> float:
        values = [float(loss(batch)) for batch, kind in _dealt(batches) if kind == "check"]
        value = sum(values) / len(values)
        return value if math.isfinite(value) else math.inf

    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    try:
        with evaluating(model):  # dropout would make the target a moving one
            best = start = check()
            kept = copy.deepcopy({name: student.state_dict() for name, student in students.items()})
            for step, batch in enumerate(_endless(batches, steps), start=1):
                optimizer.zero_grad(set_to_none=True)
                loss(batch).backward()
                optimizer.step()
                schedule.step()
                if step % max(1, steps // CHECKS) == 0 or step == steps:
                    value = check()
                    log.info("fine-tuning: step %d of %d, loss %.3g (at the start %.3g)", step, steps, value, start)
                    if value < best:
                        best = value
                        kept = copy.deepcopy({name: student.state_dict() for name, student in students.items()})
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    for name, student in students.items():
        student.load_state_dict(kept[name])
    return Tuning(steps, start, best)


def _dealt(batches: Batches) -> Iterator[tuple[Any, Literal["train", "check"]]]:
    """The batches that are not held out; the first and every tenth after it check, the others train."""
    fitting = (batch for batch, held_out in batches if not held_out)
    for index, batch in enumerate(fitting):
        yield batch, "check" if index % CHECK_BATCHES == 0 else "train"


def _endless(batches: Batches, steps: int) -> Iterator[Any]:
    taken = 0
    while taken < steps:
        before = taken
        for batch, kind in _dealt(batches):
            if kind == "train" and taken < steps:
                taken += 1
                yield batch
        if taken == before:
            raise InputError(
                "Expected at least two batches to fine-tune on, one of them to check; use smaller batches."
            )
