"""Probes against scikit-learn used directly, and against what cannot be learned."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold

from distil_rank.errors import InputError
from distil_rank.evaluation.probes import METRICS, ProbeTrial, choose_penalty, ridge
from distil_rank.evaluation.representations import full_vector
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


def correlated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as a backbone gives them, far from the origin, with much variance along few directions; four classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=400)
    spread = np.geomspace(3, 0.03, 60)
    x = 5 + (rng.normal(size=(4, 60))[y] + 1.5 * rng.normal(size=(400, 60))) * spread
    return x @ np.linalg.qr(rng.normal(size=(60, 60)))[0], y


def test_the_full_vector_scores_what_a_plain_script_gives():
    """scikit-learn alone, as a user would write it, on the vectors as they are: the better of two searches."""
    x, y = correlated()
    target = make_target([f"c{k}" for k in y], LabelOptions(), "classification")
    rows = full_vector(x.astype(np.float32)).make(FIT)
    measured = ProbeTrial(target, Groups(GROUPS, FIT, ""), 0).measure(rows)
    searches = [
        GridSearchCV(LogisticRegression(max_iter=500), {"C": np.logspace(-3, 1, 5)}, cv=GroupKFold(3)),
        GridSearchCV(RidgeClassifier(), {"alpha": np.logspace(-2, 5, 8)}, cv=GroupKFold(3)),
    ]
    best = max((one.fit(x[FIT], y[FIT], groups=GROUPS[FIT]) for one in searches), key=lambda one: one.best_score_)
    assert measured["accuracy"].value == pytest.approx(best.score(x[~FIT], y[~FIT]), abs=0.03)
    assert tuple(measured) == METRICS["classification"] and measured["mcc"].value > 0.5


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_a_rotation_changes_no_prediction(kind):
    x, y = correlated()
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(60, 60)))[0]
    labels = {"classification": y, "multilabel": np.stack([y > 0, y > 1, y == 3], 1).astype(int), "regression": y * 1.0}
    classes = {"classification": 4, "multilabel": 3, "regression": 0}[kind]
    target = Target(kind, y=labels[kind], classes=tuple("abcd"[:classes]))
    plain, rotated = (probe(one, target, FIT, GROUPS) for one in (x, 7 * x @ Q + 3))
    for name in plain:
        if "1nn" not in name:  # a cosine does depend on where the origin is
            np.testing.assert_allclose(plain[name].sums, rotated[name].sums, rtol=1e-6, atol=1e-6, err_msg=name)


def test_ridge_is_scikit_learns_at_every_penalty_whichever_side_is_longer():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(30, 2))
    for width in (5, 80):
        x, new = rng.normal(size=(30, width)) + 2, rng.normal(size=(9, width))
        solve = ridge(x, y)
        for penalty in (1e-3, 0.1, 10.0):
            weight, offset = solve(penalty)
            np.testing.assert_allclose(
                new @ weight + offset, Ridge(alpha=30 * penalty).fit(x, y).predict(new), atol=1e-8
            )


def test_no_end_of_the_range_of_penalties_is_chosen():
    for best in (1e-9, 1e-5, 1e-2, 10.0):
        tried = []
        assert (
            choose_penalty(lambda one, best=best, tried=tried: tried.append(one) or -abs(np.log(one / best)))[0] == best
        )
        assert min(tried) < best < max(tried)


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
