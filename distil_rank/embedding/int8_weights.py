"""A model's weights in int8, one layer at a time: rounded from the exact ones, or as they were saved.

Not in int8 are the first layer's queries, keys and values, which are read from a table, and the queries and keys of the
second (`esm2.EXACT`).

Names of a layer's tensors: `norm1` and `norm2`, the norms' scales, (C,); `NAME.weight`, (N, C) int8, `NAME.scales` and
`NAME.bias`, (N,), for `qkv` (of values alone where queries and keys are exact; absent in the first layer), `out`, `fc1`
and `fc2`; `qk.bias`, and `qk.weight` where they are exact; `raised.scale` and `raised.shift` of GELU's outputs, (4 C,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distil_rank.embedding.calibration import GELU_MINIMUM, Calibration, CalibrationEncoder, Maxima
from distil_rank.embedding.esm2 import EXACT, Parts
from distil_rank.embedding.int8_linear import round_weight
from distil_rank.errors import InputError


@dataclass(frozen=True)
class Int8Weights:
    """What `Int8Encoder` is made of.

    Attributes:
        parts: What it has beside its layers; exact.
        layers: Tensors by name, of each layer; made or read when asked for.
        apart: Whether several layers may be asked for at once: each is read from a file of its own, on one core.
    """

    parts: Parts
    layers: Sequence[Mapping[str, Tensor]]
    apart: bool = False


@torch.no_grad()
def round_weights(exact: CalibrationEncoder, calibration: Calibration) -> Int8Weights:
    """Rounds the weights of an exact encoder, layer by layer.

    Args:
        exact: The encoder, up to the layer that int8 is to go to.
        calibration: The activations' ranges, of at least these layers.

    Raises:
        InputError: it is that of another model.
    """
    width = exact.embedding.shape[1]
    found = [len(maxima.qkv) for maxima in calibration.layers[: exact.layer]]
    if found != [width] * exact.layer:
        raise InputError(
            f"Expected a calibration of {exact.layer} layers of width {width} but got {len(calibration.layers)} of "
            f"width {found[0] if found else 0}; leave --calibration out, or name one of this backbone."
        )
    parts, layers = exact.parts, _RoundedLayers(exact, calibration)
    if len(layers):
        qk, v = parts.first
        migration = calibration.migration(calibration.layers[0].out, exact.layers[0].out[0])
        parts = parts._replace(first=(qk, v / migration))
    return Int8Weights(parts, layers)


class _RoundedLayers(Sequence[Mapping[str, Tensor]]):
    def __init__(self, exact: CalibrationEncoder, calibration: Calibration):
        self.exact, self.calibration = exact, calibration

    def __len__(self) -> int:
        return len(self.exact.layers)

    def __getitem__(self, number: Any) -> Any:
        return round_layer(number, self.exact.layers[number], self.calibration)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return map(self.__getitem__, range(len(self)))


@torch.no_grad()
def round_layer(number: int, exact: Any, calibration: Calibration) -> dict[str, Tensor]:
    """Rounds one layer.

    Args:
        number: From 0.
        exact: The layer in float32, both norms folded.
        calibration: The activations' ranges.
    """
    maxima: Maxima = calibration.layers[number]
    before_qkv = calibration.migration(maxima.qkv, torch.cat([exact.qk[0], exact.v]))
    before_out = calibration.migration(maxima.out, exact.out[0])
    before_fc1 = calibration.migration(maxima.fc1, exact.fc1[0])
    before_fc2 = calibration.migration(maxima.fc2, exact.fc2[0])
    qk, v = exact.qk[0] * before_qkv, exact.v * before_qkv / before_out[:, None]
    products = {
        "out": exact.out[0] * before_out,
        "fc1": exact.fc1[0] * before_fc1,
        "fc2": exact.fc2[0] * before_fc2,
    }
    if number:
        products["qkv"] = v if number < EXACT else torch.cat([qk, v])
    weights = {
        "norm1": 1 / before_qkv,
        "norm2": 1 / before_fc1,
        "qk.bias": exact.qk[1],
        "out.bias": exact.out[1],
        "fc1.bias": exact.fc1[1],
        "fc2.bias": exact.fc2[1] - GELU_MINIMUM * exact.fc2[0].sum(1),
        "raised.scale": 1 / before_fc2,
        "raised.shift": GELU_MINIMUM / before_fc2,
    }
    if 0 < number < EXACT:
        weights["qk.weight"] = qk
    for name, product in products.items():
        weights[f"{name}.weight"], weights[f"{name}.scales"] = round_weight(product)
    return weights
