"""Which arithmetic to compute in: by what the hardware has, by request, and as far as a comparison with fp32 allows.

int8 is calibrated on the first proteins of the input, and compared with fp32 on those that follow, in one exact pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from distil_rank.embedding.backbone import Backbone
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from distil_rank.embedding.hardware import has_bf16_units, has_int8_units, return_freed_memory
from distil_rank.embedding.int8.calibration import Calibration, CalibrationEncoder
from distil_rank.embedding.storage import Location, is_remote
from distil_rank.embedding.store import open_storage
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.options.embed import EmbedOptions

logger = logging.getLogger(__name__)

MIN_BF16_COSINE = 0.999  # to fp32; below it bf16 is not used
HEAD = 64  # proteins that calibration and comparison may take
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 1024, 256
COMPARED_TOKENS, COMPARED_LENGTH = 2048, 128
CALIBRATION = "calibration.safetensors"  # in the store
NOTES = ("int8_gate", "precision_note")  # entries of a store's manifest
MIN_INT8_COSINE = 0.99
MIN_INT8_NEIGHBOURS = 0.8  # share of the nearest neighbours in fp32 that stay nearest in int8
MAX_NEIGHBOURS = 10


@dataclass(frozen=True)
class PrecisionAgreement:
    """How closely int8 follows fp32 on some proteins."""

    worst_cosine: float  # of the mean-pooled vectors
    neighbours_retained: float | None  # share of the nearest in fp32, by centred cosine; None for too few proteins
    proteins: int

    @property
    def suffices(self) -> bool:
        """Whether int8 may be used; not where a figure is NaN."""
        retained = 1.0 if self.neighbours_retained is None else self.neighbours_retained
        return self.worst_cosine >= MIN_INT8_COSINE and retained >= MIN_INT8_NEIGHBOURS

    def __str__(self) -> str:
        retained = self.neighbours_retained
        share = "" if retained is None else f", {retained:.1%} of the neighbours kept"
        return f"worst cosine {self.worst_cosine:.5f} to fp32{share} ({self.proteins} proteins)"


def agreement(expected: Tensor, rounded: Tensor) -> PrecisionAgreement:
    """Compares pooled vectors, (N, dim) each, row by row and by their neighbours.

    >>> agreement(torch.eye(2), torch.eye(2))
    PrecisionAgreement(worst_cosine=1.0, neighbours_retained=None, proteins=2)
    """
    worst = float(np.min(F.cosine_similarity(expected, rounded).numpy(), initial=1.0))  # NaN where any of them is
    number = min(MAX_NEIGHBOURS, len(expected) // 4)
    if not number:
        return PrecisionAgreement(worst, None, len(expected))

    def neighbours(x: Tensor) -> Tensor:
        centred = F.normalize(x - expected.mean(0))
        return (centred @ centred.T).fill_diagonal_(-torch.inf).topk(number).indices

    same = neighbours(expected)[:, :, None] == neighbours(rounded)[:, None, :]
    return PrecisionAgreement(worst, same.any(2).float().mean().item(), len(expected))


class PrecisionChoice(NamedTuple):
    """The arithmetic of a store: `fp32`, `bf16`, or `int8` with its calibration."""

    precision: str
    calibration: Calibration | None = None
    encoder: FusedEncoder | None = None  # in int8, where it was made for the comparison
    notes: Mapping[str, Any] = {}  # entries of a new store's manifest: the figures, or why int8 is not used


def choose(
    options: EmbedOptions,
    store: StoreWriter,
    device: torch.device,
    backbone: Backbone,
    sequences: Sequence[str],
    layer: int,
    like: Location | None = None,
) -> PrecisionChoice:
    """Decides on the precision of a store; one that has a precision keeps it under `auto` and `auto-int8`.

    Args:
        options: What is asked for: `precision` and `calibration`.
        store: New or not.
        device: Where to compute.
        backbone: The model.
        sequences: The first proteins of the input.
        layer: The last layer to compute.
        like: Store of the same backbone whose calibration and comparison to take over.

    Raises:
        InputError: int8 was asked for by name and is too far from fp32; or the store has it and this device has not.
    """
    requested, stored = options.precision, store.manifest.get("precision")
    if stored and (requested.startswith("auto") or stored == requested):
        return PrecisionChoice(stored, store_calibration(store, device) if stored == "int8" else None)
    if "int8" not in requested:
        return PrecisionChoice(native_precision(device) if requested == "auto" else requested)
    reason = int8_missing(device)
    if reason is None and stored:
        return PrecisionChoice("int8")  # which the store refuses
    if reason is None and like is not None:
        manifest = json.loads(open_storage(like).read_bytes("manifest.json"))  # of embeddings or of codes
        notes = {key: manifest[key] for key in NOTES if key in manifest}
        return PrecisionChoice("int8", read_calibration(like), notes=notes)
    if reason is None:
        ready = None if options.calibration is None else read_calibration(options.calibration)
        calibration, encoder, figures = calibrate(backbone, sequences, layer, ready)
        if requested == "int8" and not figures.suffices:
            raise InputError(
                f"Expected int8 to reach a cosine of {MIN_INT8_COSINE} to fp32 and to keep {MIN_INT8_NEIGHBOURS:.0%} "
                f"of the neighbours but got {figures}; use this backbone in bf16 or fp32."
            )
        if figures.suffices:
            logger.info("computing in int8: %s", figures)
            notes = {"int8_gate": asdict(figures), "precision_note": f"int8: {figures}"}
            return PrecisionChoice("int8", calibration, encoder, notes)
        reason = f"int8 is too far from fp32: {figures}"
    precision = native_precision(device)
    sentence = f"{reason}: going on in {precision}"
    logger.warning(sentence)
    return PrecisionChoice(precision, notes={"precision_note": sentence})


def native_precision(device: torch.device) -> str:
    """`bf16` where the hardware multiplies it natively, otherwise `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if has_bf16_units() else "fp32"


def int8_missing(device: torch.device) -> str | None:
    """Why there is no int8 on this device; None where there is."""
    if device.type != "cpu":
        return "int8 runs on a CPU"
    if not has_int8_units():
        return "this processor has no int8 units (VNNI or AMX)"
    return None if find_spec("numba") else "int8 needs numba (pip install 'distil-rank[int8]')"


def read_calibration(source: Location) -> Calibration:
    """The calibration in a store, or in a file."""
    if not is_remote(source):
        source = Path(source).expanduser()
        if source.is_file():
            return Calibration.load(source)
    with open_storage(source).local_copy(CALIBRATION) as path:
        return Calibration.load(path)


def store_calibration(store: StoreWriter, device: torch.device) -> Calibration:
    """The calibration that a store was made with; `InputError` where it was changed, or the device has no int8."""
    if (reason := int8_missing(device)) is not None:
        raise InputError(
            f"Expected to go on in int8, in which the vectors of {store.path} are, but {reason}; use such a machine, "
            "or another store."
        )
    calibration = read_calibration(store.path)
    if calibration.sha256 != store.manifest["calibration_sha256"]:
        raise InputError(
            f"Expected the calibration that {store.path} was made with but {CALIBRATION} was changed; restore it, or "
            "choose another store."
        )
    return calibration


def int8_encoder(exact: CalibrationEncoder, calibration: Calibration) -> FusedEncoder:
    """The encoder in int8; numba, which it needs, is an extra and takes long to import."""
    from distil_rank.embedding.int8.encoder import Int8Encoder  # noqa: PLC0415

    return Int8Encoder(exact, calibration)


def calibrate(
    backbone: Backbone, sequences: Sequence[str], layer: int, ready: Calibration | None = None
) -> tuple[Calibration, FusedEncoder, PrecisionAgreement]:
    """Calibrates int8 on some of these proteins, unless a calibration is ready, and compares it with fp32 on others."""

    def pooled(encoder: FusedEncoder, hidden: Tensor) -> Tensor:  # means over residues, (compared, dim)
        hidden = encoder.normed(hidden) if encoder.layer == encoder.depth else hidden
        return torch.stack([part[1:-1].mean(0) for part in hidden.split(lengths[len(fitted) :])])

    distinct = list(dict.fromkeys(sequences))
    fitted = list(_fragments(distinct, CALIBRATION_TOKENS, CALIBRATION_LENGTH))
    compared = list(_fragments(distinct[len(fitted) :] or distinct, COMPARED_TOKENS, COMPARED_LENGTH))
    tokens, lengths = tokenise([*fitted, *compared], backbone.alphabet)
    noted = sum(lengths[: len(fitted)])
    exact = CalibrationEncoder(backbone.streamed, layer, noted)
    states = exact.states(tokens, lengths)
    for _ in tqdm(range(layer), desc="calibrate int8", unit="layer", disable=None):
        next(states)
    expected = pooled(exact, next(states)[noted:])
    calibration = ready or exact.calibration()
    encoder = int8_encoder(exact, calibration)
    *_, hidden = encoder.states(tokens[noted:], lengths[len(fitted) :])
    return_freed_memory()
    return calibration, encoder, agreement(expected, pooled(encoder, hidden))


def _fragments(sequences: Sequence[str], tokens: int, length: int) -> Iterator[str]:
    """The beginnings of the first sequences, as many as fit; at least one."""
    for text in sequences:
        yield text[:length]
        tokens -= min(len(text), length) + 2
        if tokens <= 0:
            return
