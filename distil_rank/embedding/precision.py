"""Which arithmetic to compute in: what the hardware has, what was asked for, and what a comparison with fp32 allows.

int8 is calibrated on the first proteins of the input, and compared with fp32 on those that follow. Both come out of
one exact pass, in which no more than one layer is held in float32 at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from distil_rank.embedding.agreement import Agreement, agreement
from distil_rank.embedding.backbone import Backbone
from distil_rank.embedding.calibration import Calibration, CalibrationEncoder
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from distil_rank.embedding.freed_memory import return_freed_memory
from distil_rank.embedding.int8_weights import Int8Weights, round_weights
from distil_rank.embedding.location import is_remote, open_storage
from distil_rank.embedding.processor import has_bf16_units, has_int8_units
from distil_rank.embedding.saved_int8 import SavedInt8
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "int8", "auto-int8"]
INT8 = ("int8", "auto-int8")
MIN_BF16_COSINE = 0.999  # to fp32; below it bf16 is not used
HEAD = 64  # proteins that calibration and comparison may take
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 1024, 256
COMPARED_TOKENS, COMPARED_LENGTH = 2048, 128
CALIBRATION = "calibration.safetensors"  # in the store
NOTES = ("int8_gate", "precision_note")  # entries of a store's manifest


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
    encoder: FusedEncoder | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def choose(
    requested: Precision,
    store: StoreWriter,
    device: torch.device,
    backbone: Backbone,
    sequences: Sequence[str],
    layer: int,
    calibration: str | Path | None = None,
    like: Location | None = None,
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
        like: Store of the same backbone whose calibration and comparison to take over.

    Raises:
        InputError: int8 was asked for by name and does not follow fp32 closely enough; or the store is in int8, which
            this device does not have.
    """
    if backbone.int8 is not None:
        return _saved(backbone, backbone.int8, requested, device, calibration)
    stored = store.manifest.get("precision")
    if stored and (requested.startswith("auto") or stored == requested):
        if stored == "int8":
            _check_int8(device, store.path)
        return Choice(stored, store_calibration(store) if stored == "int8" else None)
    if requested not in INT8:
        return Choice(native_precision(device) if requested == "auto" else requested)
    reason = int8_missing(device)
    if reason is None:
        found = Choice("int8") if stored else _calibrated(requested, backbone, sequences, layer, calibration, like)
        if isinstance(found, Choice):
            return found  # the store refuses int8 where it has another precision
        reason = found
    precision = native_precision(device)
    sentence = f"{reason}: going on in {precision}"
    logger.warning(sentence)
    return Choice(precision, notes={"precision_note": sentence})


def _calibrated(
    requested: Precision,
    backbone: Backbone,
    sequences: Sequence[str],
    layer: int,
    calibration: str | Path | None,
    like: Location | None,
) -> Choice | str:
    """int8, with what is known of it; or, where it may not be used but another precision may, why."""
    if like is not None:
        taken = read_calibration(like)  # of a store of embeddings or of codes, which was opened before
        manifest = json.loads(open_storage(like).read_bytes("manifest.json"))
        return Choice("int8", taken, notes={key: manifest[key] for key in NOTES if key in manifest})
    given = None if calibration is None else read_calibration(calibration)
    fitted, encoder, figures = calibrate(backbone, sequences, layer, given)
    if requested == "int8":
        figures.check()
    if not figures.suffices:
        return f"int8 is too far from fp32: {figures}"
    logger.info("computing in int8: %s", figures)
    return Choice("int8", fitted, encoder, {"int8_gate": asdict(figures), "precision_note": f"int8: {figures}"})


def _saved(
    backbone: Backbone,
    saved: SavedInt8,
    requested: Precision,
    device: torch.device,
    calibration: str | Path | None,
) -> Choice:
    """The choice of a backbone that was saved in int8, which is int8."""
    _check_saved(backbone, saved, requested, device)
    if calibration is not None and read_calibration(calibration).sha256 != saved.calibration.sha256:
        raise InputError(
            f"Expected no other calibration than that of {backbone.name}, whose weights were rounded with it, but got "
            f"{calibration}; leave --calibration out."
        )
    figures = saved.manifest.gate
    return Choice("int8", saved.calibration, notes={"int8_gate": asdict(figures), "precision_note": f"int8: {figures}"})


def _check_saved(backbone: Backbone, saved: SavedInt8, requested: str, device: torch.device) -> None:
    """Raises `InputError` where a backbone that was saved in int8 cannot be used as is asked for."""
    whole = f"name the model that it was made of, {saved.manifest.backbone}"
    if requested not in ("auto", *INT8):
        raise InputError(
            f"Expected --precision int8 or auto for {backbone.name}, saved in int8, but got {requested}; {whole}."
        )
    if (reason := int8_missing(device)) is not None:
        raise InputError(f"Expected int8 units for {backbone.name}, which was saved in int8, but {reason}; {whole}.")


def saved_encoder(backbone: Backbone, requested: str, device: torch.device, layer: int) -> FusedEncoder | None:
    """The encoder up to a layer of a backbone that was saved in int8; None for one that has its exact weights.

    Raises:
        InputError: it cannot be used here, or with this precision; or int8 is asked for but was not saved.
    """
    if backbone.int8 is not None:
        _check_saved(backbone, backbone.int8, requested, device)
        return _rounded(backbone.int8.weights(layer))
    if requested in INT8:
        raise InputError(f"Expected a backbone that was saved in int8 but got {backbone.name}; make one with quantise.")
    return None


def _check_int8(device: torch.device, store: Location) -> None:
    """Raises `InputError` where a store in int8 cannot be continued on this device."""
    if (reason := int8_missing(device)) is not None:
        raise InputError(
            f"Expected to go on in int8, in which the vectors of {store} are, but {reason}; use such a machine, or "
            "another store."
        )


def int8_encoder(backbone: Backbone, store: StoreWriter, device: torch.device, layer: int) -> FusedEncoder:
    """The encoder of a store's calibration, from weights that were saved in int8 or from the exact ones.

    Raises:
        InputError: there is no int8 on this device, or the store's calibration was changed.
    """
    _check_int8(device, store.path)
    calibration = store_calibration(store)
    if backbone.int8 is not None:
        return _rounded(backbone.int8.weights(layer))
    return _rounded(round_weights(CalibrationEncoder(backbone.streamed, layer), calibration))


def _rounded(weights: Int8Weights) -> FusedEncoder:
    """The encoder with these weights; numba, which it needs, is an extra and takes long to import."""
    if find_spec("numba") is None:
        raise InputError("Expected numba for int8 but it is missing; pip install 'distil-rank[int8]'.")
    from distil_rank.embedding.int8_encoder import Int8Encoder  # noqa: PLC0415

    return Int8Encoder(weights)


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
    return "bf16" if has_bf16_units() else "fp32"


def int8_missing(device: torch.device) -> str | None:
    """Why there is no int8 on this device; None where there is."""
    if device.type != "cpu":
        return "int8 runs on a CPU"
    if not has_int8_units():
        return "this processor has no int8 units (VNNI or AMX)"
    return None if find_spec("numba") else "int8 needs numba (pip install 'distil-rank[int8]')"


def calibrate(
    backbone: Backbone, sequences: Sequence[str], layer: int, stored: Calibration | None = None
) -> tuple[Calibration, FusedEncoder, Agreement]:
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
    exact = CalibrationEncoder(backbone.streamed, layer, noted)
    states = exact.states(tokens, lengths)
    for _ in tqdm(range(layer), desc="calibrate int8", unit="layer", disable=None):
        next(states)
    expected = _pooled(exact, next(states)[noted:], lengths[len(fitted) :])
    calibration = stored or exact.calibration()
    encoder = _rounded(round_weights(exact, calibration))
    *_, hidden = encoder.states(tokens[noted:], lengths[len(fitted) :])
    return_freed_memory()
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
