"""Lightning's metrics, into a run that is already open."""

from __future__ import annotations

from typing import Any

import mlflow
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from distil_rank.tracking.run import Run


class RunLogger(MLFlowLogger):
    """Log a `Trainer`'s metrics into a run of `start_run`, which alone decides how the run ends.

    Metrics are sent in the background (one call takes as long as several steps of a small student), and waited for
    when the fit ends, however it ends: only SIGKILL loses some. Hyper-parameters are the run's own parameters.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.experiment, tracking_uri=run.tracking_uri, run_id=run.id, synchronous=False)
        self._run = run

    @property
    def save_dir(self) -> str:
        """Where a trainer puts files of its own."""
        return str(self._run.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the command has recorded them."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Wait for what was sent. The run stays open: it may hold several fits, and what follows them."""
        mlflow.flush_async_logging()
