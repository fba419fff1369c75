"""The losses of distillation: at the layer itself, or at the end of the model behind it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = Literal["classification", "regression"]

EPS = 1e-8  # least length of a row in its cosine, as in torch


def layer_loss(output: Tensor, target: Tensor, alpha: float, variance: float = 1.0) -> dict[str, Tensor]:
    """Squared error and angle between the outputs of student and teacher, `(N, m)`.

    Args:
        output: of the student.
        target: of the teacher.
        alpha: weight of the angle.
        variance: what the squared error is divided by.

    Returns:
        `loss`, and its parts `mse` and `one_minus_cosine`, each `(N,)`.

    >>> import torch
    >>> parts = layer_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), alpha=0.1, variance=2.0)
    >>> {name: round(value.item(), 3) for name, value in parts.items()}
    {'loss': 0.6, 'mse': 1.0, 'one_minus_cosine': 1.0}
    """
    mse, cosine = _RowErrors.apply(output, target)
    angle = 1 - cosine
    return {"loss": mse / variance + alpha * angle, "mse": mse, "one_minus_cosine": angle}


class _RowErrors(torch.autograd.Function):
    """Mean squared error and cosine of each row, with the gradient for the student's output in three passes.

    Autograd's own composition of the two takes as long as the matrix products of a small student, or longer: it makes
    a tensor of the output's size for each operation. The target, the frozen teacher's, has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `(..., m)` → two tensors `(...)`."""
        assert not ctx.needs_input_grad[1], "the teacher is frozen"
        error = output - target
        own, other = (torch.linalg.vecdot(x, x).sqrt().clamp(min=EPS) for x in (output, target))
        cosine = torch.linalg.vecdot(output, target) / own / other
        ctx.save_for_backward(output, target, error, own, other, cosine)
        return torch.linalg.vecdot(error, error) / output.shape[-1], cosine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """∂mse/∂s = 2 (s − t) / m and ∂cos/∂s = t / (‖s‖ ‖t‖) − cos · s / ‖s‖²."""
        output, target, error, own, other, cosine = ctx.saved_tensors
        of_mse, of_cosine = gradients
        gradient = error * (2 / output.shape[-1] * of_mse)[..., None]
        gradient.addcmul_(target, (of_cosine / own / other)[..., None])
        gradient.addcmul_(output, (of_cosine * cosine / own.square())[..., None], value=-1)
        return gradient, None


def head_loss(logits: Tensor, target: Tensor, outputs: Outputs) -> Tensor:
    """The distance of each row at the end of the model from the teacher's, `(N,)`.

    Classification: the Kullback-Leibler divergence KL(teacher ‖ student) of the class probabilities (Hinton, Vinyals
    and Dean, 2015), plus a tenth of the squared error of the logits, which still pulls where both are certain.
    Regression: the squared error.

    Args:
        logits: `(N, classes)`, of the student.
        target: the same of the teacher.
        outputs: what they are; a single column of classification is the logit of yes against no.

    >>> import torch
    >>> logits = torch.tensor([[2.0, -1.0]])
    >>> head_loss(logits, logits, "classification").tolist()
    [0.0]
    """
    squared = (logits - target).square().mean(-1)
    if outputs == "regression":
        return squared
    student, teacher = (F.log_softmax(class_logits(values), -1) for values in (logits, target))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) + 0.1 * squared


def class_logits(logits: Tensor) -> Tensor:
    """One logit for each class: where there is one column, `(N, 1)`, beside it that of "no", which is zero.

    >>> import torch
    >>> class_logits(torch.tensor([[3.0]])).softmax(-1)[0, 0] == torch.tensor(3.0).sigmoid()
    tensor(True)
    """
    return F.pad(logits, (0, 1)) if logits.shape[-1] == 1 else logits
