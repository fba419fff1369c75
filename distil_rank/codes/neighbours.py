"""Codes trained to keep a richer vector's neighbours: distillation of its ranking into a few bytes.

The closed form chooses directions for the float code; nothing in it knows that each number will be cut to its sign, or
each block to one of 256 centroids. Here the teacher is the float code of full rank, the student the quantised code of a
few bytes; with `s_ij` the teacher's and `z_ij` the student's score of query i and target j of a batch,

    loss = − Σ_i Σ_{j≠i} softmax_j(s_ij / τ) log softmax_j(z_ij / σ),

the cross-entropy of the two distributions over neighbours (Hinton, Vinyals and Dean 2015; of rankings: Cao et al.
2007). The student's queries are float, its targets are what is stored: gradients pass the rounding straight through
(Bengio, Léonard and Courville 2013). No label is needed.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from distil_rank.lowrank.encoder import CodeEncoder

SHARPNESS = 0.01  # temperature of the soft assignment to centroids, whose gradient stands in for that of the hard one
START = 0.05  # of the student's temperature σ, which is learnt


class NeighbourModule(LightningModule):
    """A code map that learns a teacher's neighbours.

    Args:
        encoder: where training begins; it is copied. int8 is trained as float32, from which it hardly differs.
        teacher: the float code of full rank.
        lr: of centroids; the map's is in proportion to its weights.
        temperature: τ, of the teacher's scores.
        steps: of the cosine schedule.
    """

    def __init__(self, encoder: CodeEncoder, teacher: CodeEncoder, lr: float, temperature: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder", "teacher"])
        self.start, self.teacher = copy.deepcopy(encoder), teacher
        scale = encoder.weight.detach().norm() / encoder.rank**0.5
        self.weight = nn.Parameter(encoder.weight / scale)
        self.centroids = None if encoder.codebooks is None else nn.Parameter(encoder.codebooks.clone())
        self.log_sharpness = nn.Parameter(torch.tensor(-math.log(START)))
        self.lr, self.temperature, self.steps = lr, temperature, steps

    def queries(self, x: Tensor) -> Tensor:
        """`(N, n)` → `(N, r)` of unit length."""
        return F.normalize(F.linear(x - self.start.mean, self.weight), dim=1)

    def targets(self, y: Tensor) -> Tensor:
        """What is stored of rows `(N, r)`, at unit length; gradients pass through as if nothing had been rounded."""
        if self.centroids is not None:
            parts = y.unflatten(-1, (len(self.centroids), -1)).transpose(0, 1)  # (M, N, r / M)
            nearness = parts @ self.centroids.transpose(1, 2) - self.centroids.square().sum(-1)[:, None] / 2
            soft = torch.softmax(nearness / SHARPNESS, -1)  # (M, N, 256)
            hard = F.one_hot(nearness.argmax(-1), soft.shape[-1]).to(soft)
            y = ((hard + soft - soft.detach()) @ self.centroids).transpose(0, 1).flatten(1)
        elif self.start.dtype == "bit":
            soft = torch.tanh(y * y.shape[1] ** 0.5)
            y = torch.where(y > 0, 1.0, -1.0) + soft - soft.detach()
        return F.normalize(y, dim=1)

    def loss(self, x: Tensor) -> Tensor:
        """Cross-entropy of the student's and the teacher's neighbours within rows `(N, n)`."""
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        with torch.no_grad():
            rows = self.teacher(x)
            wanted = torch.softmax((rows @ rows.T / self.temperature).masked_fill(itself, -torch.inf), 1)
        y = self.queries(x)
        scores = (y @ self.targets(y).T * self.log_sharpness.exp()).masked_fill(itself, -1e4)
        return -(wanted * torch.log_softmax(scores, 1)).sum(1).mean()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """One batch of rows."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW without decay, cosine schedule."""
        size = 10 * float(self.weight.detach().abs().mean())
        groups: list[dict[str, Any]] = [{"params": [self.weight], "lr": self.lr * size}]
        groups.append({"params": [self.log_sharpness], "lr": 0.01})
        if self.centroids is not None:
            groups.append({"params": [self.centroids], "lr": self.lr})
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def trained(self) -> CodeEncoder:
        """The code map as it is now."""
        centroids = None if self.centroids is None else self.centroids
        found = CodeEncoder.of(self.start.mean, self.weight, self.start.dtype, self.start.scale, centroids)
        found.provenance, found.guard = dict(self.start.provenance), self.start.guard
        return found
