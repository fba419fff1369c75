"""Which arithmetic to compute in: what the hardware has, what was asked for, and what a comparison with fp32 allows.

int8 is calibrated on the first proteins of the input, and compared with fp32 on those that follow. Both come out of
one exact pass, in which no more than one layer is held in float32 at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from distil_rank.embedding.backbones import Backbone
from distil_rank.embedding.calibration import Calibration, CalibrationEncoder
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from distil_rank.embedding.int8_encoder import Int8Encoder
from distil_rank.embedding.int8_linear import has_int8_units
from distil_rank.embedding.location import is_remote, open_storage
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "int8", "auto-int8"]
INT8 = ("int8", "auto-int8")
MIN_BF16_COSINE = 0.999  # to fp32; below it bf16 is not used
MIN_INT8_COSINE = 0.99
MIN_INT8_NEIGHBOURS = 0.8  # share of the nearest neighbours in fp32 that stay nearest in int8
HEAD = 64  # proteins that calibration and comparison may take
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 1024, 256
COMPARED_TOKENS, COMPARED_LENGTH = 2048, 128
MAX_NEIGHBOURS = 10
CALIBRATION = "calibration.safetensors"  # in the store


@dataclass(frozen=True)
class Agreement:
    """How closely int8 follows fp32 on some proteins.

    Attributes:
        worst_cosine: Of the mean-pooled vectors, before and after.
        neighbours_kept: Share of each protein's nearest neighbours in fp32 that it has in int8, by centred cosine; None
            where there are too few proteins.
        proteins: Their number.
    """

    worst_cosine: float
    neighbours_kept: float | None
    proteins: int

    @property
    def suffices(self) -> bool:
        """Whether int8 may be used; not where a figure is NaN."""
        kept = 1.0 if self.neighbours_kept is None else self.neighbours_kept
        return self.worst_cosine >= MIN_INT8_COSINE and kept >= MIN_INT8_NEIGHBOURS

    def __str__(self) -> str:
        kept = "" if self.neighbours_kept is None else f", {self.neighbours_kept:.1%} of the neighbours kept"
        return f"worst cosine {self.worst_cosine:.5f} to fp32{kept} ({self.proteins} proteins)"


@dataclass(frozen=True)
class Choice:
    """The arithmetic of a store.

    Attributes:
        precision: `fp32`, `bf16` or `int8`.
        calibration: Of int8.
        encoder: In int8, where it was made for the comparison.
        notes: Entries of a new store's manifest: the comparison's figures, or why int8 is not used though asked for.
    """

    precision: str
    calibration: Calibration | None = None
    encoder: Int8Encoder | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def choose(
    requested: Precision,
    store: StoreWriter,
    device: torch.device,
    backbone: Backbone,
    sequences: Sequence[str],
    layer: int,
    calibration: str | Path | None = None,
) -> Choice:
    """Decides on the precision of a store, new or not.

    Args:
        requested: By the user.
        store: To be filled; one that has a precision keeps it under `auto` and `auto-int8`.
        device: Where to compute.
        backbone: The model.
        sequences: The first proteins of the input.
        layer: The last layer to compute.
        calibration: Store or file whose calibration to use; by default that of the first proteins.

    Raises:
        InputError: int8 was asked for by name and does not follow fp32 closely enough.
    """
    stored = store.manifest.get("precision")
    if stored and (requested.startswith("auto") or stored == requested):
        return Choice(stored, store_calibration(store) if stored == "int8" else None)
    if requested not in INT8:
        return Choice(native_precision(device) if requested == "auto" else requested)
    reason = int8_missing(device)
    if reason is None and stored:
        return Choice("int8")  # which the store refuses
    if reason is None:
        given = None if calibration is None else read_calibration(calibration)
        fitted, encoder, figures = calibrate(backbone, sequences, layer, given)
        if figures.suffices:
            logger.info("computing in int8: %s", figures)
            notes = {"int8_gate": asdict(figures), "precision_note": f"int8: {figures}"}
            return Choice("int8", fitted, encoder, notes)
        if requested == "int8":
            raise InputError(
                f"Expected int8 to reach a cosine of {MIN_INT8_COSINE} to fp32 and to keep {MIN_INT8_NEIGHBOURS:.0%} "
                f"of the neighbours but got {figures}; use --precision auto."
            )
        reason = f"int8 is too far from fp32: {figures}"
    precision = native_precision(device)
    sentence = f"{reason}: going on in {precision}"
    logger.warning(sentence)
    return Choice(precision, notes={"precision_note": sentence})


def read_calibration(source: Location) -> Calibration:
    """The calibration in a store, or in a file."""
    if not is_remote(source):
        source = Path(source).expanduser()
        if source.is_file():
            return Calibration.load(source)
    with open_storage(source).local_copy(CALIBRATION) as path:
        return Calibration.load(path)


def store_calibration(store: StoreWriter) -> Calibration:
    """The calibration that a store was made with.

    Raises:
        InputError: it is missing, or was changed.
    """
    calibration = read_calibration(store.path)
    if calibration.sha256 != store.manifest["calibration_sha256"]:
        raise InputError(
            f"Expected the calibration that {store.path} was made with but {CALIBRATION} was changed; restore it, or "
            "choose another store."
        )
    return calibration


def native_precision(device: torch.device) -> str:
    """`bf16` where the hardware multiplies it natively, otherwise `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def int8_missing(device: torch.device) -> str | None:
    """Why there is no int8 on this device; None where there is."""
    if device.type != "cpu":
        return "int8 runs on a CPU"
    return None if has_int8_units() else "this processor has no int8 units (VNNI or AMX)"


def calibrate(
    backbone: Backbone, sequences: Sequence[str], layer: int, stored: Calibration | None = None
) -> tuple[Calibration, Int8Encoder, Agreement]:
    """Calibrates int8 on some proteins and compares it with fp32 on others.

    Args:
        backbone: The model.
        sequences: The first proteins of the input.
        layer: The last layer to compute.
        stored: A calibration to use instead of a new one.

    Returns:
        The calibration, the encoder, and how closely it follows fp32.
    """
    distinct = list(dict.fromkeys(sequences))
    fitted = list(_fragments(distinct, CALIBRATION_TOKENS, CALIBRATION_LENGTH))
    compared = list(_fragments(distinct[len(fitted) :] or distinct, COMPARED_TOKENS, COMPARED_LENGTH))
    tokens, lengths = tokenise([*fitted, *compared], backbone.alphabet)
    noted = sum(lengths[: len(fitted)])
    exact = CalibrationEncoder(backbone.model, layer, noted)
    states = exact.states(tokens, lengths)
    for _ in tqdm(range(layer), desc="calibrate int8", unit="layer", disable=None):
        next(states)
    expected = _pooled(exact, next(states)[noted:], lengths[len(fitted) :])
    calibration = stored or exact.calibration()
    encoder = Int8Encoder(backbone.model, calibration, layer)
    *_, hidden = encoder.states(tokens[noted:], lengths[len(fitted) :])
    return calibration, encoder, agreement(expected, _pooled(encoder, hidden, lengths[len(fitted) :]))


def _fragments(sequences: Sequence[str], tokens: int, length: int) -> Iterator[str]:
    """The beginnings of the first sequences, as many as fit; at least one."""
    for text in sequences:
        yield text[:length]
        tokens -= min(len(text), length) + 2
        if tokens <= 0:
            return


def _pooled(encoder: FusedEncoder, hidden: Tensor, lengths: list[int]) -> Tensor:
    """Means over residues, after the final norm if this is the last layer, (sequences, dim)."""
    hidden = encoder.normed(hidden) if encoder.layer == encoder.depth else hidden
    return torch.stack([part[1:-1].mean(0) for part in hidden.split(lengths)])


def agreement(expected: Tensor, found: Tensor) -> Agreement:
    """Compares pooled vectors, (N, dim) each, row by row and by their neighbours.

    >>> agreement(torch.eye(2), torch.eye(2))
    Agreement(worst_cosine=1.0, neighbours_kept=None, proteins=2)
    """
    worst = float(np.min(F.cosine_similarity(expected, found).numpy(), initial=1.0))  # NaN where any of them is
    number = min(MAX_NEIGHBOURS, len(expected) // 4)
    if not number:
        return Agreement(worst, None, len(expected))

    def neighbours(x: Tensor) -> Tensor:
        centred = F.normalize(x - expected.mean(0))
        return (centred @ centred.T).fill_diagonal_(-torch.inf).topk(number).indices

    same = neighbours(expected)[:, :, None] == neighbours(found)[:, None, :]
    return Agreement(worst, same.any(2).float().mean().item(), len(expected))
