"""Two versions of a model compared by their outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.compression.batches import Batches, Forward, Mask
from distil_rank.compression.modules import evaluating, installed
from distil_rank.errors import InputError
from distil_rank.training.losses import Outputs, class_logits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """The whole model's output beside the original's, on held-out rows.

    Attributes:
        rows: compared.
        r2: share of the outputs' variance kept.
        predictions_retained: share of rows whose most probable class stayed; None for regression.
        probability_error: mean total variation distance of the class probabilities; for two classes, the mean absolute
            error of the probability. None for regression.
    """

    rows: int
    r2: float
    predictions_retained: float | None = None
    probability_error: float | None = None


@torch.no_grad()
def agreement(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Batches,
    outputs: Outputs,
    forward: Forward,
    mask: Mask,
) -> Agreement | None:
    """Compare the model's outputs with and without its students on the held-out batches."""
    rows, residual, energy, total = 0, 0.0, 0.0, torch.zeros(())
    retained, error = 0.0, 0.0
    with evaluating(model):
        for batch in (batch for batch, held_out in batches if held_out):
            with installed(model, originals):
                raw = forward(model, batch)
            try:
                target, output = (output_rows(value, mask(batch)).double() for value in (raw, forward(model, batch)))
            except InputError as problem:
                log.warning("The whole model's output is not compared. %s", problem)
                return None
            rows += len(target)
            residual += float((output - target).square().sum())
            energy += float(target.square().sum())
            total = total.to(target) + target.sum(0)
            ours, theirs = class_logits(output), class_logits(target)
            retained += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            error += float((ours.softmax(-1) - theirs.softmax(-1)).abs().sum()) / 2
    if rows == 0:
        log.warning("Nothing was held out (fewer than 5 batches), so held-out fidelity is not known; give `held_out`.")
        return None
    variance = energy - float(total.square().sum()) / rows
    r2 = 1 - residual / variance if variance > 0 else float(residual == 0)
    return Agreement(rows, r2, retained / rows, error / rows) if outputs == "classification" else Agreement(rows, r2)


def output_rows(output: Any, mask: Tensor | None) -> Tensor:
    """The output of a model as rows `(N, k)`: a tensor, `logits` of a mapping or object, or the first of a tuple.

    Raises:
        InputError: none of these.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim == 0:
        actual = "one number" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"Expected the model to return rows, as a tensor or `logits`, but got {actual};"
            " give `forward=lambda model, batch: …` that returns the tensor that matters."
        )
    if mask is not None and output.ndim == 3 and mask.shape == output.shape[:2]:
        return output[mask.to(output.device).bool()]
    return output.reshape(-1, output.shape[-1])
