"""How far a predictor can be trusted: calibrated on validation proteins, measured on others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.task import Target
from distil_rank.lowrank.predictor import Predictor
from distil_rank.measure.calibration import calibration_error, conformal_scores, fit_temperature, reliability
from distil_rank.measure.statistics import Interval, estimate, mean, resample_counts
from distil_rank.options.evaluation import Kind

STUDENT = "student"  # its name in the evaluation
ENOUGH = 10  # proteins of a class for a coverage of its own


@dataclass(frozen=True)
class Trust:
    """Of one predictor, on proteins that it was neither trained, chosen nor calibrated on.

    Attributes:
        confidence: of the sets or intervals.
        coverage: share of the truths inside, with its interval over groups.
        by_class: the same for each class that has enough proteins.
        size: mean number of classes in a set, or mean width of an interval.
        calibration_error: of the probabilities, and before the temperature; None for values.
        temperature: of the logits.
        reliability: mean confidence, accuracy and count of each bin; empty for values.
    """

    confidence: float
    coverage: Interval
    by_class: dict[str, float]
    size: float
    calibration_error: float | None
    before: float | None
    temperature: float
    reliability: list[list[float]]


def calibrate(predictor: Predictor, x: Tensor, y: np.ndarray, group: np.ndarray) -> None:
    """Set the temperature, the conformal scores and the distances of a predictor, by validation proteins `(N, d)`.

    Every group `(N,)` of theirs weighs the same among the scores.
    """
    with torch.no_grad():
        output = predictor(x)
        if predictor.kind != "regression":
            temperature = fit_temperature(output, torch.from_numpy(y), predictor.kind)
            predictor.temperature.mul_(temperature)
            output = predictor.probabilities(output / temperature)
        scores = conformal_scores(output.double().numpy(), y, predictor.kind)
        of_score = group[np.nonzero(y)[0]] if predictor.kind == "multilabel" else group
        _, number, sizes = np.unique(of_score, return_inverse=True, return_counts=True)
        predictor.scores = torch.from_numpy(scores).float()
        predictor.weights = torch.from_numpy(1 / (sizes[number] * (len(sizes) + 1))).float()
        predictor.distances = predictor.distance(x).sort().values


def measure_trust(predictor: Predictor, x: Tensor, target: Target, group: np.ndarray, confidence: float = 0.9) -> Trust:
    """Coverage and calibration error on other proteins `(N, d)`, whose labels are `target`."""
    y = target.y
    assert y is not None
    kind, temperature, limit = predictor.kind, float(predictor.temperature), predictor.threshold(confidence)
    with torch.no_grad():
        output = predictor(x).double()
    p, raw = output.numpy(), None
    if kind != "regression":
        p, raw = predictor.probabilities(output).numpy(), predictor.probabilities(output * temperature).numpy()
    # where labels are several, each true one counts by itself; proteins without any say nothing
    owner = np.nonzero(y)[0] if kind == "multilabel" else np.arange(len(y))
    inside = (conformal_scores(p, y, kind) <= limit).astype(float)
    number = np.unique(group[owner], return_inverse=True)[1]
    coverage = mean(inside, number)
    of_class = np.nonzero(y)[1] if kind == "multilabel" else y
    classes = {name: inside[of_class == k] for k, name in enumerate(target.classes)}
    return Trust(
        confidence=confidence,
        coverage=estimate(coverage, resample_counts(len(coverage.sums))),
        by_class={name: float(rows.mean()) for name, rows in classes.items() if len(rows) >= ENOUGH},
        size=2 * limit if raw is None else float((1 - p <= limit).sum(axis=1).mean()),
        calibration_error=None if raw is None else calibration_error(p, y, kind),
        before=None if raw is None else calibration_error(raw, y, kind),
        temperature=temperature,
        reliability=[] if raw is None else reliability(p, y, kind).tolist(),
    )


@dataclass(frozen=True)
class PredictorResult:
    """A student with its teacher's head, measured on groups that nothing was fitted, chosen or calibrated on.

    Attributes:
        parameters: of the dense layer and of the student.
        share: of the teacher's predictions that was to be retained.
        retained: share that is, with its interval over groups (values: R² against the teacher's).
        probability_error: mean absolute difference from the teacher's probabilities; None for values.
        evaluation: scores of teacher and student.
        confusion: proteins of each class by predicted class; empty for others than classes.
        values: true and predicted ones; empty for classes.
        curve: what each rank that was tried retains on the validation proteins.
    """

    teacher: str
    kind: Kind
    classes: tuple[str, ...]
    rank: int
    parameters: tuple[int, int]
    share: float
    retained: Interval
    probability_error: float | None
    evaluation: Evaluation
    trust: Trust
    confusion: list[list[int]]
    values: list[list[float]]
    curve: list[dict[str, Any]]

    @property
    def verdict(self) -> str:
        """Whether the share that was asked for is confirmed."""
        return "confirmed" if self.retained.value >= self.share else "not confirmed"

    def figures(self) -> dict[str, float]:
        """What MLflow shows."""
        trust, headline = self.trust, self.evaluation.headline
        figures = {"retained": self.retained.value, "parameter_ratio": self.parameters[0] / self.parameters[1]}
        figures |= {"coverage": trust.coverage.value, headline: self.evaluation.entry(STUDENT).scores[headline].value}
        optional = {"calibration_error": trust.calibration_error, "calibration_error_before": trust.before}
        optional |= {"probability_error": self.probability_error}
        return figures | {name: value for name, value in optional.items() if value is not None}
