"""The comparison: definitions, paired intervals, and a headline that a constant cannot win."""

import numpy as np
import pytest
import torch
from torch import nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.comparison import ConstantOutput, HeldOut, compare, solved_students
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure import metrics


def rows(n=120, d=10, spread=1.0, seed=0):
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -1.5, d)
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, d, generator=generator) @ mixing.T + 3.0


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Linear(10, 10)


def candidates(teacher, train, rank=3):
    moments = Moments.of(train)
    mean = teacher(moments.mean.float()).detach()
    solved = solved_students(teacher, moments, rank)
    return mean, {"constant": [ConstantOutput(mean)], **{name: [layer] for name, layer in solved.items()}}


def by_method(found):
    return {row.method: row for row in found}


def test_figures_follow_their_definitions(teacher):
    train, test = rows(), rows(seed=1)
    mean, given = candidates(teacher, train)
    found = by_method(compare(teacher, given, mean, HeldOut(test, np.arange(len(test)))))
    with torch.no_grad():
        target, output = teacher(test), given["svd"][0](test)
    estimates = found["svd"].metrics
    assert estimates["r2"].value == pytest.approx(metrics.r2(output, target, mean), rel=1e-6)
    assert estimates["relative_mse"].value == pytest.approx(
        float(metrics.residual(output, target).sum() / metrics.energy(target).sum()), rel=1e-6
    )
    assert estimates["cosine"].value == pytest.approx(float(metrics.cosine(output, target).mean()), rel=1e-6)
    assert estimates["knn_overlap"].value == pytest.approx(float(metrics.knn_overlap(output, target).mean()), rel=1e-6)
    for name in ("r2", "relative_mse", "cosine", "knn_overlap", "cosine_p5"):
        assert estimates[name].low <= estimates[name].value <= estimates[name].high
    assert found["constant"].metrics["r2"].value == pytest.approx(0, abs=0.05)
    assert found["closed_form"].share_of_optimum == 1 and found["closed_form"].ties_with_optimum
    assert not found["svd"].ties_with_optimum
    assert found["svd"].parameters == 3 * 20 + 10


def test_near_constant_outputs_do_not_fool_the_headline(teacher):
    """Single mutants of one protein: the constant's raw cosine is all but perfect, R² and neighbours tell the truth."""
    train, test = rows(spread=0.01), rows(spread=0.01, seed=1)
    mean, given = candidates(teacher, train)
    found = by_method(compare(teacher, given, mean, HeldOut(test, np.arange(len(test)))))
    constant, best = found["constant"].metrics, found["closed_form"].metrics
    assert constant["cosine"].value > 0.99
    assert abs(constant["r2"].value) < 0.1 and constant["centred_cosine"].value < 0.1
    assert constant["knn_overlap"].value < 0.3
    assert best["r2"].value > 0.8 and best["knn_overlap"].value > 0.5


def test_residues_of_a_protein_are_resampled_together(teacher):
    train, test = rows(), rows(seed=1)
    mean, given = candidates(teacher, train)
    alone = by_method(compare(teacher, given, mean, HeldOut(test, np.arange(120))))["svd_bias"].metrics["r2"]
    twice = HeldOut(test.repeat_interleave(4, 0), np.arange(120).repeat(4))
    repeated = by_method(compare(teacher, given, mean, twice))["svd_bias"].metrics["r2"]
    assert repeated.value == pytest.approx(alone.value, rel=1e-6)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=1e-6)


def test_several_seeds_give_their_mean(teacher):
    train, test = rows(), rows(seed=1)
    mean, given = candidates(teacher, train)
    given["Distil-Rank"] = [LowRankLinear.from_linear(teacher, rank, Moments.of(train)) for rank in (2, 4)]
    held_out = HeldOut(test, np.arange(len(test)))
    row = by_method(compare(teacher, given, mean, held_out))["Distil-Rank"]
    alone = [compare(teacher, {**given, "Distil-Rank": [one]}, mean, held_out)[-1] for one in given["Distil-Rank"]]
    r2 = [one.metrics["r2"].value for one in (*alone, row)]
    assert row.seeds == 2 and r2[2] == pytest.approx((r2[0] + r2[1]) / 2) and r2[0] != r2[1]


def test_more_rows_than_can_be_compared_are_said(teacher, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("distil_rank.evaluation.comparison.MAX_ROWS", 20)
    np.save(tmp_path / "x.npy", rows(300).numpy())
    data = EmbeddingDataModule(str(tmp_path / "x.npy"), split="exact")
    data.setup()
    held_out = HeldOut.of(data)
    assert len(held_out.x) == 20 and "FEWER ROWS" in held_out.note and "FEWER ROWS" in caplog.text
