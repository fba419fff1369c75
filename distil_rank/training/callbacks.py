"""Lightning callbacks: log losses, fidelity and latency, save, and show progress, while a student trains."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from tqdm import tqdm

from distil_rank.evaluation.results import Curve
from distil_rank.measure.latency import LayerLatency, compare_layers
from distil_rank.measure.metrics import Fidelity
from distil_rank.training.distil import DistilModule

SAVE_PERIOD = 10.0  # seconds of training that a killed run may lose


class LogLosses(Callback):
    """Log the first seed's training loss and its parts, `train/<name>`, at every `log_every_n_steps` of the trainer.

    `LightningModule.log` would do it at several times the cost of a small student's whole step.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Log one batch."""
        if trainer.logger is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            losses = {f"train/{name}": float(value) for name, value in outputs.get("log", outputs).items()}
            trainer.logger.log_metrics(losses, step=trainer.global_step)


class LogFidelity(Callback):
    """Log cosine, centred cosine, relative MSE and R² on validation rows, each epoch, of the student and of baselines.

    The metric names are `val/<metric>/<method>`, so that the tracking server draws one metric's methods side by side.

    Args:
        mean: the teacher's mean output on the training rows, `(m,)`.
        baselines: other replacements of the same teacher, by name; they do not change, so that they are measured once,
            and appear as horizontal lines.
    """

    def __init__(self, mean: Tensor, baselines: Mapping[str, nn.Module] | None = None) -> None:
        self.baselines = copy.deepcopy(dict(baselines or {}))  # they move to the trainer's device
        self.metrics = {name: Fidelity(mean) for name in ("student", *self.baselines)}
        self.measured: dict[str, dict[str, Tensor]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new pass."""
        self.metrics["student"].to(pl_module.device).reset()
        for name in self.baselines.keys() - self.measured.keys():
            self.metrics[name].to(pl_module.device).reset()
            self.baselines[name].to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, *indices: int
    ) -> None:
        """Add one batch."""
        assert isinstance(pl_module, DistilModule)
        target = pl_module.teacher(batch)
        self.metrics["student"].update(pl_module(batch)[0], target)
        for name in self.baselines.keys() - self.measured.keys():
            self.metrics[name].update(self.baselines[name](batch), target)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pass."""
        student = self.metrics["student"].compute()
        self.measured |= {name: self.metrics[name].compute() for name in self.baselines.keys() - self.measured.keys()}
        for method, values in {"student": student, **self.measured}.items():
            pl_module.log_dict({f"val/{name}/{method}": value for name, value in values.items()})


class CurveRecorder(Callback):
    """Keep the validation curve for the report: `1 − R²` and the loss at every validation, the warm start first.

    What it reads was logged by `LogFidelity` and the module.

    Attributes:
        curve: what was recorded.
    """

    def __init__(self) -> None:
        self.curve = Curve()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the pass to the curve."""
        logged = trainer.callback_metrics
        self.curve.step.append(trainer.global_step)
        self.curve.val_residual.append(1 - float(logged["val/r2/student"]))
        self.curve.val_loss.append(float(logged["val/loss"]))


class SaveLast(Checkpoint):
    """Save what a run is resumed from, `last.ckpt`, at ends of epochs, ten seconds apart at least, and at the end.

    Lightning's own callback would save after every epoch, of which a small data set has several a second.

    Args:
        folder: where to save.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / "last.ckpt"
        self.saved = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where it is time; the first process decides for all."""
        due = time.monotonic() - self.saved > SAVE_PERIOD
        if trainer.strategy.broadcast(due):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        trainer.save_checkpoint(self.file)
        self.saved = time.monotonic()


class Progress(Callback):
    """One progress bar over all steps of a run, with the time left; nothing where output is not a terminal.

    Args:
        title: what the bar says.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, from where a resumed run stands."""
        steps = trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) else None  # a run that only `max_time` ends
        self.bar = tqdm(
            desc=self.title, total=total, initial=trainer.global_step, unit="step", disable=None, leave=False
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Advance the bar."""
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self.bar.close()


class LogLatency(Callback):
    """Time the dense layer beside the student once training ends, and log medians, 95th percentiles and ratios.

    Args:
        batches: rows in a call.
        threads: of the processor, while timing.

    Attributes:
        rows: the measurements.
    """

    def __init__(self, batches: Sequence[int] = (1, 32, 256), threads: int = 1) -> None:
        self.batches, self.threads = batches, threads
        self.rows: list[LayerLatency] = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time, on the first process only."""
        assert isinstance(pl_module, DistilModule)
        if not trainer.is_global_zero:
            return
        self.rows = compare_layers(pl_module.teacher, pl_module.student, batches=self.batches, threads=self.threads)
        for row in self.rows:
            if trainer.logger is not None:
                names = ("dense_us", "dense_p95_us", "student_us", "student_p95_us", "ratio", "threads")
                metrics = {f"timing/batch{row.batch}/{name}": getattr(row, name) for name in names}
                trainer.logger.log_metrics(metrics, step=trainer.global_step)
