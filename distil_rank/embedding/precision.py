"""Which arithmetic to compute in: by what the hardware has, by request, and as far as a comparison with fp32 allows.

Compared is before a store has anything: int8 is calibrated on the first proteins of the input and compared with fp32 on
those that follow, in one exact pass; bf16, where it was not asked for by name, is compared on the first.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.embedding.backbone import ESM2Backbone
from distil_rank.embedding.esm2 import FusedEncoder, has_bf16_units
from distil_rank.embedding.gpu import GpuEncoder
from distil_rank.embedding.int8.quantisation import Calibration, CalibrationEncoder, has_int8_units
from distil_rank.embedding.model import Backbone, Encoder
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import open_storage
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.options.embed import EmbedOptions

logger = logging.getLogger(__name__)

HEAD = 64  # proteins that calibration and comparison may take
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 1024, 256
COMPARED_TOKENS, COMPARED_LENGTH = 2048, 128
CALIBRATION = "calibration.safetensors"  # in the store
NOTES = ("int8_gate", "precision_note")  # entries of a store's manifest
MIN_BF16_COSINE = 0.999  # to fp32; below it bf16 is not used
MIN_INT8_COSINE = 0.99
MIN_INT8_NEIGHBOURS = 0.8  # share of the nearest neighbours in fp32 that stay nearest in int8
MAX_NEIGHBOURS = 10


@dataclass(frozen=True)
class PrecisionAgreement:
    """How closely rounded arithmetic follows fp32 on some proteins."""

    worst_cosine: float  # of the mean-pooled vectors
    neighbours_retained: float | None  # share of the nearest in fp32, by centred cosine; None for too few proteins
    proteins: int

    def suffices(self, cosine: float, neighbours: float = 0.0) -> bool:
        """Whether the figures are at least these; not where one is NaN."""
        retained = 1.0 if self.neighbours_retained is None else self.neighbours_retained
        return self.worst_cosine >= cosine and retained >= neighbours

    def __str__(self) -> str:
        retained = self.neighbours_retained
        share = "" if retained is None else f", {retained:.1%} of the neighbours retained"
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
    encoder: Encoder | None = None  # where it was made for the comparison
    notes: Mapping[str, Any] = {}  # entries of a new store's manifest: int8's figures, or why another is not used
    bf16: str | None = None  # how it follows fp32, where it was compared


def choose(
    options: EmbedOptions,
    store: StoreWriter,
    device: torch.device,
    backbone: Backbone,
    sequences: Sequence[str],
    layers: Sequence[int],
    as_stored: bool = False,
) -> PrecisionChoice:
    """Decides on the precision of a store; one that has a precision keeps it under `auto` and `auto-int8`.

    Args:
        options: What is asked for: `precision` and `calibration`.
        store: New or not.
        device: Where to compute.
        backbone: The model.
        sequences: The first proteins of the input.
        layers: Whose hidden states are wanted, ascending.
        as_stored: Whether int8 that is too far from fp32 is only warned of, as what is compared with is in int8.

    Raises:
        InputError: int8 was asked for by name and is too far from fp32; or the store has it and this device has not.
    """
    requested, stored = options.precision, store.manifest.get("precision")
    if stored and (requested.startswith("auto") or stored == requested):
        return PrecisionChoice(stored, store_calibration(store, device) if stored == "int8" else None)
    if requested in ("fp32", "bf16"):
        return PrecisionChoice(requested)
    reasons = []
    if requested != "auto":
        rounded = int8_missing(device) or in_int8(options, bool(stored), backbone, sequences, layers[-1], as_stored)
        if isinstance(rounded, PrecisionChoice):
            return rounded
        reasons.append(rounded)
    precision, encoder, compared = native_precision(device), None, None
    if precision == "bf16" and not stored:
        encoder, figures = compare_bf16(backbone, sequences, layers, device)
        if figures.suffices(MIN_BF16_COSINE):
            compared = f"bf16: {figures}"
            logger.info("computing in %s", compared)
        else:
            precision, encoder = "fp32", None
            reasons.append(f"bf16 is too far from fp32: {figures}")
    notes = {"precision_note": f"{'; '.join(reasons)}: going on in {precision}"} if reasons else {}
    for note in notes.values():
        logger.warning(note)
    return PrecisionChoice(precision, None, encoder, notes, compared)


def in_int8(
    options: EmbedOptions, stored: bool, backbone: Backbone, sequences: Sequence[str], layer: int, as_stored: bool
) -> PrecisionChoice | str:
    """int8 as `choose` was asked for it, or why not."""
    if not isinstance(backbone, ESM2Backbone):
        return "int8 is there for ESM-2 alone"
    if stored:
        return PrecisionChoice("int8")  # which the store refuses
    ready = None if options.calibration is None else calibration_of(options.calibration, backbone)
    calibration, encoder, figures = calibrate(backbone, sequences, layer, ready)
    # copies of one protein are each other's neighbours by chance
    suffices = figures.suffices(MIN_INT8_COSINE, 0.0 if as_stored else MIN_INT8_NEIGHBOURS)
    if suffices or as_stored:
        logger.log(logging.INFO if suffices else logging.WARNING, "computing in int8: %s", figures)
        notes = {"int8_gate": asdict(figures), "precision_note": f"int8: {figures}"}
        return PrecisionChoice("int8", calibration, encoder, notes)
    if options.precision == "int8":
        raise InputError(
            f"Expected int8 to reach a cosine of {MIN_INT8_COSINE} to fp32 and to retain {MIN_INT8_NEIGHBOURS:.0%} of "
            f"the neighbours but got {figures}; use this backbone in bf16 or fp32."
        )
    return f"int8 is too far from fp32: {figures}"


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


def read_calibration(store: Location) -> Calibration:
    """The calibration that a store was made with."""
    with open_storage(store).local_copy(CALIBRATION) as path:
        return Calibration.load(path)


def calibration_of(store: Location, backbone: Backbone) -> Calibration:
    """The calibration of another store; `InputError` where its weights are others."""
    calibration, manifest = read_calibration(store), json.loads(open_storage(store).read_bytes("manifest.json"))
    if manifest["weights_sha256"] != backbone.sha256:
        raise InputError(
            f"Expected the calibration of a store of {backbone.name} but {store} is of {manifest['backbone']}; name "
            "another, or leave --calibration out."
        )
    return calibration


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
    backbone: ESM2Backbone, sequences: Sequence[str], layer: int, ready: Calibration | None = None
) -> tuple[Calibration, FusedEncoder, PrecisionAgreement]:
    """Calibrates int8 on some of these proteins, unless a calibration is ready, and compares it with fp32 on others."""
    distinct = list(dict.fromkeys(sequences))
    fitted = list(_fragments(distinct, CALIBRATION_TOKENS, CALIBRATION_LENGTH))
    compared = list(_fragments(distinct[len(fitted) :] or distinct, COMPARED_TOKENS, COMPARED_LENGTH))
    logger.info("calibrating int8 on %s proteins, and comparing it on %s", len(fitted), len(compared))
    exact = CalibrationEncoder(backbone.remapped(), layer, sum(len(text) + 2 for text in fitted))
    expected = pooled(exact, backbone, [*fitted, *compared])[len(fitted) :]
    calibration = ready or exact.calibration()
    encoder = int8_encoder(exact, calibration)
    return calibration, encoder, agreement(expected, pooled(encoder, backbone, compared))


def compare_bf16(
    backbone: Backbone, sequences: Sequence[str], layers: Sequence[int], device: torch.device
) -> tuple[Encoder, PrecisionAgreement]:
    """The encoder in bf16, and how it compares with fp32 on some of these proteins."""
    compared = list(_fragments(list(dict.fromkeys(sequences)), COMPARED_TOKENS, CALIBRATION_LENGTH))
    encoder = backbone.encoder(torch.float32, device, layers)
    expected = pooled(encoder, backbone, compared)
    if isinstance(encoder, GpuEncoder):
        encoder.convert_to(torch.bfloat16)
    else:
        encoder = backbone.encoder(torch.bfloat16, device, layers)
    return encoder, agreement(expected, pooled(encoder, backbone, compared))


def pooled(encoder: Encoder, backbone: Backbone, sequences: list[str]) -> Tensor:
    """Means over residues, (sequences, dim)."""
    tokens, lengths = backbone.tokens.pack(sequences)
    hidden = encoder(tokens, lengths).cpu()
    first, after = len(backbone.tokens.before), len(backbone.tokens.after)
    return torch.stack([part[first : len(part) - after].mean(0) for part in hidden.split(lengths)])


def _fragments(sequences: Sequence[str], tokens: int, length: int) -> Iterator[str]:
    """The beginnings of the first sequences, as many as fit; at least one."""
    for text in sequences:
        yield text[:length]
        tokens -= min(len(text), length) + 2
        if tokens <= 0:
            return
