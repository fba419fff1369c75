"""Distillation: the loss, what training may and may not do, and how it resumes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.training.callbacks import SaveLast
from distil_rank.training.distil import DistilModule, fit
from distil_rank.training.losses import head_loss


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Linear(16, 16)


def trainer(folder, steps=60, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**quiet, logger=False, max_steps=steps, max_epochs=-1, callbacks=[SaveLast(folder)], **options)


def svd_student(teacher, rank=4):
    return LowRankLinear.from_linear(teacher, rank, solver="svd")


def closed_form(teacher, data, rank=4):
    return LowRankLinear.from_linear(teacher, rank, Moments.of(data.rows("train")))


def test_the_loss_is_the_published_one(teacher):
    x = torch.randn(10, 16)
    module = DistilModule(teacher, svd_student(teacher), alpha=0.1, normalise=False)
    y_s, y_t = module.student(x), teacher(x)
    expected = F.mse_loss(y_s, y_t) + 0.1 * (1 - F.cosine_similarity(y_s, y_t)).mean()
    torch.testing.assert_close(module.losses(x)["loss"].mean(), expected)


def test_normalised_the_first_term_is_one_minus_r2(teacher, data):
    x = data.rows("train")
    target = teacher(x)
    variance = float((target.detach() - target.detach().mean(0)).square().mean())
    module = DistilModule(teacher, closed_form(teacher, data), output_variance=variance, alpha=0.0)
    lost = (module.student(x) - target).square().sum() / (target - target.mean(0)).square().sum()
    torch.testing.assert_close(module.losses(x)["loss"].mean(), lost, rtol=1e-4, atol=1e-6)


def test_training_from_the_svd_helps_and_leaves_the_teacher_alone(teacher, data, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    module = DistilModule(teacher, svd_student(teacher), lr=1e-2)
    (outcome,) = fit(module, data, trainer(tmp_path))
    assert outcome.training_helped
    assert outcome.best_loss < 0.5 * outcome.warm_start_loss
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())


def test_training_that_harms_is_undone(teacher, data, tmp_path):
    start = closed_form(teacher, data)
    module = DistilModule(teacher, copy.deepcopy(start), lr=1.0, schedule="constant")
    (outcome,) = fit(module, data, trainer(tmp_path, steps=20))
    assert not outcome.training_helped
    assert torch.equal(outcome.student.A, start.A) and torch.equal(outcome.student.B, start.B)


def test_a_loss_that_the_start_minimises_is_not_trained(teacher, data, tmp_path):
    start = closed_form(teacher, data)
    module = DistilModule(teacher, copy.deepcopy(start), alpha=0.0)
    (outcome,) = fit(module, data, trainer(tmp_path), already_optimal=True)
    assert outcome.steps == 0 and torch.equal(outcome.student.A, start.A)


def test_a_run_resumes_where_it_stopped(teacher, data, tmp_path):
    fit(DistilModule(teacher, svd_student(teacher), lr=1e-2), data, trainer(tmp_path / "first", steps=27))
    resumed = DistilModule(teacher, svd_student(teacher), lr=1e-2)
    (outcome,) = fit(resumed, data, trainer(tmp_path / "second", steps=60), str(tmp_path / "first" / "last.ckpt"))
    assert outcome.steps == 60


def test_seeds_differ_and_a_seed_repeats(teacher, data, tmp_path):
    def trained(seed, folder):
        seed_everything(seed, verbose=False)
        return fit(DistilModule(teacher, svd_student(teacher), lr=1e-2), data, trainer(tmp_path / folder))[0].student.A

    first = trained(1, "a")
    assert torch.equal(first, trained(1, "b"))
    assert not torch.equal(first, trained(2, "c"))


def test_a_gain_on_one_protein_of_many_rows_is_no_clear_gain(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "proteins", lambda part: np.zeros(len(data.rows(part)), dtype=int))
    (outcome,) = fit(DistilModule(teacher, svd_student(teacher), lr=1e-2), data, trainer(tmp_path))
    assert outcome.best_loss < outcome.warm_start_loss and not outcome.training_helped


def test_checkpoints_that_cannot_be_used_are_refused(teacher, data, tmp_path):
    def attempt(path):
        return fit(DistilModule(teacher, svd_student(teacher)), data, trainer(tmp_path / "x", steps=2), str(path))

    with pytest.raises(InputError, match="no such file"):
        attempt(tmp_path / "absent.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="does not fit"):
        attempt(tmp_path / "broken.ckpt")
    torch.save({"state_dict": nn.Linear(3, 3)}, tmp_path / "pickled.ckpt")  # would run code if unpickled
    with pytest.raises(InputError, match="does not fit"):
        attempt(tmp_path / "pickled.ckpt")


def test_nested_training_keeps_every_slice_good(teacher, data, tmp_path):
    start = closed_form(teacher, data, rank=8)
    module = DistilModule(teacher, copy.deepcopy(start), nested_ranks=[2, 4], lr=1e-3)
    student = fit(module, data, trainer(tmp_path))[0].student
    x = data.rows("train")
    for rank in (2, 4, 8):
        optimum = F.mse_loss(closed_form(teacher, data, rank)(x), teacher(x))
        assert F.mse_loss(student.truncate(rank)(x), teacher(x)) < 1.1 * optimum
    with pytest.raises(InputError, match="nested ranks"):
        DistilModule(teacher, start, nested_ranks=[9])


def test_a_tail_decides_what_matters(teacher, data, tmp_path):
    """The head looks at one output only: a rank-1 student trained through it finds that direction."""
    head = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, 5] = 3.0
    head = nn.Sequential(nn.Tanh(), head)
    start = closed_form(teacher, data, rank=1)
    module = DistilModule(teacher, copy.deepcopy(start), head=head, lr=2e-2)
    student = fit(module, data, trainer(tmp_path, steps=300))[0].student
    x = data.rows("test")

    def off(layer):
        return (head(layer(x)).softmax(-1) - head(teacher(x)).softmax(-1)).abs().mean()

    assert off(student) < 0.2 * off(start)


def test_lbfgs_reaches_the_optimum(teacher, data, tmp_path):
    everything = EmbeddingDataModule(data.source, split="exact", batch_size=10**6)
    everything.setup()
    module = DistilModule(teacher, svd_student(teacher), alpha=0.0, normalise=False, optimizer="lbfgs", lr=1.0)
    student = fit(module, everything, trainer(tmp_path, steps=40))[0].student
    x = data.rows("train")
    optimum = F.mse_loss(closed_form(teacher, data)(x), teacher(x))
    assert F.mse_loss(student(x), teacher(x)) < 1.05 * optimum


def test_hyper_parameters_are_saved(teacher, data, tmp_path):
    fit(DistilModule(teacher, svd_student(teacher), lr=0.0123), data, trainer(tmp_path, steps=2))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["lr"] == 0.0123


def test_tail_loss_of_regressions_is_the_squared_error():
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(head_loss(a, b, "regression").mean(), F.mse_loss(a, b))


def test_one_column_of_classification_is_a_yes_or_no():
    a, b = torch.randn(5, 1), torch.randn(5, 1)
    p, q = b.sigmoid(), a.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = divergence.squeeze(1) + 0.1 * (a - b).square().squeeze(1)
    torch.testing.assert_close(head_loss(a, b, "classification"), expected)
