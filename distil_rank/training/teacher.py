"""Teachers: the dense layers to be distilled, and a check whether one is worth it."""

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from distil_rank.evaluation.results import TeacherCheck
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import output_spectrum
from distil_rank.measure.metrics import effective_rank

log = logging.getLogger(__name__)


class TeacherModule(LightningModule):
    """Trains a linear denoiser, `x + noise` in, `x` out: the proxy of a downstream layer (the original's teacher).

    Args:
        features: d, the width of an embedding; the layer is `(d, d)`. By default the data module's, known in `setup`.
        noise: Standard deviation of the Gaussian noise.
        noise_scale: What `noise` is measured in: `absolute` units, as the original has it, or `relative` to each
            dimension's standard deviation over the training rows of the data module.
        lr: Learning rate of Adam.

    Attributes:
        layer: the `nn.Linear` that is trained.
    """

    layer: nn.Linear
    std: Tensor

    def __init__(
        self,
        features: int | None = None,
        noise: float = 0.3,
        noise_scale: Literal["absolute", "relative"] = "absolute",
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("std", torch.ones(()))
        if features is not None:
            self.layer = nn.Linear(features, features)

    def setup(self, stage: str) -> None:
        """Build the layer, and measure the spread that relative noise is in units of, from the data module."""
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(self.trainer.datamodule.dim, self.trainer.datamodule.dim)  # type: ignore[attr-defined]
        h: Any = self.hparams
        if h.noise_scale == "relative":
            self.std = self.trainer.datamodule.moments.std.float()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d)` → `(…, d)`."""
        return self.layer(x)

    def loss(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error against the clean input `(N, d)`, with noise from torch's generator or another one."""
        h: Any = self.hparams
        noise = torch.randn(x.shape, generator=generator, device=None if generator else x.device).to(x)
        return F.mse_loss(self(x + h.noise * self.std * noise), x)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of one batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """The same on validation rows, with the same noise in every epoch, so that epochs can be compared."""
        self.log("val/loss", self.loss(batch, torch.Generator().manual_seed(batch_index)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"], fused=True)


def random_teacher(in_features: int, out_features: int | None = None, seed: int = 42) -> nn.Linear:
    """A layer as `nn.Linear` initialises it (Kaiming-uniform), the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(in_features, out_features or in_features)


def spectral_teacher(features: int, decay: float = 100.0, scale: float = 2.0, seed: int = 42) -> nn.Linear:
    """`W = U diag(S) V` with `S_i = scale · exp(−i / decay)` and a bias of zero.

    U and V are the Q factors of Gaussian matrices.

    >>> S = torch.linalg.svdvals(spectral_teacher(16, decay=4.0).weight)
    >>> bool(torch.isclose(S[4] / S[0], torch.tensor(-1.0).exp()))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(features, features, generator=generator))[0] for _ in range(2))
    S = scale * torch.exp(-torch.arange(features) / decay)
    teacher: nn.Linear = nn.utils.skip_init(nn.Linear, features, features)
    with torch.no_grad():
        teacher.weight.copy_(U @ (S[:, None] * V))
        teacher.bias.zero_()
    return teacher


@torch.no_grad()
def check_teacher(
    teacher: nn.Linear,
    moments: Moments,
    heldout: Tensor | None = None,
    noise: float | None = None,
    relative: bool = False,
) -> TeacherCheck:
    """Is this layer worth distilling?

    Args:
        teacher: the dense layer.
        moments: of its inputs on the training rows.
        heldout: rows `(N, d)` that it did not see; given for a denoiser only.
        noise: the denoiser's noise.
        relative: whether that is in units of each dimension's standard deviation.
    """
    values = output_spectrum(teacher.weight, moments)[0]
    rank = float(effective_rank(values))
    if heldout is None or noise is None:
        return TeacherCheck(rank)
    mean = moments.mean.to(heldout)
    variance = (heldout - mean).double().square().sum()
    std = moments.std
    generator = torch.Generator().manual_seed(0)
    corrupted = heldout + noise * (std.to(heldout) if relative else 1.0) * torch.randn(
        heldout.shape, generator=generator
    )
    r2 = float(1 - (teacher(corrupted) - heldout).double().square().sum() / variance)
    ratio = noise if relative else float(noise / std.median())
    warning = None
    if r2 <= 0:
        warning = (
            f"This denoiser is worse than predicting the mean (R² {r2:.2f} on held-out rows): its noise is {ratio:.1f} "
            "times the spread of a typical dimension. Use --teacher.noise_scale relative, or a smaller --teacher.noise."
        )
        log.warning(warning)
    return TeacherCheck(rank, r2, ratio, warning)
