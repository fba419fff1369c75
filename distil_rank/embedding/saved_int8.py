"""A backbone in int8 in a folder: a quarter of the model's size, and loaded without it.

    folder/
      int8.json                 which model's weights (by SHA-256), how closely int8 follows them, the files' hashes
      calibration.safetensors   the activations' ranges that the weights were rounded with
      shared.safetensors        what the encoder has beside its layers
      layer-NN.safetensors      one layer each
      map.safetensors           of a shortened backbone: the map behind its pooling

Files are read whole and checked before they are used; nothing in them is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distil_rank.embedding.agreement import Agreement
from distil_rank.embedding.calibration import Calibration
from distil_rank.embedding.esm2 import Parts
from distil_rank.embedding.int8_weights import Int8Weights
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.shortened import Exit
from distil_rank.embedding.storage import write_atomically
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.solvers import Factors

FORMAT, VERSION = "distil-rank int8 backbone", 1
MANIFEST, CALIBRATION, SHARED, MAP = "int8.json", "calibration.safetensors", "shared.safetensors", "map.safetensors"
LAYER, LAYERS = "layer-{:02d}.safetensors", "layer-*.safetensors"


@dataclass(frozen=True)
class Int8Manifest:
    """What `int8.json` says.

    Attributes:
        backbone: Name of the model, as `load_backbone` takes it.
        weights_sha256: Of the model's weights.
        depth: Layers of the whole model.
        width: Of its hidden states.
        heads: Attention heads.
        eps: Of the norms.
        layers: How many layers are here.
        gate: How closely int8 follows fp32.
        fallback: The warning, where the model stands in for a default that was not available.
        exit: Features, pooling and target of a shortened backbone; None of a whole one.
    """

    backbone: str
    weights_sha256: str
    depth: int
    width: int
    heads: int
    eps: float
    layers: int
    gate: Agreement
    fallback: str | None = None
    exit: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SavedInt8:
    """An int8 backbone's folder, opened.

    Attributes:
        folder: Where it is.
        manifest: What it says.
        files: SHA-256 of each file.
        calibration: Its weights were rounded with.
    """

    folder: Path
    manifest: Int8Manifest
    files: Mapping[str, str]
    calibration: Calibration

    def weights(self, layer: int) -> Int8Weights:
        """The weights up to a layer, each layer's file read and checked when it is asked for.

        Raises:
            InputError: a file is damaged.
        """
        shared, about = _read(self.folder, SHARED, self.files), self.manifest
        try:
            parts = Parts(
                about.heads,
                about.depth,
                about.eps,
                shared["frequencies"],
                shared["embedding"],
                (shared["norm_after.weight"], shared["norm_after.bias"]),
                (shared["first.qk"], shared["first.v"]),
            )
        except KeyError as error:
            raise InputError(
                f"Expected {error} in {self.folder / SHARED} but it is not there; make it again."
            ) from None
        return Int8Weights(parts, _SavedLayers(self, layer), apart=True)

    @property
    def exit(self) -> Exit | None:
        """Where a shortened backbone stops."""
        entry = self.manifest.exit
        if entry is None:
            return None
        try:
            factors = _read(self.folder, MAP, self.files)
            layer = LowRankLinear.from_factors(Factors(factors["A"], factors["B"], factors["bias"]))
            features = tuple(State.parse(feature) for feature in entry["features"])
            return Exit(features, layer.requires_grad_(False), entry["pooling"], entry["target"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"Expected the map of a shortened backbone in {self.folder} but got {error}.") from error


class _SavedLayers(Sequence[Mapping[str, Tensor]]):
    def __init__(self, saved: SavedInt8, layers: int):
        self.saved, self.layers = saved, layers

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, number: Any) -> Any:
        name, width = LAYER.format(number), self.saved.manifest.width
        tensors = _read(self.saved.folder, name, self.saved.files)
        shapes = {"out": (width, width), "fc1": (4 * width, width), "fc2": (width, 4 * width)}
        for product, shape in shapes.items():
            found = tensors.get(f"{product}.weight")
            if found is None or found.dtype != torch.int8 or found.shape != shape:
                got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise InputError(
                    f"Expected int8 weights {shape} for {product} in {self.saved.folder / name} but got {got}."
                )
        return tensors

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return map(self.__getitem__, range(self.layers))


def is_int8(folder: Path) -> bool:
    """Whether a folder holds a backbone in int8."""
    return (folder / MANIFEST).is_file()


def save_int8(
    folder: Path, manifest: Int8Manifest, weights: Int8Weights, calibration: Calibration, exit_: Exit | None
) -> None:
    """Writes a backbone in int8, layer by layer; its manifest comes last, so that what is unfinished is no backbone.

    Args:
        folder: Made if missing.
        manifest: What to write into `int8.json`.
        weights: Up to the last layer that the backbone runs.
        calibration: They were rounded with.
        exit_: Where a shortened backbone stops.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for former in (MANIFEST, MAP, *(path.name for path in folder.glob(LAYERS))):
        (folder / former).unlink(missing_ok=True)
    files: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        write_atomically(folder / name, data)
        files[name] = hashlib.sha256(data).hexdigest()

    parts = weights.parts
    shared = {
        "frequencies": parts.frequencies,
        "embedding": parts.embedding,
        "norm_after.weight": parts.norm_after[0],
        "norm_after.bias": parts.norm_after[1],
        "first.qk": parts.first[0],
        "first.v": parts.first[1],
    }
    write(SHARED, _bytes(shared))
    for number, layer in enumerate(weights.layers):
        write(LAYER.format(number), _bytes(layer))
    write(CALIBRATION, calibration.content())
    if exit_ is not None:
        write(MAP, _bytes(dict(exit_.map.named_parameters())))
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest), "files": files}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")


def open_int8(folder: Path) -> SavedInt8:
    """Opens a folder that `save_int8` wrote.

    Raises:
        InputError: it is of another version, or damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        known = (content["format"], content["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected {MANIFEST} of a backbone in int8 in {folder} but it cannot be read.") from error
    if not known:
        raise InputError(f"Expected {FORMAT} version {VERSION} in {folder} but got another; make it again.")
    try:
        content["gate"] = Agreement(**content["gate"])
        manifest = Int8Manifest(**{key: content[key] for key in Int8Manifest.__dataclass_fields__})
        files = dict(content["files"])
        sizes = (manifest.depth, manifest.width, manifest.heads, manifest.layers)
        if not all(isinstance(size, int) and size > 0 for size in sizes) or manifest.width % manifest.heads:
            raise ValueError(sizes)
        if manifest.layers > manifest.depth:
            raise ValueError(manifest.layers)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected {MANIFEST} of a backbone in int8 in {folder} but its entries are wrong.") from error
    _checked(folder, CALIBRATION, files)
    return SavedInt8(folder, manifest, files, Calibration.load(folder / CALIBRATION))


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})


def _checked(folder: Path, name: str, files: Mapping[str, str]) -> bytes:
    """A file's bytes, which are those that were saved."""
    path = folder / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != files.get(name):
        raise InputError(f"Expected {path} as it was saved but it is missing or changed; make it again.")
    return data


def _read(folder: Path, name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    data = _checked(folder, name, files)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"Expected safetensors in {folder / name} but it holds something else.") from error
