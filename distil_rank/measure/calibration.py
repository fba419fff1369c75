"""How far predictions can be trusted: temperature, conformal scores, calibration error, and what a student retains."""

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


def agreement(ours: Tensor, theirs: Tensor, kind: Kind) -> Tensor:
    """How far a student's outputs `(N, K)` decide as the teacher's, for each row `(N,)`.

    Classes: 1 where the most likely one is the same. Labels: share of equal decisions. Values: 1 less the squared
    difference over the variance of the teacher's, whose mean is R² against the teacher.
    """
    if kind == "classification":
        return (ours.argmax(-1) == theirs.argmax(-1)).double()
    if kind == "multilabel":
        return ((ours > 0) == (theirs > 0)).double().mean(-1)
    variance = theirs.double().var(0, correction=0).clamp_min(1e-300)
    return 1 - ((ours - theirs).double() ** 2 / variance).mean(-1)


def expected_agreement(ours: Tensor, theirs: Tensor, kind: Kind) -> float:
    """What `agreement` is to be expected on further rows, by all pairs of a row's margin and another row's change.

    Few rows cannot tell 99.9 % from 99 %. A decision flips where the student takes more off the teacher's margin than
    there is: off the distance of its best two classes, or a label's logit from 0. N rows make N² pairs.

    >>> import torch
    >>> theirs = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    >>> expected_agreement(theirs + torch.tensor([[0.0, 0.0], [2.0, -2.0]]), theirs, "classification")
    0.75
    """
    if kind == "regression":
        return float(agreement(ours, theirs, kind).mean())
    change = (ours - theirs).double()
    if kind == "classification":
        (best, second), at = theirs.double().topk(2, -1).values.T, theirs.topk(2, -1).indices
        margin, taken = best - second, change.gather(1, at).diff(dim=1)[:, 0]
    else:
        margin, taken = theirs.double().abs().flatten(), (-change * theirs.sign()).flatten()
    return float(np.searchsorted(np.sort(taken.numpy()), margin.numpy()).mean() / len(taken))
