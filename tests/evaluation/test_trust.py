"""Calibration on some groups, measured on others: coverage as promised, temperatures that mend certainty."""

import numpy as np
import pytest
import torch
from torch import nn

from distil_rank.evaluation.task import Target
from distil_rank.evaluation.trust import calibrate, measure_trust
from distil_rank.lowrank.predictor import Predictor


def noisy(seed: int, rows: int = 600, scale: float = 1.0) -> tuple[Predictor, torch.Tensor, np.ndarray]:
    """A predictor whose logits are `scale` times the true ones, with rows whose classes are drawn by the true ones."""
    dice = np.random.default_rng(seed)
    x = dice.normal(size=(rows, 3)).astype(np.float32) * 2
    p = torch.from_numpy(x).softmax(-1).numpy()
    y = np.array([dice.choice(3, p=row / row.sum()) for row in p.astype(np.float64)])
    layer = nn.Linear(3, 3)
    layer.load_state_dict({"weight": torch.eye(3) * scale, "bias": torch.zeros(3)})
    return Predictor(layer.requires_grad_(False), "classification", "abc").eval(), torch.from_numpy(x), y


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_the_temperature_undoes_a_scale_of_the_logits(scale):
    predictor, x, y = noisy(0, 4000, scale)
    calibrate(predictor, x[:2000], y[:2000], np.arange(2000))
    assert float(predictor.temperature) == pytest.approx(scale, rel=0.15)
    trust = measure_trust(
        predictor, x[2000:], Target("classification", y=y[2000:], classes=tuple("abc")), np.arange(2000)
    )
    assert trust.calibration_error < 0.04 < trust.before


def test_sets_hold_the_truth_as_often_as_they_say_over_many_draws():
    shares = []
    for seed in range(20):
        predictor, x, y = noisy(seed)
        calibrate(predictor, x[:300], y[:300], np.arange(300))
        target = Target("classification", y=y[300:], classes=tuple("abc"))
        shares.append(measure_trust(predictor, x[300:], target, np.arange(300)).coverage.value)
    assert 0.88 < np.mean(shares) < 0.92


def test_one_large_group_does_not_decide():
    """Residuals of a group of a thousand are small; those of nineteen others are not."""
    predictor = Predictor(nn.Linear(1, 1).requires_grad_(False), "regression").eval()
    predictor.layer.load_state_dict({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    y = np.concatenate([np.zeros(1000), np.arange(1.0, 20)])
    group = np.concatenate([np.zeros(1000, dtype=int), np.arange(1, 20)])
    calibrate(predictor, torch.zeros(len(y), 1), y, group)
    assert predictor.threshold(0.9) == pytest.approx(17.9)  # 18.9 of 20 groups, of which infinity is the 21st
    assert predictor.threshold(0.97) == float("inf")
    result = predictor.predict(torch.zeros(1, 1), 0.9)
    assert (result.low[0], result.high[0]) == pytest.approx((-17.9, 17.9))
