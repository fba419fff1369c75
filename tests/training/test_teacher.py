"""Teachers and the gate before them."""

import numpy as np
import pytest
import torch
from lightning import Trainer

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.moments import Moments
from distil_rank.training.teacher import TeacherModule, check_teacher, random_teacher, spectral_teacher

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 3)) @ generator.normal(size=(3, 12)) + 1.0
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    module = EmbeddingDataModule(str(tmp_path / "x.npy"), split="exact")
    module.setup()
    return module


def test_the_denoiser_learns_to_take_noise_away(data):
    module = TeacherModule(lr=1e-2)
    Trainer(**QUIET, max_steps=300, max_epochs=-1).fit(module, datamodule=data)
    x = data.rows("test")
    noise = 0.3 * torch.randn(x.shape)
    assert (module(x + noise) - x).square().mean() < 0.6 * noise.square().mean()


def test_validation_noise_is_the_same_in_every_epoch_and_leaves_training_noise_alone(data):
    module = TeacherModule(data.dim, lr=0.0)
    losses = []
    for _ in range(2):
        run = Trainer(**QUIET)
        run.validate(module, datamodule=data, verbose=False)
        losses.append(float(run.callback_metrics["val/loss"]))
    assert losses[0] == losses[1]


def test_relative_noise_follows_each_dimension(data):
    module = TeacherModule(noise=0.5, noise_scale="relative")
    Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    torch.testing.assert_close(module.std, data.rows("train").std(0, correction=0), rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # the identity, so that what is left is the noise
        module.layer.weight.copy_(torch.eye(data.dim))
        module.layer.bias.zero_()
    loss = module.loss(torch.zeros(4000, data.dim))
    torch.testing.assert_close(loss, (0.5 * module.std).square().mean(), rtol=0.1, atol=0)


def test_made_teachers_are_the_same_each_time_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    assert torch.equal(random_teacher(8, seed=1).weight, random_teacher(8, seed=1).weight)
    assert not torch.equal(random_teacher(8, seed=1).weight, random_teacher(8, seed=2).weight)
    assert torch.equal(spectral_teacher(8).weight, spectral_teacher(8).weight)
    assert torch.equal(state, torch.get_rng_state())


def test_spectral_decay_is_as_published():
    teacher = spectral_teacher(64)
    expected = 2 * torch.exp(-torch.arange(64) / 100)
    torch.testing.assert_close(torch.linalg.svdvals(teacher.weight), expected, rtol=1e-4, atol=1e-5)
    assert not teacher.bias.any()


def test_the_gate_warns_of_a_denoiser_that_is_worse_than_the_mean(data):
    moments, held_out = Moments.of(data.rows("train")), data.rows("test")
    useless = random_teacher(data.dim)
    check = check_teacher(useless, moments, held_out, noise=5.0)
    assert check.denoising_r2 < 0
    assert "--teacher.noise_scale relative" in check.warning
    perfect = torch.nn.Linear(data.dim, data.dim)
    with torch.no_grad():
        perfect.weight.copy_(torch.eye(data.dim))
        perfect.bias.zero_()
    fine = check_teacher(perfect, moments, held_out, noise=1e-3)
    assert fine.warning is None and fine.denoising_r2 > 0.99
    assert 1 < fine.effective_rank <= 3.01  # the rows have three directions
