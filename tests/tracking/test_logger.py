import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from mlflow import MlflowClient
from torch import nn
from torch.utils.data import DataLoader

from distil_rank.tracking.run import Run, start_run
from distil_rank.tracking.run_store import default_tracking_uri
from distil_rank.tracking.training import RunLogger

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
QUIET |= {"accelerator": "cpu", "log_every_n_steps": 1}


class Toy(LightningModule):
    """One linear layer, trained towards zero."""

    def __init__(self, width: int = 4, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, width)

    def training_step(self, batch):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def fit(run: Run, *callbacks: Callback, **options) -> None:
    rows = DataLoader(torch.randn(12, 4), batch_size=4)
    Trainer(**QUIET, **{"max_epochs": 2, **options}, logger=RunLogger(run), callbacks=list(callbacks)).fit(
        Toy(), rows, rows
    )


def test_a_trainer_logs_into_the_open_run_and_leaves_it_open(project):
    client, environment = MlflowClient(default_tracking_uri(project)), dict(os.environ)
    with start_run("distil", "toy", params={"width": "wide"}, tags={}, root=project) as run:
        fit(run)
        assert {**os.environ, "PL_GLOBAL_SEED": ""} == {**environment, "PL_GLOBAL_SEED": ""}  # the next run is free
        assert client.get_run(run.id).info.status == "RUNNING"
        run.log_metrics({"test/r2": 1.0})
    retained = client.get_run(run.id)
    assert retained.info.status == "FINISHED"
    assert retained.data.params == {"width": "wide"}
    assert [value.step for value in client.get_metric_history(run.id, "train/loss")] == list(range(6))
    assert [value.step for value in client.get_metric_history(run.id, "val/loss")] == [2, 5]
    assert len(client.search_runs([run.experiment_id])) == 1


class Signal(Callback):
    """Send this process a signal in the middle of an epoch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_training_that_is_stopped_leaves_its_run_killed(project, number, code):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.raises(SystemExit) as left,
            start_run("distil", "stopped", params={}, tags={}, root=project) as run,
        ):
            fit(run, Signal(number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == code
    client = MlflowClient(default_tracking_uri(project))
    retained = client.get_run(run.id)
    assert retained.info.status == "KILLED"
    assert "error" not in retained.data.tags
    assert [value.step for value in client.get_metric_history(run.id, "train/loss")] == [0]


class Crash(Callback):
    def on_train_batch_end(self, *_) -> None:
        raise RuntimeError("no memory left")


def test_a_training_that_crashes_leaves_its_run_failed(project):
    with (
        pytest.raises(RuntimeError),
        start_run("distil", "crashes", params={}, tags={}, root=project) as run,
    ):
        fit(run, Crash())
    retained = MlflowClient(default_tracking_uri(project)).get_run(run.id)
    assert (retained.info.status, retained.data.tags["error"]) == ("FAILED", "RuntimeError: no memory left")
