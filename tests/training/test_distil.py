"""`DistilModule` in a plain `Trainer`: its start, its loss, and how it resumes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import nn

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.options.training import DistilOptions
from distil_rank.training.callbacks import KeepIfBetter, SaveLast
from distil_rank.training.distil import DistilModule
from distil_rank.training.experiment import train_students, trainer_options

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Linear(16, 16)


def fit(module, data, folder=None, steps=60, ckpt_path=None):
    """Train as a user would; the callback tells whether it helped."""
    keep = KeepIfBetter()
    saving = [] if folder is None else [SaveLast(folder)]
    options = {**trainer_options({"max_steps": steps}), **QUIET}
    run = Trainer(**options, callbacks=[keep, *saving], enable_checkpointing=bool(saving))
    run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return keep


def closed_form(teacher, data, rank=4):
    return LowRankLinear.from_linear(teacher, rank, Moments.of(data.rows("train")))


def test_setup_solves_the_closed_form_of_the_training_rows(teacher, data):
    module = DistilModule(teacher, rank=4)
    module.solve(data)
    x = data.rows("test")
    torch.testing.assert_close(module(x), closed_form(teacher, data)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.output_mean, teacher(data.rows("train")).mean(0), rtol=1e-4, atol=1e-5)


def test_a_share_of_the_variance_is_a_rank(teacher, data):
    module = DistilModule(teacher, rank=0.9)
    module.solve(data)
    assert 1 < module.layer.rank < 16


def test_the_loss_is_the_published_one(teacher, data):
    module = DistilModule(teacher, 4, warm_start="svd", alpha=0.1, normalise=False)
    module.solve(data)
    x = torch.randn(10, 16)
    y_s, y_t = module(x), teacher(x)
    expected = F.mse_loss(y_s, y_t) + 0.1 * (1 - F.cosine_similarity(y_s, y_t)).mean()
    torch.testing.assert_close(module.losses(x)["loss"].mean(), expected)
    torch.testing.assert_close(module.losses((x, y_t))["loss"].mean(), expected)


def test_normalised_the_first_term_is_one_minus_r2(teacher, data):
    module = DistilModule(teacher, 4, alpha=0.0)
    module.solve(data)
    x = data.rows("train")
    target = teacher(x)
    lost = (module(x) - target).square().sum() / (target - target.mean(0)).square().sum()
    torch.testing.assert_close(module.losses(x)["loss"].mean(), lost, rtol=1e-4, atol=1e-6)


def test_training_from_the_svd_helps_and_leaves_the_teacher_alone(teacher, data):
    before = copy.deepcopy(teacher.state_dict())
    module = DistilModule(teacher, 4, warm_start="svd", lr=1e-2)
    keep = fit(module, data)
    assert keep.better and keep.best_loss < 0.5 * keep.start_loss
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())


def test_training_that_harms_is_undone(teacher, data):
    module = DistilModule(teacher, 4, lr=1.0, schedule="constant")
    module.solve(data)
    start = copy.deepcopy(module.layer)
    assert not fit(module, data, steps=20).better
    assert torch.equal(module.layer.A, start.A) and torch.equal(module.layer.B, start.B)


def test_a_loss_that_the_start_minimises_is_not_trained(teacher, data):
    module = DistilModule(teacher, 4, alpha=0.0)
    module.solve(data)
    start = copy.deepcopy(module.layer)
    trained = train_students(module, {"svd": start}, data, DistilOptions(trainer=QUIET_TRAINER, seeds=[42, 43]))
    assert trained.steps == 0 and "exact minimum" in trained.note
    assert torch.equal(trained.students[0].A, start.A)


QUIET_TRAINER = {"max_steps": 5, "accelerator": "cpu"}


def test_a_run_resumes_where_it_stopped(teacher, data, tmp_path):
    fit(DistilModule(teacher, 4, "svd", lr=1e-2), data, tmp_path / "first", steps=27)
    module = DistilModule(teacher, 4, "svd", lr=1e-2)
    keep = fit(module, data, tmp_path / "second", steps=60, ckpt_path=tmp_path / "first" / "last.ckpt")
    saved = torch.load(tmp_path / "second" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 60 and saved["hyper_parameters"]["lr"] == 1e-2
    fresh = DistilModule(teacher, 4, "svd")
    fresh.solve(data)
    assert keep.start_loss == pytest.approx(float(fresh.losses(data.rows("val"))["loss"].mean()), rel=0.2)


def test_a_checkpoint_is_a_student_without_any_data(teacher, data, tmp_path):
    module = DistilModule(teacher, 4, "svd", lr=1e-2)
    fit(module, data, tmp_path, steps=5)
    loaded = DistilModule.load_from_checkpoint(tmp_path / "last.ckpt", teacher=teacher, weights_only=True)
    assert loaded.layer.rank == 4 and loaded(data.rows("test")).isfinite().all()


def test_seeds_differ_and_a_seed_repeats(teacher, data):
    def trained(seed):
        seed_everything(seed, verbose=False)
        module = DistilModule(teacher, 4, "svd", lr=1e-2)
        fit(module, data)
        return module.layer.A

    first = trained(1)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


def test_targets_that_were_computed_before_change_nothing(teacher, data):
    def trained(rows):
        seed_everything(1, verbose=False)
        module = DistilModule(teacher, 4, "svd", lr=1e-2)
        fit(module, rows)
        return module.layer.A

    torch.testing.assert_close(trained(data), trained(data.with_targets(teacher)))


@pytest.mark.parametrize("content", ["broken", "pickled"])
def test_checkpoints_that_cannot_be_used_are_refused(teacher, data, tmp_path, content):
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"not a checkpoint")
    if content == "pickled":
        torch.save({"state_dict": nn.Linear(3, 3)}, file)  # would run code if unpickled
    module = DistilModule(teacher, 4, "svd")
    module.solve(data)
    with pytest.raises(InputError, match="does not fit"):
        train_students(module, {"svd": module.layer}, data, DistilOptions(trainer=QUIET_TRAINER, ckpt_path=str(file)))


def test_another_width_is_refused(data):
    with pytest.raises(InputError, match="inputs of width 16"):
        DistilModule(nn.Linear(8, 8), 4).solve(data)


def test_the_cosine_schedule_needs_an_end(teacher, data):
    run = Trainer(**QUIET, max_epochs=-1, max_time="00:00:00:01", enable_checkpointing=False)
    with pytest.raises(InputError, match="finite run"):
        run.fit(DistilModule(teacher, 4), datamodule=data)


def test_a_head_decides_what_matters(teacher, data):
    """The head looks at one output only: a rank-1 student trained through it finds that direction."""
    out = nn.Linear(16, 2, bias=False)
    with torch.no_grad():
        out.weight.zero_()
        out.weight[0, 5] = 3.0
    head = nn.Sequential(nn.Tanh(), out)
    module = DistilModule(teacher, 1, head=head, lr=2e-2)
    module.solve(data)
    start = copy.deepcopy(module.layer)
    fit(module, data, steps=300)
    x = data.rows("test")

    def error(layer):
        return (head(layer(x)).softmax(-1) - head(teacher(x)).softmax(-1)).abs().mean()

    assert error(module.layer) < 0.2 * error(start)
