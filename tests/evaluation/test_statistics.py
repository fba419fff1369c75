"""Metrics from sums against scikit-learn's and SciPy's; the bootstrap against samples drawn row by row."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, r2_score

from distil_rank.evaluation import statistics
from distil_rank.measure.bootstrap import resample_counts


@pytest.fixture(scope="module")
def drawn() -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng, rng.integers(12, size=300)


def resampled_rows(counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The rows of one bootstrap sample."""
    return np.concatenate([np.flatnonzero(group == g).repeat(1) for g, n in enumerate(counts) for _ in range(n)])


def test_classification(drawn):
    rng, group = drawn
    y = rng.integers(5, size=300)
    predicted = np.where(rng.random(300) < 0.6, y, rng.integers(5, size=300))
    eye = np.eye(5)
    counts = resample_counts(12, draws=20)
    cases = [
        (statistics.matthews(predicted, y, group, 5), matthews_corrcoef),
        (statistics.macro_f1(eye[predicted], eye[y], group), lambda a, b: f1_score(a, b, average="macro")),
        (statistics.mean((predicted == y) * 1.0, group), lambda a, b: np.mean(a == b)),
    ]
    for statistic, reference in cases:
        assert statistic.value == pytest.approx(reference(y, predicted))
        for draw, value in zip(counts, statistic.resampled(counts), strict=True):
            chosen = resampled_rows(draw, group)
            assert value == pytest.approx(reference(y[chosen], predicted[chosen]))


def test_regression(drawn):
    rng, group = drawn
    y = rng.normal(100, 2, size=300)
    predicted = y + rng.normal(size=300)
    counts = resample_counts(12, draws=20)
    r2 = statistics.r2(predicted, y, group)
    assert r2.value == pytest.approx(r2_score(y, predicted))
    for draw, value in zip(counts, r2.resampled(counts), strict=True):
        chosen = resampled_rows(draw, group)
        assert value == pytest.approx(r2_score(y[chosen], predicted[chosen]))
    assert statistics.spearman(predicted, y, group).value == pytest.approx(spearmanr(predicted, y).statistic)


def test_what_is_kept_is_paired():
    """Nine tenths of the reference in every group: the ratio is known exactly, the score itself is not."""
    values = np.random.default_rng(0).random(200)
    group = np.arange(200) // 4
    reference, ours = statistics.mean(values, group), statistics.mean(0.9 * values, group)
    counts = resample_counts(50)
    retained = statistics.retained(ours, reference, counts)
    assert (retained.value, retained.low, retained.high) == pytest.approx((0.9, 0.9, 0.9))
    score = statistics.estimate(ours, counts)
    assert score.high - score.low > 0.03
    assert statistics.retained(ours, statistics.mean(0 * values, group), counts) is None


def test_intervals_are_over_groups_not_rows():
    """A hundred copies of each value tell no more than one."""
    values = np.random.default_rng(0).random(30)
    once = statistics.estimate(statistics.mean(values, np.arange(30)), resample_counts(30))
    copies = statistics.mean(values.repeat(100), np.arange(30).repeat(100))
    assert statistics.estimate(copies, resample_counts(30)).low == pytest.approx(once.low)


def test_the_interval_of_a_ratio_covers_the_truth_where_few_groups_decide():
    """Groups drawn from one population, sizes log-normal: the bootstrap's percentile interval is too narrow."""
    rng = np.random.default_rng(0)

    def draw(groups):
        size = rng.lognormal(0, 1.5, groups)
        full = size * rng.beta(3, 3, groups)
        less = full * rng.normal(0.9, 0.15, groups).clip(0)
        return (
            statistics.Statistic(np.stack([part, size], axis=1), lambda totals: totals[..., 0] / totals[..., 1])
            for part in (less, full)
        )

    ours, theirs = draw(500_000)
    truth = ours.value / theirs.value
    covered, by_bootstrap = [], []
    counts = resample_counts(60, draws=500)
    for _ in range(300):
        ours, theirs = draw(60)
        interval, percentile = (
            statistics.retained_with_confidence(ours, theirs),
            statistics.retained(ours, theirs, counts),
        )
        covered.append(interval.low <= truth)
        by_bootstrap.append(percentile.low <= truth)
        assert interval.value == percentile.value
    assert np.mean(covered) > 0.95 and np.mean(covered) > np.mean(by_bootstrap)


def test_one_group_that_holds_everything_has_no_interval():
    zero = statistics.mean(np.array([1.0, 0.0, 0.0]), np.array([0, 1, 2]))
    assert statistics.retained_with_confidence(zero, zero) is None
