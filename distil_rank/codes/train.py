"""Training a code map where it earns its place: against its own start, on groups that are not trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from distil_rank.codes.neighbours import NeighbourModule
from distil_rank.lowrank.encoder import CodeEncoder, int8_scale
from distil_rank.measure.statistics import clearly_better

log = logging.getLogger(__name__)

BATCH = 768  # proteins among which neighbours are compared
LR, TEMPERATURE = 2e-3, 0.05
STEPS = 600
VALIDATION = 0.2  # share of the fit groups
NEIGHBOURS = 10  # of the teacher that codes should find again
FEWEST = 64  # rows on either side below which nothing is trained


@dataclass(frozen=True)
class CodeTraining:
    """What training a code map came to.

    Attributes:
        encoder: the trained one where it clearly wins, otherwise the start.
        steps: of training; 0 where there were too few rows.
        start: share of the teacher's neighbours that the start finds, on validation groups.
        trained: the same after training.
        gain: paired 95 % interval of the difference, over groups.
        retained: whether the trained map was kept.
    """

    encoder: CodeEncoder
    steps: int
    start: float
    trained: float
    gain: tuple[float, float]
    retained: bool

    def __str__(self) -> str:
        verdict = "retained" if self.retained else "not retained: no clear gain"
        low, high = self.gain
        return (
            f"neighbours found on validation groups {self.start:.3f} → {self.trained:.3f} "
            f"(gain {low:+.3f} to {high:+.3f}), {verdict}"
        )


def train_encoder(
    encoder: CodeEncoder,
    teacher: CodeEncoder,
    x: np.ndarray,
    groups: np.ndarray,
    steps: int,
    seed: int = 0,
    **trainer: Any,
) -> CodeTraining:
    """Train a code map on the neighbours of a teacher, and keep it only where that clearly helps.

    Args:
        encoder: the closed form's, with its quantisation.
        teacher: the float code of full rank, fitted on the same rows.
        x: rows to train on, `(N, n)`; a share of their groups is for validation.
        groups: of each row, `(N,)`.
        steps: of training.
        seed: of the batches and of the choice of validation groups.
        trainer: further options of Lightning's Trainer.
    """
    dice = np.random.default_rng(seed)
    names = np.unique(groups)
    held_out = np.isin(groups, dice.permutation(names)[: max(1, round(VALIDATION * len(names)))])
    if min(held_out.sum(), (~held_out).sum()) < FEWEST:
        log.warning("NOT TRAINED: %s proteins are too few for training and validation", f"{len(x):,}")
        return CodeTraining(encoder, 0, float("nan"), float("nan"), (float("nan"), float("nan")), False)
    rows, judged = (torch.from_numpy(np.ascontiguousarray(x[side])) for side in (~held_out, held_out))
    seed_everything(seed, verbose=False)
    module = NeighbourModule(encoder, teacher, LR, TEMPERATURE, steps)
    sampler = RandomSampler(rows, num_samples=steps * min(BATCH, len(rows)), replacement=False)
    loader = DataLoader(TensorDataset(rows), min(BATCH, len(rows)), sampler=sampler, collate_fn=_stacked)
    fit = Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=trainer.pop("logger", False),
        enable_progress_bar=False,
        **trainer,
    )
    fit.fit(module, loader)
    trained = module.trained()
    if trained.dtype == "int8":
        trained.scale = int8_scale(trained(rows))
    before, after = (found_neighbours(one, teacher, judged) for one in (encoder, trained))
    gain = clearly_better(-before, -after, groups[held_out], seed)
    kept, interval = trained if gain.low > 0 else encoder, (gain.low, gain.high)
    return CodeTraining(kept, steps, float(before.mean()), float(after.mean()), interval, gain.low > 0)


def _stacked(rows: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([row for (row,) in rows])


@torch.no_grad()
def found_neighbours(encoder: CodeEncoder, teacher: CodeEncoder, x: Tensor) -> np.ndarray:
    """Share of each row's nearest neighbours by the teacher that float queries find among codes, `(N,)`."""
    k = min(NEIGHBOURS, len(x) - 1)
    queries, targets, rows = encoder(x), encoder.decode(encoder.encode(x)), teacher(x)
    targets = torch.nn.functional.normalize(targets, dim=1)
    nearest = [scores.fill_diagonal_(-2).topk(k).indices for scores in (rows @ rows.T, queries @ targets.T)]
    common = (nearest[0][:, :, None] == nearest[1][:, None]).any(2)
    return common.float().mean(1).numpy()
