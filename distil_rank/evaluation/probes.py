"""Probes: a linear model on top of a representation, fitted and regularised on the fit groups only.

Ridge and logistic regression are fitted, each at the penalty that does best in a cross-validation over whole groups of
those to fit on, and the better one there is taken. Columns have one scale between them: standardised column by column,
a rotation of the vectors would change what a probe makes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier

from distil_rank.errors import InputError, examples
from distil_rank.evaluation.representations import CHANCE, MAJORITY, Sides
from distil_rank.evaluation.retrieval import Scores
from distil_rank.evaluation.task import Groups, Target
from distil_rank.measure.statistics import Statistic, macro_f1, matthews, mean, r2, spearman
from distil_rank.options.evaluation import Kind

FOLDS = 3
PENALTIES = range(-5, -1)  # powers of ten, of the vectors' variance for each row: tried at first
FURTHEST = range(-10, 4)  # beyond these nothing changes: rows are interpolated, or the most frequent class is taken
METRICS = {
    "classification": ("mcc", "accuracy", "macro_f1", "accuracy 1nn"),
    "multilabel": ("macro_f1", "macro_f1 1nn"),
    "regression": ("spearman", "r2"),
}
CHOSEN_BY = {"classification": "mcc", "multilabel": "macro_f1", "regression": "r2"}  # in the cross-validation
Predict = Callable[[float], np.ndarray]  # of new rows, by a model that was fitted with this penalty


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> Predict:
    """Ridge regression `(N, d)` to `(N,)` or `(N, K)` in closed form: one decomposition serves all penalties.

    With centred rows and `X Xᵀ = U S Uᵀ` it predicts `x Xᵀ U (S + N λ)⁻¹ Uᵀ y`, or the same from `Xᵀ X`, whichever is
    smaller (Hastie, Tibshirani and Friedman 2009, 3.4.1 and 18.3.5).

    >>> x, y = np.array([[-1.0], [1.0]]), np.array([-1.0, 1.0])
    >>> ridge(x, y, x)(1.0).tolist()  # Σ x y / (Σ x² + N λ) = 2 / (2 + 2)
    [-0.5, 0.5]
    """
    mean, offset = x.mean(axis=0), y.mean(axis=0)
    x, new, y = x - mean, new - mean, y - offset
    if len(x) < x.shape[1]:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = new @ x.T @ vectors, vectors.T @ y
    else:
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = new @ vectors, vectors.T @ (x.T @ y)
    return lambda penalty: left / (values.clip(0) + len(x) * penalty) @ right + offset


def logistic(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> Predict:
    """Logistic regression of classes `(N,)`, or of each label `(N, L)`, by scikit-learn."""

    def predict(penalty: float) -> np.ndarray:
        model: Any = LogisticRegression(C=1 / (len(x) * penalty), max_iter=200, tol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly converged ranks the same
            warnings.filterwarnings("ignore", "The number of unique classes|Label .* is present")  # --task decides
            return (OneVsRestClassifier(model) if y.ndim == 2 else model).fit(x, y).predict(new)

    return predict if y.ndim == 2 or len(np.unique(y)) > 1 else lambda _: np.full(len(new), y[0])


def choose_penalty(score: Callable[[float], float]) -> tuple[float, float]:
    """The power of ten that scores best, the strongest of equals, and its score.

    The range grows for as long as one of its ends is best.

    >>> choose_penalty(lambda penalty: -abs(penalty - 1e-7))[0]
    1e-07
    """
    scores = {power: score(10.0**power) for power in PENALTIES}
    while True:
        best = max(scores, key=lambda power: (scores[power], power))
        wider = {min(scores): best - 1, max(scores): best + 1}.get(best, best)
        if wider in scores or wider not in FURTHEST:
            return 10.0**best, scores[best]
        scores[wider] = score(10.0**wider)


class ProbeTrial:
    """A linear model on top of the vectors, fitted on the fit groups and measured on the others.

    `quick` leaves logistic regression out: for a search among hundreds.

    Raises:
        InputError: too few groups or classes to fit on.
    """

    def __init__(self, target: Target, groups: Groups, seed: int, quick: bool = False) -> None:
        assert target.y is not None
        fit = groups.fit
        self.probes = (ridge,) if quick or target.kind == "regression" else (ridge, logistic)
        self.target, self.groups, self.seed, self.notes = target, groups, seed, list[str]()
        self.metrics, self.y_fit, self.y = METRICS[target.kind], target.y[fit], target.y[~fit]
        self.group = np.unique(groups.number[~fit], return_inverse=True)[1]  # of the evaluated rows, numbered from 0
        self.evaluated_groups = int(self.group.max(initial=-1)) + 1
        if (fitted := len(np.unique(groups.number[fit]))) < 2:
            raise InputError(f"Expected at least two groups to fit a probe on but got {fitted}; choose other --groups.")
        if target.kind == "regression":
            return
        if len(np.unique(self.y_fit, axis=0)) < 2:
            raise InputError("Expected at least two classes to fit a probe on but got one; choose other --groups.")
        present, evaluated = (
            set((np.flatnonzero(y.any(axis=0)) if y.ndim == 2 else np.unique(y)).tolist()) for y in (self.y_fit, self.y)
        )
        for only, split in ((present - evaluated, "fitted on"), (evaluated - present, "evaluated")):
            if only:
                names = examples(target.classes[k] for k in sorted(only))
                self.notes.append(f"{len(only):,} of {len(target.classes):,} classes are only {split} ({names})")

    def measure(self, rows: Sides | Scores | np.ndarray, y_fit: np.ndarray | None = None) -> dict[str, Statistic]:
        """By metric, sums over the evaluated groups, from a probe that is fitted on the true labels or on others.

        Predictions of the evaluated rows, as an array, are measured as they are.
        """
        assert not callable(rows)
        if isinstance(rows, np.ndarray):
            unknown = {name: mean(np.full(len(rows), np.nan), self.group) for name in self.metrics if "1nn" in name}
            return task_statistics(self.target, rows, self.y, self.group) | unknown
        fit = self.groups.fit
        y_fit = self.y_fit if y_fit is None else y_fit
        predicted = self._predict(rows[1].numpy().astype(np.float64), y_fit)
        if self.target.kind == "regression":
            return self.measure(predicted)
        unit = F.normalize(rows[1]).numpy()
        nearest = KNeighborsClassifier(1).fit(unit[fit], y_fit).predict(unit[~fit])
        own, metric = self.measure(predicted), self.metrics[-1].removesuffix(" 1nn")
        return own | {self.metrics[-1]: self.measure(nearest)[metric]}

    def trivial(self, rows: Sides | Scores | np.ndarray) -> dict[str, dict[str, Statistic]]:
        """What a probe that is fitted on permuted labels gives (of predictions: these permuted), and the best constant.

        The latter says the most frequent class, every label, or the mean.
        """
        y = self.y_fit
        constant = {
            "classification": lambda: np.bincount(y).argmax(),
            "multilabel": lambda: np.ones(y.shape[1], dtype=y.dtype),
            "regression": y.mean,
        }[self.target.kind]()
        same = self.measure(np.broadcast_to(constant, self.y.shape))
        same |= {f"{name} 1nn": same[name] for name in same if f"{name} 1nn" in self.metrics}
        dice = np.random.default_rng(self.seed)
        by_chance = self.measure(dice.permutation(rows) if isinstance(rows, np.ndarray) else rows, dice.permutation(y))
        return {CHANCE: by_chance, MAJORITY: same}

    def _predict(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Of the evaluated rows, by the probe and penalty that do best in the cross-validation on the others."""
        fit, number = self.groups.fit, self.groups.number
        x = x - x[fit].mean(axis=0)
        energy = (x[fit] ** 2).sum(axis=1).mean()
        x /= np.sqrt(energy) if energy > 0 else 1.0
        folds = list(GroupKFold(min(FOLDS, len(np.unique(number[fit])))).split(x[fit], groups=number[fit]))
        together, best = np.zeros(len(y), dtype=int), list[tuple[float, Predict, float]]()
        for probe in self.probes:
            parts = [(test, self._fitted(probe, x[fit][train], y[train], x[fit][test])) for train, test in folds]

            def score(penalty: float, parts: list[tuple[np.ndarray, Predict]] = parts) -> float:
                predicted = np.empty(y.shape)
                for test, predict in parts:
                    predicted[test] = predict(penalty)
                value = task_statistics(self.target, predicted, y, together)[CHOSEN_BY[self.target.kind]].value
                return value if np.isfinite(value) else -np.inf

            penalty, value = choose_penalty(score)
            best.append((value, self._fitted(probe, x[fit], y, x[~fit]), penalty))
        _, predict, penalty = max(best, key=lambda one: one[0])
        return predict(penalty)

    def _fitted(self, probe: Callable[..., Predict], x: np.ndarray, y: np.ndarray, new: np.ndarray) -> Predict:
        """A probe whose predictions are classes, 0 or 1 of labels, or values; ridge regresses indicators of classes."""
        if probe is not ridge or self.target.kind == "regression":
            return probe(x, y, new)
        if self.target.kind == "multilabel":
            scores = ridge(x, y, new)
            return lambda penalty: (scores(penalty) > 0.5).astype(int)
        scores = ridge(x, np.eye(len(self.target.classes))[y], new)
        return lambda penalty: scores(penalty).argmax(axis=1)


def task_statistics(target: Target, predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> dict[str, Statistic]:
    """Every metric of a prediction but those of the nearest neighbour."""
    if target.kind == "regression":
        return {"spearman": spearman(predicted, y, group), "r2": r2(predicted, y, group)}
    if target.kind == "multilabel":
        return {"macro_f1": macro_f1(predicted, y, group)}
    predicted, classes = predicted.astype(int), len(target.classes)
    return {
        "mcc": matthews(predicted, y, group, classes),
        "accuracy": mean((predicted == y).astype(float), group),
        "macro_f1": macro_f1(np.eye(classes)[predicted], np.eye(classes)[y], group),
    }


def decide(kind: Kind, outputs: np.ndarray) -> np.ndarray:
    """Classes `(N,)`, labels `(N, L)` or values `(N,)` out of logits or values `(N, K)`.

    >>> decide("multilabel", np.array([[1.5, -2.0]])).tolist()
    [[1, 0]]
    """
    if kind == "regression":
        return outputs[:, 0]
    return outputs.argmax(axis=1) if kind == "classification" else (outputs > 0).astype(int)


class LinearProbe(NamedTuple):
    """A linear model of a target: `outputs = x Wᵀ + b` are logits of the classes or labels, or the value."""

    weight: np.ndarray  # (K, d)
    bias: np.ndarray  # (K,)
    name: str  # of the model and its penalty


def fit_linear(target: Target, x: np.ndarray, fit: np.ndarray, choose: np.ndarray) -> LinearProbe:
    """Ridge or logistic regression of `x (N, d)` as one linear layer.

    Args:
        target: of the same N proteins.
        x: vectors, which go in as they are, with one scale for all columns.
        fit: rows to fit on.
        choose: rows whose score decides on penalty and model; of equals the stronger penalty, and ridge.
    """
    assert target.y is not None
    y, centre = target.y, x[fit].mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(((x[fit] - centre) ** 2).sum(axis=1).mean())) or 1.0
    z = (x - centre) / scale
    y_fit = np.eye(len(target.classes))[y[fit]] if target.kind == "classification" else y[fit]
    ask = np.vstack([np.eye(x.shape[1]), np.zeros(x.shape[1])])  # answers are the weights and the bias
    closed = ridge(z[fit], y_fit, ask)

    def by_ridge(penalty: float) -> tuple[np.ndarray, np.ndarray]:
        answers = closed(penalty).reshape(len(ask), -1)
        return (answers[:-1] - answers[-1]).T, answers[-1] - (0.5 if target.kind == "multilabel" else 0)

    def by_logistic(penalty: float) -> tuple[np.ndarray, np.ndarray]:
        model: Any = LogisticRegression(C=1 / (len(fit) * penalty), max_iter=200, tol=1e-5)
        sides = y_fit.T.astype(int) if target.kind == "multilabel" else [y[fit]]
        weights, biases = list[np.ndarray](), list[np.ndarray]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for side in sides:
                if len(np.unique(side)) < 2:  # a label that all have, or none
                    weights, biases = [*weights, np.zeros((1, x.shape[1]))], [*biases, np.array([20.0 * side[0] - 10])]
                    continue
                model.fit(z[fit], side)
                two = target.kind == "classification" and len(model.coef_) == 1  # of the second class against the first
                weights.append(np.vstack([-model.coef_, model.coef_]) / 2 if two else model.coef_)
                biases.append(np.hstack([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_)
        return np.vstack(weights), np.concatenate(biases)

    best = list[tuple[float, LinearProbe]]()
    for name, solve in {"ridge": by_ridge, "logistic": by_logistic}.items():
        if name == "logistic" and target.kind == "regression":
            continue

        def score(penalty: float, solve: Callable[[float], tuple[np.ndarray, np.ndarray]] = solve) -> float:
            weight, bias = solve(penalty)
            predicted = decide(target.kind, z[choose] @ weight.T + bias)
            together = np.zeros(len(choose), dtype=int)
            value = task_statistics(target, predicted, y[choose], together)[CHOSEN_BY[target.kind]].value
            return value if np.isfinite(value) else -np.inf

        penalty, value = choose_penalty(score)
        weight, bias = solve(penalty)
        best.append((value, LinearProbe(weight / scale, bias - weight @ centre / scale, f"{name}, {penalty:.0e}")))
    return max(best, key=lambda one: one[0])[1]
