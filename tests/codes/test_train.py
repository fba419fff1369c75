"""Training codes: the loss against its formula, straight-through gradients, and retained only where it wins."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_rank.codes.fit import fit_metric
from distil_rank.codes.train import EncoderModule, neighbours_found, train_encoder
from distil_rank.data.files import load_matrix
from distil_rank.lowrank.encoder import CODE_TYPES


def made(dtype, rank=8, count=600, width=24):
    dice = np.random.default_rng(0)
    group = np.arange(count) // 6
    centres = dice.normal(size=(group.max() + 1, width)) * np.geomspace(3, 0.2, width)
    x = (centres[group] + 0.3 * dice.normal(size=(count, width))).astype(np.float32)
    fit = fit_metric(x, np.ones(len(x), bool), "whitened")
    return x, group, fit.encoder(rank, dtype), fit.encoder(width)


@pytest.mark.parametrize("dtype", ["float32", "bit"])
def test_before_training_it_is_the_encoder(dtype):
    x, _, start, teacher = made(dtype)
    module = EncoderModule(start, teacher)
    batch = torch.from_numpy(x[:100])
    assert torch.equal(module.encoder.encode(batch), start.encode(batch)) or dtype == "float32"
    assert torch.allclose(module(batch), start(batch), atol=1e-5)
    stored = F.normalize(start.decode(start.encode(batch)), dim=1)
    assert torch.allclose(module.targets(module(batch)), stored, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_neighbours():
    x, _, start, teacher = made("bit")
    module, batch = EncoderModule(start, teacher, temperature=0.05), torch.from_numpy(x[:5])
    expected = 0.0
    queries, stored, full = start(batch), F.normalize(start.decode(start.encode(batch)), dim=1), teacher(batch)
    for i in range(5):
        others = [j for j in range(5) if j != i]
        wanted = torch.softmax(torch.stack([full[i] @ full[j] for j in others]) / 0.05, 0)
        got = torch.log_softmax(torch.stack([queries[i] @ stored[j] for j in others]) / 0.05, 0)
        expected -= float((wanted * got).sum()) / 5
    module.log = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert module.weight.grad.abs().sum() > 0, "gradients pass the signs"


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_training_is_retained_only_where_it_clearly_wins(dtype):
    x, group, start, teacher = made(dtype)
    before = start.digest
    trained = train_encoder(start, teacher, x, group, steps=40)
    training = trained.provenance["training"]
    assert training["retained"] == (training["low"] > 0) and 0 <= training["start"] <= 1 and training["steps"] == 40
    assert (trained.digest != before) == training["retained"] and (trained is start) == (not training["retained"])
    assert trained.dtype == dtype and start.digest == before
    assert train_encoder(start, teacher, x, group, steps=40).digest == trained.digest


def test_training_helps_bits():
    """On real proteins; on made-up ones without structure it does not, and is not retained."""
    x = load_matrix(Path(__file__).parents[2] / "data" / "sample").x[:1200]
    fit = fit_metric(x, np.ones(len(x), bool), "whitened")
    trained = train_encoder(fit.encoder(32, "bit"), fit.encoder(320), x, np.arange(len(x)), steps=100)
    training = trained.provenance["training"]
    assert training["retained"] and training["trained"] > training["start"]
    x, group, start, teacher = made("bit")
    assert train_encoder(start, teacher, x, group, steps=100) is start and not start.provenance["training"]["retained"]


def test_neighbours_found_by_a_perfect_code():
    x, _, _, teacher = made("bit")
    assert neighbours_found(teacher, teacher, torch.from_numpy(x)).mean() == 1


def test_too_few_rows(caplog):
    x, group, start, teacher = made("bit")
    assert train_encoder(start, teacher, x[:60], group[:60], steps=5) is start
    assert "NOT TRAINED" in caplog.text and "training" not in start.provenance
