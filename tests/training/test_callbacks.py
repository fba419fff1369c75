"""What the callbacks log, save and decide."""

from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from distil_rank.training import callbacks
from distil_rank.training.callbacks import KeepIfBetter, LogFidelity, LogLatency, SaveLast
from distil_rank.training.distil import DistilModule

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Linear(16, 16)


def test_three_callbacks_in_a_plain_trainer(teacher, data, tmp_path):
    module, latency, fidelity = DistilModule(teacher, rank=4, warm_start="svd", lr=1e-2), LogLatency(), LogFidelity()
    logger = CSVLogger(tmp_path)
    run = Trainer(
        **QUIET,
        max_epochs=3,
        logger=logger,
        callbacks=[fidelity, latency, KeepIfBetter()],
        log_every_n_steps=1,
    )
    run.fit(module, datamodule=data)
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    for name in (
        "val/one_minus_cosine/student",
        "val/one_minus_r2/svd",
        "val/relative_mse/student",
        "train/loss",
        "batch32_ratio",
    ):
        assert name in logged, name
    assert "training_retained" in logged
    assert [row.batch for row in latency.rows] == [1, 32, 256]
    assert len(fidelity.curve.step) == 3 and fidelity.curve.val_residual[-1] < fidelity.curve.val_residual[0]


def test_a_gain_on_one_protein_of_many_rows_is_no_clear_gain(teacher, data, monkeypatch):
    monkeypatch.setattr(data, "proteins", lambda split: np.zeros(len(data.rows(split)), dtype=int))
    keep = KeepIfBetter()
    run = Trainer(**QUIET, max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[keep])
    run.fit(DistilModule(teacher, 4, warm_start="svd", lr=1e-2), datamodule=data)
    assert keep.best_loss < keep.start_loss and not keep.better


def test_without_a_validation_the_start_is_retained(teacher, data):
    keep = KeepIfBetter()
    options = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 1, "check_val_every_n_epoch": 9}
    module = DistilModule(teacher, 4, warm_start="svd", lr=1e-2)
    module.solve(data)
    start = module.layer.A.clone()
    Trainer(**QUIET, **options, max_epochs=1, callbacks=[keep]).fit(module, datamodule=data)
    assert not keep.better and torch.equal(module.layer.A, start)


@pytest.mark.parametrize(("period", "least"), [(3600.0, 1), (0.0, 6)])
def test_what_a_run_is_resumed_from_is_saved_once_a_period_and_at_the_end(
    teacher, data, tmp_path, monkeypatch, period, least
):
    monkeypatch.setattr(callbacks, "SAVE_PERIOD", timedelta(seconds=period))
    steps = []
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda self, file, *args, **kw: (steps.append(self.global_step), save(self, file, *args, **kw)),
    )
    run = Trainer(**QUIET, logger=False, max_epochs=5, callbacks=[SaveLast(tmp_path / "saved")])
    run.fit(DistilModule(teacher, 4), datamodule=data)
    assert len(steps) >= least and (least > 1 or len(steps) == 1)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "saved/last.ckpt", weights_only=True)["global_step"] == steps[-1] == max(steps)
