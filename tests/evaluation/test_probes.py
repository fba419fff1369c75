"""Probes against scikit-learn used directly, and against what cannot be learned."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from distil_rank.errors import InputError
from distil_rank.evaluation.probes import METRICS, ProbeTrial
from distil_rank.evaluation.task import Groups, Target, make_target
from distil_rank.options.evaluation import LabelOptions

GROUPS = np.arange(400) // 10
FIT = GROUPS < 25


def probe(x, target, fit, number, y_fit=None):
    return ProbeTrial(target, Groups(number, fit, ""), 0).measure((torch.from_numpy(x), torch.from_numpy(x)), y_fit)


def separable(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=400)
    return rng.normal(size=(3, 8))[y] + 0.7 * rng.normal(size=(400, 8)), y


def test_classification_is_what_scikit_learn_gives():
    x, y = separable()
    target = make_target([f"c{k}" for k in y], LabelOptions(), "classification")
    measured = probe(x, target, FIT, GROUPS)
    assert tuple(measured) == METRICS["classification"]
    scaler = StandardScaler().fit(x[FIT])
    by_strength = [
        accuracy_score(
            y[~FIT], LogisticRegression(C=c).fit(scaler.transform(x[FIT]), y[FIT]).predict(scaler.transform(x[~FIT]))
        )
        for c in (1e-3, 1e-2, 1e-1, 1.0)
    ]
    assert any(measured["accuracy"].value == pytest.approx(score, abs=0.01) for score in by_strength)
    assert measured["accuracy"].value > 0.8 and measured["mcc"].value > 0.7 and measured["accuracy 1nn"].value > 0.7


def test_evaluated_rows_are_never_fitted_on():
    """Evaluated rows that are replaced by others change nothing in the fit."""
    x, y = separable()
    target = make_target([f"c{k}" for k in y], LabelOptions(), "classification")
    poisoned = x.copy()
    poisoned[~FIT] *= 1e3
    clean, other = probe(x, target, FIT, GROUPS), probe(poisoned, target, FIT, GROUPS)
    assert clean["accuracy"].value > 0.8 and other["accuracy"].value != clean["accuracy"].value
    both = np.concatenate([x[FIT], x[FIT]]), np.concatenate([y[FIT], y[FIT]])
    same = Target("classification", y=both[1], classes=target.classes)
    sides = np.repeat([True, False], FIT.sum())
    again = probe(both[0], same, sides, np.concatenate([GROUPS[FIT], 100 + GROUPS[FIT]]))
    assert again["accuracy 1nn"].value == 1.0  # each evaluated row is there among those that were fitted on


def test_permuted_labels_score_at_chance():
    x, y = separable()
    target = make_target([f"c{k}" for k in y], LabelOptions(), "classification")
    rng = np.random.default_rng(0)
    chance = [probe(x, target, FIT, GROUPS, y_fit=rng.permutation(target.y[FIT]))["mcc"].value for _ in range(8)]
    assert abs(np.mean(chance)) < 0.15  # three classes far apart: one permutation alone may favour the true one


def test_several_labels_and_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8))
    y = (x @ rng.normal(size=(8, 4)) > 0).astype(int)
    measured = probe(x, Target("multilabel", y=y, classes=("a", "b", "c", "d")), FIT, GROUPS)
    assert measured["macro_f1"].value > 0.9 > measured["macro_f1 1nn"].value > 0.5
    value = x @ rng.normal(size=8) + 0.1 * rng.normal(size=400)
    measured = probe(x, Target("regression", y=value), FIT, GROUPS)
    assert measured["r2"].value > 0.95 and measured["spearman"].value > 0.95


def test_what_is_refused():
    x, y = separable()
    target = make_target([f"c{k}" for k in y], LabelOptions(), "classification")
    with pytest.raises(InputError, match="two groups to fit a probe on but got 1"):
        probe(x, target, GROUPS == 0, GROUPS)
    with pytest.raises(InputError, match="two classes to fit a probe on"):
        probe(x, Target("classification", y=np.where(FIT, 0, y), classes=target.classes), FIT, GROUPS)
