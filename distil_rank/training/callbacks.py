"""Lightning callbacks for `DistilModule`: fidelity, latency, the better of start and end, curves, progress."""

import copy
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from tqdm import tqdm

from distil_rank.evaluation.results import Curve
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.solvers import solve
from distil_rank.measure.latency import LayerLatency, compare_layers
from distil_rank.measure.metrics import Fidelity, lost
from distil_rank.measure.statistics import Interval, clearly_better
from distil_rank.training.distil import DistilModule

SAVE_PERIOD = timedelta(seconds=10)  # of training that a killed run may lose


class LogFidelity(Callback):
    """Log what student and baselines lose on validation rows, each epoch: 1 − R², 1 − cosines, relative MSE.

    The metric names are `val/<metric>/<method>`, so that the tracking server draws one metric's methods side by side.

    Args:
        baselines: other replacements of the same teacher, by name; the truncated SVD by default. They do not change:
            they are measured once and appear as horizontal lines.

    Attributes:
        curve: the student's loss and 1 − R² at every validation, for the report.
    """

    def __init__(self, baselines: Mapping[str, nn.Module] | None = None) -> None:
        self.baselines, self.curve = baselines, Curve()
        self.metrics: dict[str, Fidelity] = {}
        self.measured: dict[str, dict[str, Tensor]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new pass."""
        assert isinstance(pl_module, DistilModule)
        if self.baselines is None:
            teacher, rank = pl_module.teacher, pl_module.layer.rank
            svd = LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, rank, "svd"))
            self.baselines = {"svd": svd.to(pl_module.device)}
        methods = ["student", *(name for name in self.baselines if name not in self.measured)]
        self.metrics = {name: Fidelity(pl_module.output_mean.cpu()).to(pl_module.device) for name in methods}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, *indices: int
    ) -> None:
        """Add one batch."""
        assert isinstance(pl_module, DistilModule) and self.baselines is not None
        target = pl_module.teacher(batch)
        for name, metric in self.metrics.items():
            layer = pl_module.layer if name == "student" else self.baselines[name].to(batch.device)
            metric.update(layer(batch), target)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pass."""
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        if not trainer.sanity_checking:
            self.measured |= {name: value for name, value in values.items() if name != "student"}
        for method, figures in {**self.measured, **values}.items():
            pl_module.log_dict({f"val/{name}/{method}": value for name, value in lost(figures).items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the pass to the curve."""
        if not trainer.sanity_checking:
            self.curve.step.append(trainer.global_step)
            self.curve.val_residual.append(float(trainer.callback_metrics["val/one_minus_r2/student"]))
            self.curve.val_loss.append(float(trainer.callback_metrics["val/loss"]))


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
        layer = copy.deepcopy(pl_module.layer).eval()
        self.rows = compare_layers(pl_module.teacher, layer, batches=self.batches, threads=self.threads)
        for row in self.rows:
            if trainer.logger is not None:
                names = ("dense_us", "dense_p95_us", "student_us", "student_p95_us", "ratio", "threads")
                metrics = {f"batch{row.batch}_{name}": getattr(row, name) for name in names}
                trainer.logger.log_metrics(metrics, step=trainer.global_step)


class KeepIfBetter(Callback):
    """End with the best validated student, but only where it clearly beats the start; otherwise with the start.

    The start competes on the validation rows with the student of the lowest validation loss. It gives way only to a
    clear difference, by the one rule of this package: `distil_rank.measure.statistics.clearly_better`, a paired
    bootstrap over the validation proteins. (The best of many validations was chosen on the same rows, so this is a
    precaution against noise, not a test at 5 %.) Works with any module of a `layer`, a `losses(batch)` that gives
    each row's `loss`, and a `validation_step` that returns it.

    Attributes:
        start_loss, best_loss: mean validation loss before the first step, and the lowest of any validation.
        gain: the interval of the mean difference. Like the losses, it is there once training has ended.
        better: whether training clearly helped, so that its student was retained.
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] | None = None
        self.better, self.gain = False, Interval(0.0, 0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the start, unless a resumed run brings its own."""
        if self.start is None:
            self.start = self.best = _state_of(pl_module)
            self.start_rows = self.best_rows = _validation_losses(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new pass."""
        self._rows: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, *indices: int
    ) -> None:
        """Add one batch."""
        self._rows.append(outputs.detach().double().cpu())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the student where it is better than before."""
        if self.start is None or trainer.sanity_checking:
            return
        rows = torch.cat(self._rows)
        if rows.mean() < self.best_rows.mean() or self.best is self.start:
            self.best, self.best_rows = _state_of(pl_module), rows

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the better one into the module; a checkpoint of the end of training holds the last step before."""
        if self.start is None:
            return
        data = getattr(trainer, "datamodule", None)
        groups = np.arange(len(self.start_rows)) if data is None else data.proteins("val")
        self.start_loss, self.best_loss = float(self.start_rows.mean()), float(self.best_rows.mean())
        self.gain = clearly_better(self.start_rows.numpy(), self.best_rows.numpy(), groups)
        self.better = self.gain.low > 0
        pl_module.layer.load_state_dict(self.best if self.better else self.start)  # type: ignore[union-attr]
        if trainer.logger is not None:
            figures = {"start": self.start_loss, "best": self.best_loss, "retained": float(self.better)}
            metrics = {f"training_{name}": value for name, value in figures.items()}
            trainer.logger.log_metrics(metrics, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {name: getattr(self, name) for name in ("start", "start_rows", "best", "best_rows")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)


def _state_of(module: LightningModule) -> dict[str, Tensor]:
    """A copy of the layer's state, on the processor."""
    layer: nn.Module = module.layer  # type: ignore[assignment]
    return {name: value.detach().cpu().clone() for name, value in layer.state_dict().items()}


@torch.no_grad()
def _validation_losses(trainer: Trainer, module: LightningModule) -> Tensor:
    """The loss of each validation row, `(N,)` float64."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):  # a loader draws a number, which must not change the training batches
        losses = [module.losses(x.to(module.device))["loss"].double().cpu() for x in loaders]  # type: ignore[operator]
    return torch.cat(losses)


class SaveLast(ModelCheckpoint):
    """Save what a run is resumed from, `last.ckpt`, every ten seconds of training and at its end.

    Args:
        folder: where to save.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, "last", enable_version_counter=False, train_time_interval=SAVE_PERIOD)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")


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
