"""Probes: a linear model on top of a representation, fitted and regularised on the fit groups only.

scikit-learn's models do the fitting. The strength of the regularisation is chosen by cross-validation over whole groups
of those to fit on.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distil_rank.errors import InputError, examples
from distil_rank.evaluation.representations import Rows
from distil_rank.evaluation.retrieval import Scores
from distil_rank.evaluation.task import Groups, Target
from distil_rank.measure.statistics import Statistic, macro_f1, matthews, mean, r2, spearman

FOLDS = 3
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation of logistic regression
PENALTIES = (1e0, 1e1, 1e2, 1e3, 1e4)  # of ridge regression
METRICS = {
    "classification": ("accuracy", "mcc", "macro_f1", "accuracy 1nn"),
    "multilabel": ("macro_f1", "macro_f1 1nn"),
    "regression": ("spearman", "r2"),
}


class ProbeTrial:
    """A linear model on top of the vectors, fitted on the fit groups and measured on the others.

    Raises:
        InputError: too few groups or classes to fit on.
    """

    def __init__(self, target: Target, groups: Groups, seed: int) -> None:
        assert target.y is not None
        fit = groups.fit
        self.target, self.groups, self.seed, self.notes = target, groups, seed, list[str]()
        self.metrics, self.y_fit, self.y = METRICS[target.kind], target.y[fit], target.y[~fit]
        self.evaluated_groups = len(np.unique(groups.number[~fit]))
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

    def measure(self, rows: Rows | Scores, y_fit: np.ndarray | None = None) -> dict[str, Statistic]:
        """By metric, sums over the evaluated groups, from a probe that is fitted on the true labels or on others."""
        assert not callable(rows)
        target, fit, number = self.target, self.groups.fit, self.groups.number
        x_fit, x = rows[1][fit].numpy(), rows[1][~fit].numpy()
        y_fit, y = self.y_fit if y_fit is None else y_fit, self.y
        group = np.unique(number[~fit], return_inverse=True)[1]
        logistic: Any = LogisticRegression(max_iter=200, tol=1e-3)
        grid: dict[str, tuple[float, ...]] = {"logisticregression__C": STRENGTHS}
        model, scoring = logistic, None
        if target.kind == "regression":
            model, grid = Ridge(), {"ridge__alpha": PENALTIES}
        elif target.kind == "multilabel":
            model, grid = OneVsRestClassifier(logistic), {"onevsrestclassifier__estimator__C": STRENGTHS}
            scoring = "f1_macro"
        pipeline, folds = make_pipeline(StandardScaler(), model), GroupKFold(min(FOLDS, len(np.unique(number[fit]))))
        search = GridSearchCV(pipeline, grid, scoring=scoring, cv=folds, error_score=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly converged ranks the same
            warnings.simplefilter("ignore", FitFailedWarning)  # a fold of one class scores 0 at every strength
            warnings.filterwarnings("ignore", "The number of unique classes")  # what is meant decides --task
            search.fit(x_fit, y_fit, groups=number[fit])
        predicted = search.predict(x)
        if target.kind == "regression":
            return {"spearman": spearman(predicted, y, group), "r2": r2(predicted, y, group)}
        nearest = KNeighborsClassifier(1, metric="cosine").fit(x_fit, y_fit).predict(x)
        if target.kind == "multilabel":
            return {"macro_f1": macro_f1(predicted, y, group), "macro_f1 1nn": macro_f1(nearest, y, group)}
        classes = len(target.classes)
        return {
            "accuracy": mean((predicted == y).astype(float), group),
            "mcc": matthews(predicted, y, group, classes),
            "macro_f1": macro_f1(np.eye(classes)[predicted], np.eye(classes)[y], group),
            "accuracy 1nn": mean((nearest == y).astype(float), group),
        }

    def chance(self, rows: Rows | Scores) -> dict[str, Statistic]:
        """From a probe that is fitted on permuted labels."""
        return self.measure(rows, np.random.default_rng(self.seed).permutation(self.y_fit))
