"""Codes trained to keep a richer vector's neighbours: distillation of its ranking into a few bytes.

The closed form chooses directions for the float code; nothing in it knows that each number will be cut to its sign.
Here the teacher is the float code of full rank, the student the quantised code of a few bytes; with `s_ij` the
teacher's and `z_ij` the student's score of query i and target j of a batch,

    loss = − Σ_i Σ_{j≠i} softmax_j(s_ij / τ) log softmax_j(z_ij / σ),

the cross-entropy of the two distributions over neighbours (Hinton, Vinyals and Dean 2015; of rankings: Cao et al.
2007). The student's queries are float, its targets are what is stored: gradients pass the rounding straight through
(Bengio, Léonard and Courville 2013). No label is needed.
"""

import logging
import math
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from distil_rank.lowrank.encoder import CodeEncoder, int8_scale
from distil_rank.measure.statistics import clearly_better
from distil_rank.training.experiment import trainer_options

log = logging.getLogger(__name__)

BATCH = 768  # proteins among which neighbours are compared
VALIDATION = 0.2  # share of the fit groups
NEIGHBOURS = 10  # of the teacher that codes should find again
FEWEST = 64  # rows in either split below which nothing is trained
START = 0.05  # of the student's temperature σ, which is learnt


class EncoderModule(LightningModule):
    """An encoder that learns a teacher's neighbours.

    Args:
        start: the encoder where training begins. int8 is trained as float32, from which it hardly differs.
        teacher: the float encoder of full rank.
        lr: in proportion to ten times the mean absolute weight.
        temperature: τ, of the teacher's scores.
    """

    def __init__(self, start: CodeEncoder, teacher: CodeEncoder, lr: float = 2e-3, temperature: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["start", "teacher"])
        self.start, self.teacher = start, teacher
        self.weight = nn.Parameter(start.weight / (start.weight.norm() / start.rank**0.5))
        self.log_sharpness = nn.Parameter(torch.tensor(-math.log(START)))

    def forward(self, x: Tensor) -> Tensor:
        """Queries: `(N, n)` → `(N, r)` of unit length."""
        return F.normalize(F.linear(x - self.start.mean, self.weight), dim=1)

    def targets(self, y: Tensor) -> Tensor:
        """What is stored of queries `(N, r)`, at unit length; gradients pass through as if nothing had been rounded."""
        if self.start.dtype == "bit":
            soft = torch.tanh(y * y.shape[1] ** 0.5)
            y = torch.where(y > 0, 1.0, -1.0) + soft - soft.detach()
        return F.normalize(y, dim=1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """Cross-entropy of the student's and the teacher's neighbours within rows `(N, n)`."""
        itself = torch.eye(len(batch), dtype=torch.bool, device=batch.device)
        with torch.no_grad():
            rows = self.teacher(batch)
            wanted = torch.softmax((rows @ rows.T / self.hparams["temperature"]).masked_fill(itself, -torch.inf), 1)
        queries = self(batch)
        scores = (queries @ self.targets(queries).T * self.log_sharpness.exp()).masked_fill(itself, -1e4)
        loss = -(wanted * torch.log_softmax(scores, 1)).sum(1).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW without decay, cosine schedule."""
        size = 10 * float(self.weight.detach().abs().mean())
        groups = [{"params": [self.weight], "lr": self.hparams["lr"] * size}]
        groups.append({"params": [self.log_sharpness], "lr": 0.01})
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def encoder(self) -> CodeEncoder:
        """The encoder as it is now."""
        encoder = CodeEncoder.of(self.start.mean, self.weight, self.start.dtype, self.start.scale)
        encoder.provenance = dict(self.start.provenance)
        return encoder


def train_encoder(
    encoder: CodeEncoder,
    teacher: CodeEncoder,
    x: np.ndarray,
    groups: np.ndarray,
    steps: int,
    seed: int = 0,
    logger: Logger | bool = False,
) -> CodeEncoder:
    """Train an encoder on the neighbours of a teacher, and retain it only where that is clearly better.

    Args:
        encoder: the closed form's, with its quantisation.
        teacher: the float encoder of full rank, fitted on the same rows.
        x: rows to train on, `(N, n)`; a share of their `groups`, `(N,)`, is for validation.

    Returns:
        The trained encoder, or the start; `training` in its provenance tells how both do on validation groups, with the
        paired 95 % interval of the gain. Nothing is trained where there are too few rows.
    """
    names = np.unique(groups)
    held_out = np.isin(groups, np.random.default_rng(seed).permutation(names)[: max(1, round(VALIDATION * len(names)))])
    if min(held_out.sum(), (~held_out).sum()) < FEWEST:
        log.warning("NOT TRAINED: %s proteins are too few for training and validation", f"{len(x):,}")
        return encoder
    rows, validation = (torch.from_numpy(np.ascontiguousarray(x[split])) for split in (~held_out, held_out))
    seed_everything(seed, verbose=False)
    size = min(BATCH, len(rows))
    sampler = BatchSampler(RandomSampler(rows, num_samples=steps * size), size, drop_last=False)
    options = trainer_options({"max_steps": steps, "accelerator": "cpu"})
    trainer = Trainer(**options, logger=logger, enable_checkpointing=False)
    module = EncoderModule(encoder, teacher)
    # a tensor is indexed as a data set is
    loader = DataLoader(cast("Dataset[Tensor]", rows), sampler=sampler, batch_size=None)
    trainer.fit(module, loader)
    trained = module.encoder
    if trained.dtype == "int8":
        trained.scale = int8_scale(trained(rows))
    before, after = (neighbours_found(one, teacher, validation) for one in (encoder, trained))
    gain = clearly_better(-before, -after, groups[held_out], seed)
    retained = gain.low > 0
    log.info(
        "Training: neighbours found on validation groups %.3f → %.3f (gain %+.3f to %+.3f), %s",
        *(before.mean(), after.mean(), gain.low, gain.high),
        "retained" if retained else "not retained: no clear gain",
    )
    result = trained if retained else encoder
    facts = {"start": float(before.mean()), "trained": float(after.mean()), "low": gain.low, "high": gain.high}
    result.provenance["training"] = {"steps": steps, **facts, "retained": retained}
    return result


@torch.no_grad()
def neighbours_found(encoder: CodeEncoder, teacher: CodeEncoder, x: Tensor) -> np.ndarray:
    """Share of each row's nearest neighbours by the teacher that float queries find among codes, `(N,)`."""
    k = min(NEIGHBOURS, len(x) - 1)
    queries, targets, rows = encoder(x), F.normalize(encoder.decode(encoder.encode(x)), dim=1), teacher(x)
    nearest = [scores.fill_diagonal_(-2).topk(k).indices for scores in (rows @ rows.T, queries @ targets.T)]
    common = (nearest[0][:, :, None] == nearest[1][:, None]).any(2)
    return common.float().mean(1).numpy()
