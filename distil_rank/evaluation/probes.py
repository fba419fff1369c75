"""Probes: a linear model on top of a representation, fitted and regularised on the fit groups only.

Ridge and logistic regression are fitted, each at the penalty that does best in a cross-validation over whole groups of
those to fit on, and the better one there is taken. Columns have one scale between them: standardised column by column,
a rotation of the vectors would change what a probe makes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
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
PROBES = ("ridge", "logistic")
Model = tuple[np.ndarray, np.ndarray]  # weight (d, K) and bias (K,): outputs are `x @ weight + bias`
Solve = Callable[[float], Model]  # with this penalty


def ridge(x: np.ndarray, y: np.ndarray) -> Solve:
    """Ridge regression `(N, d)` to `(N, K)` in closed form: one decomposition serves all penalties.

    With centred rows and `X Xᵀ = U S Uᵀ` the weight is `Xᵀ U (S + N λ)⁻¹ Uᵀ y`, or the same from `Xᵀ X`, whichever is
    smaller (Hastie, Tibshirani and Friedman 2009, 3.4.1 and 18.3.5).

    >>> x = y = np.array([[-1.0], [1.0]])
    >>> ridge(x, y)(1.0)[0].tolist()  # Σ x y / (Σ x² + N λ) = 2 / (2 + 2)
    [[0.5]]
    """
    mean, offset = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean, y - offset
    if len(x) < x.shape[1]:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    else:
        values, left = np.linalg.eigh(x.T @ x)
        right = left.T @ (x.T @ y)

    def solve(penalty: float) -> Model:
        weight = left @ (right / (values.clip(0) + len(x) * penalty)[:, None])
        return weight, offset - mean @ weight

    return solve


def logistic(x: np.ndarray, y: np.ndarray, classes: int) -> Solve:
    """Logistic regression by scikit-learn of classes `(N,)`, some of which may be absent, or of each label `(N, L)`."""

    def solve(penalty: float) -> Model:
        if y.ndim == 2:  # each label has it, or has it not; ±10 where all rows do the same
            weights, biases = zip(*(logistic(x, label, 2)(penalty) for label in y.T), strict=True)
            bias = np.nan_to_num(np.diff(biases)[:, 0], posinf=10, neginf=-10)
            return np.diff(weights)[..., 0].T, bias
        weight, bias, present = np.zeros((x.shape[1], classes)), np.full(classes, -np.inf), np.unique(y)
        bias[present] = 0
        if len(present) > 1:
            model: Any = LogisticRegression(C=1 / (len(x) * penalty), max_iter=200, tol=1e-5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly converged ranks the same
                warnings.filterwarnings("ignore", "The number of unique classes")  # --task decides
                model.fit(x, y)
            sides = np.array([[-0.5], [0.5]]) if len(present) == 2 else 1  # of two it has the second against the first
            weight[:, present], bias[present] = (sides * model.coef_).T, np.ravel(sides * model.intercept_[:, None])
        return weight, bias

    return solve


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


class LinearProbe(NamedTuple):
    """A linear model of a target: `outputs = x Wᵀ + b` are logits of the classes or labels, or the value."""

    weight: np.ndarray  # (K, d)
    bias: np.ndarray  # (K,)
    name: str  # of the model and its penalty


def fit_linear(
    target: Target,
    x: np.ndarray,
    fit: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    probes: Sequence[str] = PROBES,
) -> LinearProbe:
    """Ridge or logistic regression of `x (N, d)` as one linear layer; of values ridge alone.

    Args:
        target: of the same N proteins.
        x: vectors, which go in as they are, with one scale for all columns.
        fit: rows to fit on.
        folds: rows to fit on and rows to predict, which decide on penalty and probe; of equals the stronger penalty,
            and ridge.
        probes: to choose from.
    """
    assert target.y is not None
    y, kind, z = target.y, target.kind, x - x[fit].mean(axis=0, dtype=np.float64)
    z /= (scale := float(np.sqrt((z[fit] ** 2).sum(axis=1).mean())) or 1.0)
    sides = np.eye(len(target.classes))[y] if kind == "classification" else y.reshape(len(y), -1)
    held = np.concatenate([test for _, test in folds])

    def solver(probe: str, rows: np.ndarray) -> Solve:
        if probe == "logistic":
            return logistic(z[rows], y[rows], len(target.classes))
        return ridge(z[rows], sides[rows] - 0.5 * (kind == "multilabel"))

    best = list[tuple[float, float, str]]()
    for probe in probes[:1] if kind == "regression" else probes:
        solvers = [solver(probe, train) for train, _ in folds]

        def score(penalty: float, solvers: list[Solve] = solvers) -> float:
            models = [(*solve(penalty), z[test]) for solve, (_, test) in zip(solvers, folds, strict=True)]
            predicted = np.concatenate([decide(kind, new @ weight + bias) for weight, bias, new in models])
            statistics = task_statistics(target, predicted, y[held], np.zeros(len(held), dtype=int))
            value = statistics[CHOSEN_BY[kind]].value
            return value if np.isfinite(value) else -np.inf

        penalty, value = choose_penalty(score)
        best.append((value, penalty, probe))
    _, penalty, probe = max(best, key=itemgetter(0))
    weight, bias = solver(probe, fit)(penalty)
    offset = x[fit].mean(axis=0, dtype=np.float64) @ weight
    return LinearProbe(weight.T / scale, bias - offset / scale, f"{probe}, {penalty:.0e}")


class ProbeTrial:
    """A linear model on top of the vectors, fitted on the fit groups and measured on the others.

    `quick` leaves logistic regression out: for a search among hundreds.

    Raises:
        InputError: too few groups or classes to fit on.
    """

    def __init__(self, target: Target, groups: Groups, seed: int, quick: bool = False) -> None:
        assert target.y is not None
        fit = groups.fit
        self.probes = PROBES[:1] if quick else PROBES
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
        fit, number, y = self.groups.fit, self.groups.number, self.target.y.copy()  # type: ignore[union-attr]
        y[fit] = y_fit = self.y_fit if y_fit is None else y_fit
        some, parts = np.flatnonzero(fit), GroupKFold(min(FOLDS, len(np.unique(number[fit]))))
        folds = [(some[train], some[test]) for train, test in parts.split(some, groups=number[fit])]
        probe = fit_linear(replace(self.target, y=y), rows[1].numpy(), some, folds, self.probes)
        predicted = decide(self.target.kind, rows[1][~fit].numpy() @ probe.weight.T + probe.bias)
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
