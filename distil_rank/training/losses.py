"""The losses of distillation: at the layer itself, or at the end of the model behind it."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Outputs = Literal["classification", "regression"]


def layer_loss(output: Tensor, target: Tensor, alpha: float, variance: float = 1.0) -> dict[str, Tensor]:
    """Squared error and angle between the outputs of student and teacher.

    Args:
        output: of the student, `(N, m)`.
        target: of the teacher, `(N, m)`.
        alpha: weight of the angle.
        variance: what the squared error is divided by.

    Returns:
        `loss`, and its parts `mse` and `one_minus_cosine`, each `(N,)`.

    >>> import torch
    >>> parts = layer_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), alpha=0.1, variance=2.0)
    >>> {name: round(value.item(), 3) for name, value in parts.items()}
    {'loss': 0.6, 'mse': 1.0, 'one_minus_cosine': 1.0}
    """
    mse = (output - target).square().mean(-1)
    angle = 1 - F.cosine_similarity(output, target, dim=-1)
    return {"loss": mse / variance + alpha * angle, "mse": mse, "one_minus_cosine": angle}


def head_loss(outputs: Tensor, target: Tensor, kind: Outputs) -> Tensor:
    """The distance of each row at the end of the model from the teacher's, `(N,)`.

    Classification: the Kullback-Leibler divergence KL(teacher ‖ student) of the class probabilities (Hinton, Vinyals
    and Dean, 2015), plus a tenth of the squared error of the logits, which still pulls where both are certain.
    Regression: the squared error.

    Args:
        outputs: of the head on the student's output, `(N, classes)` logits or `(N, k)` values.
        target: the same on the teacher's output.
        kind: what they are; a single column of classification is the logit of yes against no.

    >>> import torch
    >>> logits = torch.tensor([[2.0, -1.0]])
    >>> head_loss(logits, logits, "classification").tolist()
    [0.0]
    """
    squared = (outputs - target).square().mean(-1)
    if kind == "regression":
        return squared
    student, teacher = (F.log_softmax(class_logits(values), -1) for values in (outputs, target))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) + 0.1 * squared


def class_logits(logits: Tensor) -> Tensor:
    """One logit for each class: where there is one column, `(N, 1)`, beside it that of "no", which is zero.

    >>> import torch
    >>> class_logits(torch.tensor([[3.0]])).softmax(-1)[0, 0] == torch.tensor(3.0).sigmoid()
    tensor(True)
    """
    return F.pad(logits, (0, 1)) if logits.shape[-1] == 1 else logits
