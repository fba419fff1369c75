"""Metrics from sums against scikit-learn's and SciPy's; intervals that cover what they should; pairing; acceptance."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef, r2_score

from distil_rank.measure import statistics
from distil_rank.measure.statistics import (
    Statistic,
    chance_of_confirmation,
    clearly_better,
    difference,
    estimate,
    interval,
    mean,
    ratio,
    resample_counts,
    resampled_quantile,
    retained,
    retained_with_confidence,
)


def samples(counts: np.ndarray) -> list[np.ndarray]:
    """Each bootstrap sample written out as the numbers of its groups."""
    return [np.repeat(np.arange(len(row)), row) for row in counts]


def test_each_sample_holds_as_many_groups_as_there_are_and_a_seed_gives_the_same_ones():
    counts = resample_counts(300, draws=500, seed=1)
    assert (counts.sum(axis=1) == 300).all()
    assert counts.var() == pytest.approx(1, abs=0.02)  # multinomial: 1 - 1/n
    assert (resample_counts(300, draws=500, seed=1) == counts).all()
    assert (resample_counts(300, draws=500, seed=2) != counts).any()


def test_ratios_and_quantiles_are_those_of_the_samples_written_out(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 70)  # several chunks, the last one short
    generator = np.random.default_rng(0)
    residual, variance = generator.exponential(size=(2, 23))
    counts = resample_counts(23, draws=40)
    expected = [residual[drawn].sum() / variance[drawn].sum() for drawn in samples(counts)]
    assert ratio(residual, variance).resampled(counts) == pytest.approx(np.array(expected))
    assert ratio(residual).resampled(counts) == pytest.approx([residual[drawn].mean() for drawn in samples(counts)])
    for quantile in (0.05, 0.5, 1.0):
        expected = [np.quantile(residual[drawn], quantile, method="inverted_cdf") for drawn in samples(counts)]
        assert resampled_quantile(counts, residual, quantile) == pytest.approx(np.array(expected))


def test_metrics_are_those_of_scikit_learn_on_all_rows_and_on_each_sample():
    rng = np.random.default_rng(0)
    group, eye = rng.integers(12, size=300), np.eye(5)
    y = rng.integers(5, size=300)
    predicted = np.where(rng.random(300) < 0.6, y, rng.integers(5, size=300))
    number = rng.normal(100, 2, size=300)
    near = number + rng.normal(size=300)
    cases = [
        (statistics.matthews(predicted, y, group, 5), matthews_corrcoef, y, predicted),
        (
            statistics.macro_f1(eye[predicted], eye[y], group),
            lambda a, b: f1_score(a, b, average="macro"),
            y,
            predicted,
        ),
        (mean((predicted == y) * 1.0, group), lambda a, b: np.mean(a == b), y, predicted),
        (statistics.r2(near, number, group), r2_score, number, near),
    ]
    counts = resample_counts(12, draws=20)
    for statistic, reference, truth, guess in cases:
        assert statistic.value == pytest.approx(reference(truth, guess))
        for drawn, value in zip(samples(counts), statistic.resampled(counts), strict=True):
            rows = np.concatenate([np.flatnonzero(group == one) for one in drawn])
            assert value == pytest.approx(reference(truth[rows], guess[rows]))
    assert statistics.spearman(near, number, group).value == pytest.approx(stats.spearmanr(near, number).statistic)


def test_intervals_are_those_of_scipy():
    generator = np.random.default_rng(1)
    numerator, denominator = generator.random(60), generator.random(60) + 1
    ours = estimate(ratio(numerator, denominator), resample_counts(60, draws=500, seed=0))
    theirs = stats.bootstrap(
        (numerator, denominator),
        lambda top, bottom, axis=-1: top.sum(axis) / bottom.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=500,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_a_95_percent_interval_of_a_ratio_holds_the_truth_in_about_95_of_100_repeats():
    generator = np.random.default_rng(5)
    counts = resample_counts(100, draws=1000)
    held = 0
    for _ in range(400):
        variance = generator.gamma(4, size=100)
        values = 0.3 * variance * generator.gamma(4, 0.25, size=100)  # Σ values / Σ variance → 0.3
        held += 0.3 in estimate(ratio(values, variance), counts)
    assert 0.92 <= held / 400 <= 0.98


def test_intervals_are_over_groups_not_rows():
    """A hundred copies of each value tell no more than one."""
    values = np.random.default_rng(0).random(30)
    once = estimate(mean(values, np.arange(30)), resample_counts(30))
    copies = mean(values.repeat(100), np.arange(30).repeat(100))
    assert estimate(copies, resample_counts(30)).low == pytest.approx(once.low)
    sums, rows = (np.bincount(np.arange(30).repeat(100), column) for column in (values.repeat(100), np.ones(3000)))
    assert estimate(ratio(sums, rows), resample_counts(30)).low == pytest.approx(once.low)


def test_samples_in_which_a_metric_is_undefined_are_left_out():
    assert interval(1.0, np.array([np.nan, 1.0, np.inf, 1.0])).low == 1
    assert np.isnan(interval(1.0, np.array([np.nan])).low)


def test_pairing_tells_apart_what_intervals_side_by_side_cannot():
    generator = np.random.default_rng(7)
    hard = generator.exponential(size=200)  # what makes a protein hard for any method
    ours, theirs = (ratio(hard + 0.01 * generator.normal(size=200) + shift) for shift in (0, 0.01))
    counts = resample_counts(200)
    assert estimate(ours, counts).high > estimate(theirs, counts).low  # they overlap widely
    assert 0 not in difference(ours, theirs, counts)


def test_training_without_effect_is_seldom_called_better(monkeypatch):
    """The lower end of a two-sided interval: in half of 5 of 100 repeats."""
    counts = resample_counts(60)
    monkeypatch.setattr(statistics, "resample_counts", lambda groups, seed: counts)
    generator = np.random.default_rng(8)
    groups = np.repeat(np.arange(60), 3)
    after = generator.normal(size=(300, 60))[:, groups] + generator.normal(size=(300, 180))
    better = sum(clearly_better(np.zeros(180), losses, groups).low > 0 for losses in after)
    assert 1 <= better <= 16


def test_only_a_clear_gain_over_groups_is_better():
    generator = np.random.default_rng(9)
    before = generator.random(300) + 1
    gain = clearly_better(before, before - 0.1 - 0.2 * generator.normal(size=300), np.arange(300))
    assert gain.low > 0 and 0.1 in gain
    assert not clearly_better(before, before + 0.1, np.arange(300)).low > 0
    rows = np.repeat(generator.normal(0.02, 0.1, size=6), 50)  # as many rows, in six groups that move together
    assert (
        clearly_better(rows, np.zeros(300), np.arange(300)).low
        > clearly_better(rows, 0 * rows, np.arange(300) // 50).low
    )
    alone = clearly_better(before, before - 1, np.zeros(300))
    assert alone.value == pytest.approx(1) and not alone.low > 0


def test_what_is_retained_is_paired():
    """Nine tenths of the reference in every group: the ratio is known exactly, the score itself is not."""
    values = np.random.default_rng(0).random(200)
    group = np.arange(200) // 4
    reference, ours = mean(values, group), mean(0.9 * values, group)
    counts = resample_counts(50)
    share = retained(ours, reference, counts)
    assert (share.value, share.low, share.high) == pytest.approx((0.9, 0.9, 0.9))
    score = estimate(ours, counts)
    assert score.high - score.low > 0.03
    assert retained(ours, mean(0 * values, group), counts) is None


def test_the_interval_of_a_ratio_covers_the_truth_where_few_groups_decide():
    """Groups drawn from one population, sizes log-normal: the bootstrap's percentile interval is too narrow."""
    rng = np.random.default_rng(0)

    def draw(groups: int) -> tuple[Statistic, Statistic]:
        size = rng.lognormal(0, 1.5, groups)
        full = size * rng.beta(3, 3, groups)
        less = full * rng.normal(0.9, 0.15, groups).clip(0)
        return ratio(less, size), ratio(full, size)

    ours, theirs = draw(500_000)
    truth = ours.value / theirs.value
    covered, by_bootstrap = [], []
    counts = resample_counts(60, draws=500)
    for _ in range(300):
        ours, theirs = draw(60)
        share, percentile = retained_with_confidence(ours, theirs), retained(ours, theirs, counts)
        covered.append(share.low <= truth)
        by_bootstrap.append(percentile.low <= truth)
        assert share.value == percentile.value
    assert np.mean(covered) > 0.95 and np.mean(covered) > np.mean(by_bootstrap)


def test_one_group_that_holds_everything_has_no_interval():
    zero = mean(np.array([1.0, 0.0, 0.0]), np.array([0, 1, 2]))
    assert retained_with_confidence(zero, zero) is None


@pytest.mark.parametrize("groups", [5, 30])
def test_the_chance_of_confirmation_is_how_often_other_groups_confirm(groups):
    """Groups are drawn twice about the same truth; where the chance of the first draw is high, the second confirms."""
    rng, level, chances, confirmed = np.random.default_rng(0), 0.983, [], []
    full = ratio(np.ones(groups))
    for truth in rng.uniform(0.5, 2.0, 1500):  # far about the bound, as a flat prior has it
        first, second = (ratio(truth * np.exp(0.15 * rng.normal(size=groups))) for _ in range(2))
        chances.append(chance_of_confirmation(first, full, 0.99, level))
        confirmed.append(retained_with_confidence(second, full, level).low >= 0.99)
    chances, confirmed = np.array(chances), np.array(confirmed)
    assert chances.mean() == pytest.approx(confirmed.mean(), abs=0.03)
    high = (chances > 0.8) & (chances < 0.99)
    assert confirmed[high].mean() == pytest.approx(chances[high].mean(), abs=0.08)
