"""The intervals cover what they should, and pairing tells apart what overlapping intervals cannot."""

import numpy as np
import pytest
import torch
from scipy import stats

from distil_rank.measure.bootstrap import (
    Interval,
    group_sums,
    interval,
    is_tie,
    ratio_interval,
    resample_counts,
    resampled_quantile,
    resampled_ratio,
)


def samples(counts: np.ndarray) -> list[np.ndarray]:
    """Each bootstrap sample written out as indices."""
    return [np.repeat(np.arange(len(row)), row) for row in counts]


def test_each_sample_holds_as_many_proteins_as_there_are():
    counts = resample_counts(proteins=300, draws=500, seed=1)
    assert counts.shape == (500, 300)
    assert (counts.sum(axis=1) == 300).all()
    # multinomial: mean 1, variance 1 - 1/n
    assert counts.mean() == 1
    assert counts.var() == pytest.approx(1, abs=0.02)


def test_a_seed_gives_the_same_samples_and_another_seed_others():
    assert (resample_counts(50, 10, seed=3) == resample_counts(50, 10, seed=3)).all()
    assert (resample_counts(50, 10, seed=3) != resample_counts(50, 10, seed=4)).any()


def test_ratios_are_those_of_the_samples_written_out(monkeypatch):
    monkeypatch.setattr("distil_rank.measure.bootstrap.CHUNK", 70)  # several chunks, the last one short
    generator = np.random.default_rng(0)
    residual, variance = generator.exponential(size=(2, 23))
    counts = resample_counts(23, draws=40)
    expected = [residual[drawn].sum() / variance[drawn].sum() for drawn in samples(counts)]
    assert resampled_ratio(counts, residual, variance) == pytest.approx(np.array(expected))
    means = [residual[drawn].mean() for drawn in samples(counts)]
    assert resampled_ratio(counts, residual) == pytest.approx(np.array(means))


def test_several_methods_at_once_share_their_samples():
    residual = np.random.default_rng(0).exponential(size=(30, 3))
    variance = np.random.default_rng(1).exponential(size=30)
    counts = resample_counts(30, draws=20)
    together = resampled_ratio(counts, residual, variance)
    assert together.shape == (20, 3)
    for method in range(3):
        assert together[:, method] == pytest.approx(resampled_ratio(counts, residual[:, method], variance))
    assert resampled_ratio(counts, residual).shape == (20, 3)


def test_quantiles_are_those_of_the_samples_written_out():
    values = np.random.default_rng(2).normal(size=40)
    counts = resample_counts(40, draws=60)
    for quantile in (0.05, 0.5, 1.0):
        expected = [np.quantile(values[drawn], quantile, method="inverted_cdf") for drawn in samples(counts)]
        assert resampled_quantile(counts, values, quantile) == pytest.approx(np.array(expected))


def test_torch_tensors_are_taken_as_they_are():
    counts = resample_counts(10, draws=5)
    values = torch.arange(10, dtype=torch.float32)
    assert resampled_ratio(counts, values, values + 1) == pytest.approx(
        resampled_ratio(counts, values.numpy(), values.numpy() + 1)
    )


@pytest.mark.parametrize("statistic", ["mean", "ratio"])
def test_a_95_percent_interval_holds_the_truth_in_about_95_of_100_repeats(statistic):
    generator = np.random.default_rng(5)
    repeats, proteins = 600, 100
    counts = resample_counts(proteins, draws=1000)
    held = 0
    for _ in range(repeats):
        variance = generator.gamma(4, size=proteins)
        values = 0.3 * variance * generator.gamma(4, 0.25, size=proteins)  # Σ values / Σ variance → 0.3
        if statistic == "mean":
            held += 1.2 in interval(resampled_ratio(counts, values))
        else:
            held += 0.3 in interval(resampled_ratio(counts, values, variance))
    assert 0.92 <= held / repeats <= 0.975


def test_intervals_shrink_with_the_root_of_the_number_of_proteins():
    values = np.random.default_rng(6).normal(size=1600)
    width = {n: np.subtract(*resampled_pair(values[:n])) for n in (100, 1600)}
    assert width[100] / width[1600] == pytest.approx(4, rel=0.2)


def resampled_pair(values: np.ndarray) -> tuple[float, float]:
    found = interval(resampled_ratio(resample_counts(len(values)), values))
    return found.high, found.low


def test_pairing_tells_apart_what_intervals_side_by_side_cannot():
    generator = np.random.default_rng(7)
    hard = generator.exponential(size=200)  # what makes a protein hard for any method
    ours, theirs = hard + 0.01 * generator.normal(size=200), hard + 0.01 * generator.normal(size=200) + 0.01
    counts = resample_counts(200)
    a, b = resampled_ratio(counts, ours), resampled_ratio(counts, theirs)
    assert interval(a).high > interval(b).low  # they overlap widely
    assert not is_tie(a, b)
    unpaired = resampled_ratio(resample_counts(200, seed=1), theirs)
    assert is_tie(a, unpaired)


def test_equal_methods_are_called_apart_in_about_5_of_100_repeats():
    generator = np.random.default_rng(8)
    counts = resample_counts(80, draws=800)
    differences = generator.normal(size=(80, 500))
    resampled = resampled_ratio(counts, differences)
    ties = sum(is_tie(resampled[:, method], np.zeros(800)) for method in range(500))
    assert 0.92 <= ties / 500 <= 0.975


def test_an_interval_holds_its_ends():
    assert all(value in Interval(0.0, 1.0) for value in (0.0, 0.5, 1.0))
    assert 1.1 not in Interval(0.0, 1.0)


def test_rows_of_one_protein_are_summed_before_they_are_drawn():
    generator = np.random.default_rng(9)
    protein = generator.integers(12, size=400)
    values = generator.normal(size=400)
    assert group_sums(values, protein) == pytest.approx(
        np.array([values[protein == number].sum() for number in range(12)])
    )
    # rows of a protein that move together make a wider interval than independent rows would
    values = generator.normal(size=12)[protein]
    by_protein = interval(resampled_ratio(resample_counts(12), group_sums(values, protein), np.bincount(protein)))
    by_row = interval(resampled_ratio(resample_counts(400), values))
    assert by_protein.high - by_protein.low > 2 * (by_row.high - by_row.low)


def test_intervals_are_those_of_scipy():
    generator = np.random.default_rng(1)
    numerator, denominator = generator.random(60), generator.random(60) + 1
    ours = ratio_interval(numerator, denominator, resample_counts(60, draws=500, seed=0))
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
