"""Weights in int8 with a scale per output channel, for inputs with a scale per token, by the ranges of activations.

    y = W x + b  ≈  s_x (s_w ⊙ (W₈ x₈)) + b        W₈ = round(W / s_w), x₈ = round(x / s_x)

Channels whose largest values differ by orders of magnitude share one scale within a token, so that the small ones
vanish. SmoothQuant (Xiao et al., 2023) moves the difference into the weight behind them: `W x = (W s) (x / s)` with

    s_j = max|x_j| ^ α / max|W_j| ^ (1 − α)

The largest values come from one exact pass in float32 over a few proteins, in which no more than one layer is copied at
a time.

The sums of products are exact integers, so a row of the result does not depend on the rows beside it. The kernel is
oneDNN's, as torch ships it, and knows one scale for all inputs: they are given to it at scale 1, and a token's own
scale multiplies its row of the result. On x86 it is fast for unsigned inputs only, hence the zero points.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2
from safetensors import SafetensorError
from torch import Tensor

from distil_rank.embedding.esm2 import EXACT, Affine, FusedEncoder, folded, return_freed_memory
from distil_rank.errors import InputError

ALPHA = 0.5  # how much of the difference moves: the paper's choice, and as good as any here
GELU_MINIMUM = 0.17  # below which GELU never goes; added to its output, which then needs no sign
LEVELS = 127  # of int8 on each side of zero
UNSIGNED_LEVELS = 255
ZERO_POINT = 128  # of signed inputs in unsigned bytes
SMALLEST = 1e-30  # range of a row; one of zeros has none


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
    def load(cls, path: Path) -> Self:
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
    """The exact encoder in float32, whose layers are copied while they run; notes the activations' ranges.

    Args:
        model: fair-esm's model.
        layer: The last layer to compute.
        noted: How many of the first tokens count for the ranges.
    """

    def __init__(self, model: ESM2, layer: int | None = None, noted: int | None = None):
        super().__init__(model, layer=layer)
        self.noted = noted
        self.maxima: list[Maxima] = []  # by layer, after a pass

    def _convert(self, modules: Iterable[Any]) -> list[Any]:
        return list(modules)  # fair-esm's own

    def exact_layer(self, module: Any) -> Any:
        """One layer's parameters in float32, both norms folded."""
        return_freed_memory()  # the last layer's
        layer = self._layer(module, torch.float32, torch.float32)
        norm2, (fc1,) = folded(layer.norm2, layer.fc1)
        return layer._replace(norm2=norm2, fc1=fc1)

    def calibration(self) -> Calibration:
        """From the passes so far."""
        return Calibration(tuple(self.maxima))

    def _apply(self, layer: Any, x: Tensor, projected: Any, rotations: Tensor, lengths: list[int]) -> None:
        layer = self.exact_layer(layer)
        inputs = self._norm(x, layer.norm1)
        qk, v = (F.linear(inputs, *layer.qk), F.linear(inputs, layer.v)) if projected is None else projected
        attended = self._attend(qk, v, rotations, lengths)
        x += F.linear(attended, *layer.out)
        normed = self._norm(x, layer.norm2)
        hidden = F.gelu(F.linear(normed, *layer.fc1))
        x += F.linear(hidden, *layer.fc2)
        inner = (inputs, attended, normed, hidden + GELU_MINIMUM)
        self.maxima.append(Maxima(*(tensor[: self.noted].abs().amax(0) for tensor in inner)))


def has_int8_units() -> bool:
    """Whether this processor has units for int8 (VNNI or AMX); without them oneDNN's sums can saturate."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_vnni", "avx_vnni", "amx_int8")))


class Int8Linear:
    """A weight (N, C) in int8, in oneDNN's blocked order.

    Args:
        scales: (N,) float32; what one step is worth in each row.
        zero_point: The byte that stands for zero in the inputs.
        dtype: Of the outputs; bfloat16 takes half the time to write and to read.
    """

    def __init__(self, weight: Tensor, scales: Tensor, zero_point: int, dtype: torch.dtype = torch.float32):
        self.scales, self.zero_point, self.dtype = scales, zero_point, dtype
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)  # of the weight, which is symmetric

    def __call__(self, values: Tensor) -> Tensor:
        """Product with integer rows, (T, C) uint8 to (T, N), not yet multiplied by the rows' scales."""
        return torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, self.zero_point, self._packed, self.scales, self._zero_points, None),
            *(1.0, 0, self.dtype, "none", [], ""),
        )


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a weight (N, C) to int8; returns it with its scales, (N,) float32.

    >>> round_weight(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
    (tensor([[  64, -127],
            [   0,    0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    scales = weight.abs().amax(1) / LEVELS
    scales[scales == 0] = 1
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class Int8Layer(NamedTuple):
    """The parameters of one layer; each norm's scale is what migrates its outputs.

    Not in int8 are the first layer's queries, keys and values, which are read from a table, and the queries and keys of
    the second (`esm2.EXACT`).
    """

    norm1: Tensor
    qk: Tensor | None  # weight of queries and keys, where it is not in int8
    qkv: Int8Linear | None  # of values alone, where they are; None in the first layer, which is a table
    qk_bias: Tensor
    out: Int8Linear
    out_bias: Tensor
    norm2: Tensor
    fc1: Int8Linear
    fc1_bias: Tensor
    raised: Affine  # migrates GELU's outputs: scale and shift
    fc2: Int8Linear
    fc2_bias: Tensor

    @classmethod
    @torch.no_grad()
    def rounded(cls, number: int, exact: Any, calibration: Calibration, low: torch.dtype) -> Self:
        """Rounds one layer, in float32 with both norms folded, and numbered from 0.

        Args:
            low: Of queries and keys that are not in int8, and of products that are rounded next.
        """
        maxima = calibration.layers[number]
        before_qkv = calibration.migration(maxima.qkv, torch.cat([exact.qk[0], exact.v]))
        before_out = calibration.migration(maxima.out, exact.out[0])
        before_fc1 = calibration.migration(maxima.fc1, exact.fc1[0])
        before_fc2 = calibration.migration(maxima.fc2, exact.fc2[0])
        qk, v = exact.qk[0] * before_qkv, exact.v * before_qkv / before_out[:, None]

        def product(weight: Tensor, zero_point: int = ZERO_POINT, dtype: torch.dtype = torch.float32) -> Int8Linear:
            return Int8Linear(*round_weight(weight), zero_point, dtype)

        return cls(
            norm1=1 / before_qkv,
            qk=qk.to(low) if 0 < number < EXACT else None,
            qkv=product(v if number < EXACT else torch.cat([qk, v]), dtype=low) if number else None,
            qk_bias=exact.qk[1],
            out=product(exact.out[0] * before_out),
            out_bias=exact.out[1],
            norm2=1 / before_fc1,
            fc1=product(exact.fc1[0] * before_fc1, dtype=low),
            fc1_bias=exact.fc1[1],
            raised=(1 / before_fc2, GELU_MINIMUM / before_fc2),
            fc2=product(exact.fc2[0] * before_fc2, zero_point=0),
            fc2_bias=exact.fc2[1] - GELU_MINIMUM * exact.fc2[0].sum(1),
        )
