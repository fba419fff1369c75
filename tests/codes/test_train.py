"""Training codes: the loss against its formula, straight-through gradients, and kept only where it wins."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distil_rank.codes.neighbours import NeighbourModule

from distil_rank.codes.fit import fit_metric
from distil_rank.codes.train import found_neighbours, train_encoder
from distil_rank.data.files import load_matrix
from distil_rank.lowrank.encoder import CODE_TYPES


def rows(count=600, width=24, seed=0):
    dice = np.random.default_rng(seed)
    group = np.arange(count) // 6
    centres = dice.normal(size=(group.max() + 1, width)) * np.geomspace(3, 0.2, width)
    return (centres[group] + 0.3 * dice.normal(size=(count, width))).astype(np.float32), group


def made(dtype, rank=8):
    x, group = rows()
    fit = fit_metric(x, np.ones(len(x), bool), "whitened")
    return x, group, fit.encoder(rank, dtype, 2 if dtype == "pq" else None), fit.encoder(24)


@pytest.mark.parametrize("dtype", ["float32", "bit", "pq"])
def test_before_training_it_is_the_code_map(dtype):
    x, _, start, teacher = made(dtype)
    module = NeighbourModule(start, teacher, 1e-3, 0.05, 10)
    batch = torch.from_numpy(x[:100])
    assert torch.equal(module.trained().encode(batch), start.encode(batch)) or dtype == "float32"
    assert torch.allclose(module.queries(batch), start(batch), atol=1e-5)
    stored = F.normalize(start.decode(start.encode(batch)), dim=1)
    assert torch.allclose(module.targets(module.queries(batch)), stored, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_neighbours():
    x, _, start, teacher = made("bit")
    module, batch = NeighbourModule(start, teacher, 1e-3, 0.05, 10), torch.from_numpy(x[:5])
    expected = 0.0
    queries, stored, full = start(batch), F.normalize(start.decode(start.encode(batch)), dim=1), teacher(batch)
    for i in range(5):
        others = [j for j in range(5) if j != i]
        wanted = torch.softmax(torch.stack([full[i] @ full[j] for j in others]) / 0.05, 0)
        got = torch.log_softmax(torch.stack([queries[i] @ stored[j] for j in others]) / 0.05, 0)
        expected -= float((wanted * got).sum()) / 5
    loss = module.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert module.weight.grad.abs().sum() > 0, "gradients pass the signs"


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_training_is_kept_only_where_it_clearly_wins(dtype):
    x, group, start, teacher = made(dtype)
    done = train_encoder(start, teacher, x, group, steps=40)
    assert done.retained == (done.gain[0] > 0) and 0 <= done.start <= 1
    assert (done.encoder.digest != start.digest) == done.retained
    assert done.encoder.guard is start.guard and done.encoder.dtype == dtype
    again = train_encoder(start, teacher, x, group, steps=40)
    assert again.encoder.digest == done.encoder.digest


def test_training_helps_bits():
    """On real proteins; on made-up ones without structure it does not, and is not kept."""
    x = load_matrix(Path(__file__).parents[2] / "data" / "sample").x[:1200]
    fit = fit_metric(x, np.ones(len(x), bool), "whitened")
    done = train_encoder(fit.encoder(32, "bit"), fit.encoder(320), x, np.arange(len(x)), steps=100)
    assert done.retained and done.trained > done.start and done.steps == 100
    x, group, start, teacher = made("bit")
    worse = train_encoder(start, teacher, x, group, steps=100)
    assert not worse.retained and worse.encoder is start and "not kept" in str(worse)


def test_neighbours_found_by_a_perfect_code():
    x, _, _, teacher = made("bit")
    assert found_neighbours(teacher, teacher, torch.from_numpy(x)).mean() == 1


def test_too_few_rows(caplog):
    x, group, start, teacher = made("bit")
    done = train_encoder(start, teacher, x[:60], group[:60], steps=5)
    assert done.encoder is start and done.steps == 0 and "NOT TRAINED" in caplog.text
