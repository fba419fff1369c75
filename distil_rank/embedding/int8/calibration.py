"""What int8 has to know of a model's activations, and the exact pass over a few proteins that tells it.

Channels whose largest values differ by orders of magnitude share one scale within a token, so that the small ones
vanish. SmoothQuant (Xiao et al., 2023) moves the difference into the weight behind them: `W x = (W s) (x / s)` with

    s_j = max|x_j| ^ α / max|W_j| ^ (1 − α)

The largest values come from one pass in float32, in which no more than one layer is held at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2
from safetensors import SafetensorError
from torch import Tensor

from distil_rank.embedding.backbone import Lazy, StreamedModel
from distil_rank.embedding.esm2 import FusedEncoder, folded
from distil_rank.errors import InputError

ALPHA = 0.5  # how much of the difference moves: the paper's choice, and as good as any here
GELU_MINIMUM = 0.17  # below which GELU never goes; added to its output, which then needs no sign


class Maxima(NamedTuple):
    """Largest absolute value of each channel at the inputs of one layer's products."""

    qkv: Tensor  # (C,), behind the norm without its scale and shift, which the weights take
    out: Tensor  # (C,), of attention over values without their bias
    fc1: Tensor  # (C,), as `qkv`
    fc2: Tensor  # (4 C,), of GELU raised by `GELU_MINIMUM`


@dataclass(frozen=True)
class Calibration:
    """The activations' ranges in every layer, and how much of the differences between channels the weights take."""

    layers: tuple[Maxima, ...]
    alpha: float = ALPHA

    @property
    def sha256(self) -> str:
        """Of `content`."""
        return hashlib.sha256(self.content()).hexdigest()

    def content(self) -> bytes:
        """Of a safetensors file."""
        tensors = {
            f"{number}.{name}": value.contiguous()
            for number, maxima in enumerate(self.layers)
            for name, value in maxima._asdict().items()
        }
        return safetensors.torch.save(tensors, {"alpha": str(self.alpha)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads a file of `content`."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                alpha = float((file.metadata() or {})["alpha"])
                count = 1 + max(int(key.split(".")[0]) for key in file.keys())  # noqa: SIM118
                layers = [
                    Maxima(*(file.get_tensor(f"{number}.{name}") for name in Maxima._fields)) for number in range(count)
                ]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"Expected an int8 calibration in {path} but it cannot be read ({error}).") from error
        return cls(tuple(layers), alpha)

    def migration(self, largest: Tensor, weight: Tensor) -> Tensor:
        """Factors by which to divide the inputs of a weight (N, C), (C,); powers of their ranges, around 1."""
        columns = weight.abs().amax(0)
        factors = largest**self.alpha / columns ** (1 - self.alpha)
        factors[(largest == 0) | (columns == 0)] = 1
        factors /= factors.log().mean().exp()
        return factors if self.alpha else torch.ones_like(factors)


class CalibrationEncoder(FusedEncoder):
    """The exact encoder in float32, made layer by layer while it runs; notes the activations' ranges.

    Args:
        model: fair-esm's model.
        layer: The last layer to compute.
        noted: How many of the first tokens count for the ranges.
    """

    def __init__(self, model: ESM2 | StreamedModel, layer: int | None = None, noted: int | None = None):
        super().__init__(model, layer=layer)
        self.noted = noted
        self.maxima: list[Maxima] = []  # by layer, after a pass

    def _convert(self, modules: Sequence[Any]) -> Sequence[Any]:
        def exact(number: int) -> Any:
            """One layer in float32, both norms folded."""
            layer = self._layer(modules[number], torch.float32, torch.float32)
            norm2, (fc1,) = folded(layer.norm2, layer.fc1)
            return layer._replace(norm2=norm2, fc1=fc1)

        return Lazy(exact, range(len(modules)))

    def calibration(self) -> Calibration:
        """From the passes so far."""
        return Calibration(tuple(self.maxima))

    def _apply(self, layer: Any, x: Tensor, projected: Any, rotations: Tensor, lengths: list[int]) -> None:
        inputs = self._norm(x, layer.norm1)
        qk, v = (F.linear(inputs, *layer.qk), F.linear(inputs, layer.v)) if projected is None else projected
        attended = self._attend(qk, v, rotations, lengths)
        x += F.linear(attended, *layer.out)
        normed = self._norm(x, layer.norm2)
        hidden = F.gelu(F.linear(normed, *layer.fc1))
        x += F.linear(hidden, *layer.fc2)
        inner = (inputs, attended, normed, hidden + GELU_MINIMUM)
        self.maxima.append(Maxima(*(tensor[: self.noted].abs().amax(0) for tensor in inner)))
