"""Lightning's metrics and hyper-parameters, into a run that is already open."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from distil_rank.tracking.run import Point, Run, points

PERIOD = 2.0  # seconds between two calls of MLflow, each of which costs as much as several steps of a small student


class RunLogger(MLFlowLogger):
    """Log a `Trainer`'s metrics into a run of `start_run`, which alone decides how the run ends.

    Metrics are sent every two seconds and when the fit ends, however it ends (only SIGKILL loses what was not sent
    yet). Checkpoints go to `mlruns/lightning/<experiment>/<run id>/checkpoints` unless their callback names a folder.

    Args:
        run: where to log.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(experiment_name=run.experiment, tracking_uri=run.tracking_uri, run_id=run.id)
        self._run = run
        self._waiting: list[Point] = []
        self._sent = time.monotonic()

    @property
    def experiment(self) -> Any:
        """The run's own client; Lightning's way to it would change MLflow's address for the whole process."""
        return self._run.client

    @property
    def experiment_id(self) -> str:
        """The experiment's id."""
        return self._run.experiment_id

    @property
    def save_dir(self) -> str:
        """Where a trainer puts files of its own."""
        return str(self._run.folder)

    @property
    def name(self) -> str:
        """The experiment's name, a folder for the trainer."""
        return self._run.experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Record hyper-parameters beside the run's own parameters; what the run recorded first stays."""
        self._run.log_params(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take down metrics at a step, and send what waits where it is time."""
        self._waiting += points(metrics, step)
        if time.monotonic() - self._sent > PERIOD:
            self._send()

    def finalize(self, status: str = "success") -> None:
        """Send what waits. The run stays open: it may hold several fits, and what follows them."""
        self._send()

    @rank_zero_only
    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        self._run.log_points(waiting)
