"""How far predictions can be trusted: temperature, conformal scores, calibration error, and what a student retains."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from distil_rank.options.evaluation import Kind

BINS = 10  # of the calibration error, of equal width


def fit_temperature(logits: Tensor, y: Tensor, kind: Kind) -> float:
    """The temperature in [1/1000, 1000] at which `logits / temperature` have the least cross-entropy (Guo et al. 2017).

    The loss is convex in the inverse temperature, so that it has one minimum on a logarithmic scale too.

    >>> import torch
    >>> logits = torch.tensor([[8.0, 0.0], [8.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 1, 1]), "classification"), 2)  # three in four: ln 3 = 8 / T
    7.28
    """
    one, logits = kind == "classification", logits.double()
    loss = F.cross_entropy if one else F.binary_cross_entropy_with_logits
    y = y if one else y.double()
    return float(10 ** minimize_scalar(lambda power: float(loss(logits / 10**power, y)), bounds=(-3, 3)).x)


def conformal_scores(outputs: np.ndarray, y: np.ndarray, kind: Kind) -> np.ndarray:
    """How little each truth was expected: 1 less its probability, one for each true class, or the absolute residual.

    Args:
        outputs: probabilities `(N, K)`, or values `(N, 1)`.
        y: classes `(N,)`, 0 or 1 of labels `(N, K)`, or values `(N,)`.

    >>> conformal_scores(np.array([[0.25, 0.75]]), np.array([1]), "classification").tolist()
    [0.25]
    """
    if kind == "regression":
        return np.abs(outputs[:, 0] - y)
    if kind == "classification":
        return 1 - outputs[np.arange(len(y)), y]
    return 1 - outputs[y.astype(bool)]


def reliability(probabilities: np.ndarray, y: np.ndarray, kind: Kind) -> np.ndarray:
    """What was said and what came true, by bins of equal width: `(bins, 3)` of mean confidence, accuracy and count.

    Classes count by their most likely one, labels each by itself.
    """
    if kind == "classification":
        said, true = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    else:
        said, true = probabilities.ravel(), y.ravel().astype(bool)
    number = np.minimum((said * BINS).astype(int), BINS - 1)
    counts = np.bincount(number, minlength=BINS)
    sums = np.stack([np.bincount(number, values, minlength=BINS) for values in (said, true.astype(float))])
    return np.vstack([sums / np.maximum(counts, 1), counts]).T


def calibration_error(probabilities: np.ndarray, y: np.ndarray, kind: Kind) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins, weighted by their rows.

    >>> p = np.array([[0.75, 0.25]] * 4)
    >>> calibration_error(p, np.array([0, 0, 0, 1]), "classification")
    0.0
    >>> calibration_error(p, np.array([0, 0, 0, 0]), "classification")
    0.25
    """
    said, true, count = reliability(probabilities, y, kind).T
    return float((np.abs(said - true) * count).sum() / count.sum())


def overlap(ours: Tensor, theirs: Tensor, kind: Kind) -> Tensor:
    """How much of the teacher's predictions `(N, K)` a student's hold, for each row `(N,)`.

    Probabilities of classes: 1 less the total variation, the chance that both say the same; of labels: 1 less the mean
    difference. Of decisions, probabilities that are 0 or 1, the mean is the share of equal ones. Values: 1 less the
    squared difference over the variance of the teacher's, whose mean is R² against the teacher.

    >>> import torch
    >>> overlap(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]]), "classification").tolist()
    [0.75]
    """
    difference = (ours - theirs).abs().double()
    if kind == "regression":
        return 1 - (difference**2 / theirs.double().var(0, correction=0).clamp_min(1e-300)).mean(-1)
    return 1 - (difference.sum(-1) / 2 if kind == "classification" else difference.mean(-1))
