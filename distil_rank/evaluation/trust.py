"""How far a predictor can be trusted: calibrated on validation proteins, measured on others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.evaluation.evaluate import Evaluation, evaluate
from distil_rank.evaluation.labelled import LabelledData
from distil_rank.evaluation.probes import decide
from distil_rank.evaluation.representations import Representation, Role
from distil_rank.evaluation.task import Target
from distil_rank.lowrank.predictor import Predictor
from distil_rank.measure.calibration import agreement, calibration_error, conformal_scores, fit_temperature, reliability
from distil_rank.measure.statistics import Interval, estimate, mean, resample_counts

TEACHER, STUDENT = "teacher", "student"  # their names in the evaluation
ENOUGH = 10  # proteins of a class for a coverage of its own


@torch.no_grad()
def calibrate(predictor: Predictor, x: Tensor, y: np.ndarray, group: np.ndarray) -> None:
    """Set the temperature, the conformal scores and the distances of a predictor, by validation proteins `(N, d)`.

    Every group `(N,)` of theirs weighs the same among the scores.
    """
    if predictor.kind != "regression":
        predictor.temperature *= fit_temperature(predictor(x), torch.from_numpy(y), predictor.kind)
    scores = conformal_scores(predictor.read_out(predictor(x)).double().numpy(), y, predictor.kind)
    of_score = group[np.nonzero(y)[0]] if predictor.kind == "multilabel" else group
    _, number, sizes = np.unique(of_score, return_inverse=True, return_counts=True)
    order = scores.argsort()
    predictor.scores = torch.from_numpy(scores[order]).float()
    predictor.weights = torch.from_numpy(1 / (sizes[number] * (len(sizes) + 1))[order]).float()
    predictor.distances = predictor.distance(x).quantile(torch.linspace(0, 1, len(predictor.distances)))


@dataclass(frozen=True)
class Trust:
    """Of one predictor, on proteins that it was neither trained, chosen nor calibrated on.

    Attributes:
        confidence: of the sets or intervals.
        coverage: share of the truths inside, with its interval over groups.
        by_class: the same for each class that has enough proteins.
        size: mean number of classes in a set, or width of an interval.
        calibration_error: of the probabilities, and before the temperature; None for values.
        reliability: mean confidence, accuracy and count of each bin; empty for values.
    """

    confidence: float
    coverage: Interval
    by_class: dict[str, float]
    size: float
    calibration_error: float | None = None
    before: float | None = None
    reliability: Sequence[Sequence[float]] = ()


@torch.no_grad()
def measure_trust(predictor: Predictor, x: Tensor, target: Target, group: np.ndarray, confidence: float = 0.9) -> Trust:
    """Coverage and calibration error on other proteins `(N, d)`, whose labels are `target`."""
    y, kind, limit, output = target.y, predictor.kind, predictor.threshold(confidence), predictor(x).double()
    assert y is not None
    p = predictor.read_out(output).numpy()
    # where labels are several, each true one counts by itself; proteins without any say nothing
    owner, of_class = np.nonzero(y) if kind == "multilabel" else (np.arange(len(y)), y)
    inside = (conformal_scores(p, y, kind) <= limit).astype(float)
    coverage = mean(inside, np.unique(group[owner], return_inverse=True)[1])
    counted = estimate(coverage, resample_counts(len(coverage.sums)))
    if kind == "regression":
        return Trust(confidence, counted, {}, 2 * limit)
    classes = {name: inside[of_class == k] for k, name in enumerate(target.classes)}
    raw = predictor.read_out(output * predictor.temperature).numpy()
    return Trust(
        confidence,
        counted,
        by_class={name: float(rows.mean()) for name, rows in classes.items() if len(rows) >= ENOUGH},
        size=float((1 - p <= limit).sum(axis=1).mean()),
        calibration_error=calibration_error(p, y, kind),
        before=calibration_error(raw, y, kind),
        reliability=reliability(p, y, kind).tolist(),
    )


@torch.no_grad()
def predictions(name: str, predictor: Predictor, x: Tensor, role: Role) -> Representation:
    """A row of the evaluation: what a predictor says of the evaluated proteins `(N, d)`."""
    decided = decide(predictor.kind, predictor(x).double().numpy())
    return Representation(name, role, None, lambda fit: decided)


@dataclass(frozen=True)
class PredictorResult:
    """A student with its teacher's head, measured on groups that nothing was fitted, chosen or calibrated on.

    Attributes:
        parameters: of the dense layer and of the student.
        share: of the teacher's predictions that was to be retained.
        retained: share that is, with its interval over groups (values: R² against the teacher's).
        probability_error: mean absolute difference from the teacher's probabilities; None for values.
        evaluation: scores of teacher and student.
        decisions: the truth and the student's prediction of each protein: numbers of classes, labels, or values.
        curve: what students of each rank retain on the validation proteins.
    """

    classes: Sequence[str]
    rank: int
    parameters: Sequence[int]
    share: float
    retained: Interval
    probability_error: float | None
    evaluation: Evaluation
    trust: Trust
    decisions: Sequence[Any]
    curve: Sequence[dict[str, Any]]

    @property
    def verdict(self) -> str:
        """Whether the share that was asked for is confirmed."""
        return "confirmed" if self.retained.value >= self.share else "not confirmed"

    def figures(self) -> dict[str, float]:
        """What MLflow shows."""
        trust, headline = self.trust, self.evaluation.headline
        figures = {
            "retained": self.retained.value,
            "parameter_ratio": self.parameters[0] / self.parameters[1],
            "coverage": trust.coverage.value,
            headline: self.evaluation.entry(STUDENT).scores[headline].value,
            "calibration_error": trust.calibration_error,
            "calibration_error_before": trust.before,
            "probability_error": self.probability_error,
        }
        return {name: value for name, value in figures.items() if value is not None}


@torch.no_grad()
def measure_student(
    teacher: Predictor, student: Predictor, proteins: LabelledData, share: float, curve: Sequence[dict[str, Any]]
) -> PredictorResult:
    """Scores, predictions retained and calibration on the test groups, which nothing was fitted or chosen on."""
    target, groups, kind = proteins.target, proteins.groups, student.kind
    test = groups.evaluated
    x, target = torch.from_numpy(proteins.embeddings.x[test]), target.subset(test)
    ours, theirs = (model(x) * model.temperature for model in (student, teacher))
    number = np.unique(groups.number[test], return_inverse=True)[1]
    same = mean(agreement(ours, theirs, kind).numpy(), number)
    p, q = (student.read_out(one / student.temperature) for one in (ours, theirs))
    rank = int(getattr(student.layer, "rank", min(teacher.layer.weight.shape)))  # type: ignore[arg-type]
    rows = [predictions(TEACHER, teacher, x, "reference"), predictions(STUDENT, student, x, "student")]
    assert target.y is not None
    return PredictorResult(
        classes=student.classes,
        rank=rank,
        parameters=tuple(sum(one.numel() for one in model.layer.parameters()) for model in (teacher, student)),
        share=share,
        retained=estimate(same, resample_counts(len(same.sums))),
        probability_error=None if kind == "regression" else float((p - q).abs().mean()),
        evaluation=evaluate(proteins.target, groups, rows, proteins.labels, proteins.notes),
        trust=measure_trust(student, x, target, number),
        decisions=[target.y.tolist(), decide(kind, ours.double().numpy()).tolist()],
        curve=curve,
    )
