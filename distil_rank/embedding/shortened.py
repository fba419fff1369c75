"""A backbone that stops early: which layers it keeps, and the affine map that follows the pooling.

    folder/
      backbone.json           which model's weights (by SHA-256), which of its states are pooled, the hashes of the rest
      model.safetensors       the map's factors, as `distil_rank.load` reads them
      backbone.safetensors    the kept layers' weights, where they were to be copied
      tuned.safetensors       weights that replace some of the kept layers', where these were fine-tuned

The map is affine, so it commutes with pooling: it is applied once to each pooled vector, and holds for residues too.
Where the BOS token is pooled, it may go on alone through further layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.storage import sha256_of, write_atomically
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.solvers import Factors

FORMAT, VERSION = "distil-rank shortened backbone", 1
MANIFEST, MAP, WEIGHTS, TUNED = "backbone.json", "model.safetensors", "backbone.safetensors", "tuned.safetensors"
POOLED_ALIKE = {
    "mean": ("mean", "residue"),
    "bos": ("bos",),
}  # what a map that was fitted to a pooling may be used with


@dataclass(frozen=True)
class Exit:
    """Where a backbone stops, and what follows.

    Attributes:
        features: The states that are pooled and concatenated, ascending; the last one's layer is the last that runs.
        map: From them to the target.
        pooling: What the map was fitted to.
        target: What the map estimates, in words.
        bos_only_after: The layer behind which only the BOS token goes on; None where all tokens run every kept layer.
    """

    features: tuple[State, ...]
    map: LowRankLinear
    pooling: str
    target: str
    bos_only_after: int | None = None

    @property
    def layer(self) -> int:
        """The last layer that runs."""
        return self.features[-1].layer


@dataclass(frozen=True)
class ShortenedManifest:
    """What `backbone.json` says.

    Attributes:
        backbone: Name of the whole model, as `load_backbone` takes it.
        weights_sha256: Of the whole model's weights.
        depth: Layers of the whole model.
        features: See `Exit`.
        pooling: See `Exit`.
        target: See `Exit`.
        fallback: The warning, where the whole model stands in for a default that was not available.
        architecture: `heads` and `token_dropout` of the model.
        bos_only_after: See `Exit`.
    """

    backbone: str
    weights_sha256: str
    depth: int
    features: tuple[State, ...]
    pooling: str
    target: str
    fallback: str | None
    architecture: Mapping[str, Any]
    bos_only_after: int | None = None


def write_shortened(
    folder: Path,
    manifest: ShortenedManifest,
    weights: Mapping[str, Tensor] | None = None,
    tuned: Mapping[str, Tensor] | None = None,
) -> None:
    """Makes a folder that holds a map's artefact a shortened backbone.

    Args:
        folder: With `model.safetensors`.
        manifest: What to write.
        weights: Of the kept layers, to be copied.
        tuned: What replaces some of the kept layers' weights.
    """
    for name, tensors in ((WEIGHTS, weights), (TUNED, tuned)):
        (folder / name).unlink(missing_ok=True)
        if tensors is not None:
            write_atomically(folder / name, save({key: value.contiguous().clone() for key, value in tensors.items()}))
    files = {name: sha256_of(folder / name) for name in (MAP, WEIGHTS, TUNED) if (folder / name).exists()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        **{key: value for key, value in vars(manifest).items() if key != "features"},
        "features": [state.entry for state in manifest.features],
        "files": files,
    }
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")


def is_shortened(folder: Path) -> bool:
    """Whether a folder holds a shortened backbone."""
    return (folder / MANIFEST).is_file()


def read_shortened(folder: Path) -> tuple[ShortenedManifest, Exit, dict[str, Tensor] | None, dict[str, Tensor], str]:
    """Reads a shortened backbone after checking its files' hashes.

    Returns:
        The manifest, the exit, the kept layers' weights if they were copied, the tuned weights, and a digest of all.

    Raises:
        InputError: it is damaged, or of a later version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise InputError(f"Expected {FORMAT} version {VERSION} in {folder} but got another; make it again.")
        files = dict(content.pop("files"))
        features = tuple(State.parse(entry) for entry in content["features"])
        content.setdefault("bos_only_after", None)
        fields = {key: content[key] for key in ShortenedManifest.__dataclass_fields__ if key != "features"}
        manifest = ShortenedManifest(features=features, **fields)
        alone = manifest.bos_only_after
        if alone is not None and (manifest.pooling != "bos" or not 0 < alone < features[-1].layer):
            raise ValueError(alone)
        if list(features) != sorted(set(features)) or not features or not 0 < features[-1].layer <= manifest.depth:
            raise ValueError(features)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Expected {MANIFEST} of a shortened backbone in {folder} but it cannot be read.") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in files.keys() & {MAP, WEIGHTS, TUNED}:
        if not (folder / name).is_file() or sha256_of(folder / name) != files[name]:
            raise InputError(f"Expected {folder / name} as it was saved but it is missing or changed; make it again.")
        tensors[name] = _tensors(folder / name)
    try:
        factors = tensors[MAP]
        layer = LowRankLinear.from_factors(Factors(factors["A"], factors["B"], factors["bias"]))
    except (KeyError, RuntimeError, IndexError) as error:
        raise InputError(f"Expected the factors of a map in {folder / MAP} but they are not there.") from error
    identity = [manifest.weights_sha256, content["features"], files, *([alone] if alone else [])]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    exit_ = Exit(features, layer.requires_grad_(False), manifest.pooling, manifest.target, alone)
    return manifest, exit_, tensors.get(WEIGHTS), tensors.get(TUNED, {}), digest.hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"Expected safetensors in {path} but it is damaged; make it again.") from error
    if broken := next((key for key, value in state.items() if not value.isfinite().all()), None):
        raise InputError(f"Expected finite weights in {path} but {broken} holds NaN or inf.")
    return state
