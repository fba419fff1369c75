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

from distil_rank.errors import InputError
from distil_rank.evaluation.task import Target
from distil_rank.measure.statistics import Statistic, macro_f1, matthews, mean, r2, spearman

FOLDS = 3
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation of logistic regression
PENALTIES = (1e0, 1e1, 1e2, 1e3, 1e4)  # of ridge regression


def probe_metrics(target: Target) -> tuple[str, ...]:
    """Names of the figures that `probe` gives, the first being the headline."""
    return {
        "classification": ("accuracy", "mcc", "macro_f1", "accuracy 1nn"),
        "multilabel": ("macro_f1", "macro_f1 1nn"),
        "regression": ("spearman", "r2"),
    }[target.kind]


def probe(
    features: np.ndarray, target: Target, fit: np.ndarray, number: np.ndarray, y_fit: np.ndarray | None = None
) -> dict[str, Statistic]:
    """Fit a linear probe on the fit groups; by metric, sums over the evaluated groups of its predictions there.

    Args:
        features: `(N, d)`.
        fit: rows to fit on, `(N,)` bool.
        number: group of each row, `(N,)`.
        y_fit: labels to fit on in place of the true ones, for the chance level.
    """
    assert target.y is not None
    x_fit, x = features[fit], features[~fit]
    y_fit, y = target.y[fit] if y_fit is None else y_fit, target.y[~fit]
    group = np.unique(number[~fit], return_inverse=True)[1]
    groups = len(np.unique(number[fit]))
    if groups < 2:
        raise InputError(f"Expected at least two groups to fit a probe on but got {groups}; choose other --groups.")
    if target.kind != "regression" and len(np.unique(y_fit, axis=0)) < 2:
        raise InputError("Expected at least two classes to fit a probe on but got one; choose other --groups.")
    logistic: Any = LogisticRegression(max_iter=200, tol=1e-3)
    grid: dict[str, tuple[float, ...]] = {"logisticregression__C": STRENGTHS}
    model, scoring = logistic, None
    if target.kind == "regression":
        model, grid = Ridge(), {"ridge__alpha": PENALTIES}
    elif target.kind == "multilabel":
        model, grid = OneVsRestClassifier(logistic), {"onevsrestclassifier__estimator__C": STRENGTHS}
        scoring = "f1_macro"
    pipeline, folds = make_pipeline(StandardScaler(), model), GroupKFold(min(FOLDS, groups))
    search = GridSearchCV(pipeline, grid, scoring=scoring, cv=folds, error_score=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that is nearly converged ranks the same
        warnings.simplefilter("ignore", FitFailedWarning)  # a fold without a second class scores 0 at every strength
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
