"""Probes: a linear model on top of a representation, fitted and regularised on the fit groups only.

Ridge and logistic regression are fitted, each at the penalty that does best in a cross-validation over whole groups of
those to fit on, and the better one there is taken. Columns have one scale between them: standardised column by column,
a rotation of the vectors would change what a probe makes of them.
"""

import warnings
from collections.abc import Callable, Sequence

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
CERTAIN = 10.0  # logit of a class or label that all rows have
PENALTIES = range(-5, -1)  # powers of ten, of the vectors' variance for each row: tried at first
FURTHEST = range(-10, 4)  # beyond these nothing changes: rows are interpolated, or the most frequent class is taken
METRICS = {
    "classification": ("mcc", "accuracy", "macro_f1", "accuracy 1nn"),
    "multilabel": ("macro_f1", "macro_f1 1nn"),
    "regression": ("spearman", "r2"),
}
CHOSEN_BY = {"classification": "mcc", "multilabel": "macro_f1", "regression": "r2"}  # in the cross-validation
Linear = tuple[np.ndarray, np.ndarray]  # weights (d, K) and offsets (K,): outputs are x W + b
Solve = Callable[[float], Linear]  # fitted with this penalty
Probe = Callable[[np.ndarray, np.ndarray], Solve]  # of vectors (N, d) and columns (N, K)


def ridge(x: np.ndarray, columns: np.ndarray) -> Solve:
    """Ridge regression `(N, d)` to `(N, K)` in closed form: one decomposition serves all penalties.

    With centred rows and `X Xᵀ = U S Uᵀ` the weights are `Xᵀ U (S + N λ)⁻¹ Uᵀ Y`, or the same from `Xᵀ X`, whichever
    is smaller (Hastie, Tibshirani and Friedman 2009, 3.4.1 and 18.3.5).

    >>> x = np.array([[-1.0], [1.0]])
    >>> ridge(x, x)(1.0)[0].tolist()  # Σ x y / (Σ x² + N λ) = 2 / (2 + 2)
    [[0.5]]
    """
    mean, offset = x.mean(axis=0), columns.mean(axis=0)
    x, columns = x - mean, columns - offset
    if len(x) < x.shape[1]:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ columns
    else:
        values, left = np.linalg.eigh(x.T @ x)
        right = left.T @ (x.T @ columns)

    def solve(penalty: float) -> Linear:
        weight = left / (values.clip(0) + len(x) * penalty) @ right
        return weight, offset - mean @ weight

    return solve


def logistic(x: np.ndarray, columns: np.ndarray) -> Solve:
    """Logistic regression by scikit-learn of classes, where one column of each row is 1, or of each column above 0."""
    one = (columns.max(axis=1) == 1).all() and (columns.sum(axis=1) == 1).all()
    sides = [columns.argmax(axis=1)] if one else (columns > 0).T.astype(int)

    def solve(penalty: float) -> Linear:
        model = LogisticRegression(C=1 / (len(x) * penalty), max_iter=200, tol=1e-5)
        weight, offset = np.zeros((x.shape[1], columns.shape[1])), np.full(columns.shape[1], -CERTAIN)
        for k, side in enumerate(sides):
            present = np.unique(side)
            if len(present) < 2:  # a class or label that all have, or none
                offset[present if one else k] = CERTAIN if one or present[0] else -CERTAIN
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly converged ranks the same
                warnings.filterwarnings("ignore", "The number of unique classes")  # --task decides
                model.fit(x, side)
            if one and len(present) == 2:  # of the second class against the first
                weight[:, present], offset[present] = model.coef_.T * [-0.5, 0.5], model.intercept_ * [-0.5, 0.5]
            else:
                place = present if one else [k]
                weight[:, place], offset[place] = model.coef_.T, model.intercept_
        return weight, offset

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


class ProbeTrial:
    """A linear model on top of the vectors, fitted on the fit groups and measured on the others.

    `quick` leaves logistic regression out: for a search among hundreds.

    Raises:
        InputError: too few groups or classes to fit on.
    """

    def __init__(self, target: Target, groups: Groups, seed: int, quick: bool = False) -> None:
        assert target.y is not None
        fit = groups.fit
        self.probes = (ridge,) if quick else (ridge, logistic)
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
        """Of the evaluated rows, by the probe and penalty that do best in a cross-validation over the other groups."""
        fit = self.groups.fit
        number = self.groups.number[fit]
        folds = list(GroupKFold(min(FOLDS, len(np.unique(number)))).split(y, groups=number))
        (weight, offset), _ = fit_linear(self.target, x[fit], y, np.arange(len(y)), folds, self.probes)
        return decide(self.target.kind, x[~fit] @ weight + offset)


def as_columns(target: Target, y: np.ndarray) -> np.ndarray:
    """What is regressed on, `(N, K)`: 0 or 1 of classes, −½ or ½ of labels, or values."""
    if target.kind == "classification":
        return np.eye(len(target.classes))[y]
    return y - 0.5 if target.kind == "multilabel" else y[:, None]


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


def fit_linear(
    target: Target,
    x: np.ndarray,
    y: np.ndarray,
    fit: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    probes: Sequence[Probe] = (ridge, logistic),
) -> tuple[Linear, str]:
    """A linear model to logits of the classes or labels, or values; and the name of the probe with its penalty.

    Args:
        target: what is predicted.
        x: vectors `(N, d)`, with one scale for all columns.
        y: the target's numbers for them.
        fit: rows to fit on.
        folds: rows to fit on and rows whose score decides on probe and penalty; of equals the stronger penalty.
        probes: to choose from, in this order where they are equal.
    """
    centre = x[fit].mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(((x[fit] - centre) ** 2).sum(axis=1).mean())) or 1.0
    z, columns, best = (x - centre) / scale, as_columns(target, y), list[tuple[float, float, Probe]]()
    tested = np.concatenate([test for _, test in folds])
    for probe in probes if target.kind != "regression" else (ridge,):
        parts = [(test, probe(z[train], columns[train])) for train, test in folds]

        def score(penalty: float, parts: list[tuple[np.ndarray, Solve]] = parts) -> float:
            models = [(test, *solve(penalty)) for test, solve in parts]
            predicted = decide(target.kind, np.vstack([z[test] @ weight + offset for test, weight, offset in models]))
            together = np.zeros(len(tested), dtype=int)
            value = task_statistics(target, predicted, y[tested], together)[CHOSEN_BY[target.kind]].value
            return value if np.isfinite(value) else -np.inf

        penalty, value = choose_penalty(score)
        best.append((value, penalty, probe))
    _, penalty, probe = max(best, key=lambda one: one[0])
    weight, offset = probe(z[fit], columns[fit])(penalty)
    return (weight / scale, offset - centre @ weight / scale), f"{probe.__name__}, {penalty:.0e}"
