"""Students and code maps on disk: plain tensors and a manifest. Loading them takes torch and safetensors, nothing else.

model.safetensors   the weights: of one layer, or of a whole model with student layers in it
guard.safetensors   estimates the error on each input, where the students have a guard
manifest.json       shapes, ranks, provenance, R²; the hashes of the files and its own
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.compression.modules import install
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.tracking.provenance import versions

FORMAT = "distil-rank"
VERSION = 1
MANIFEST, WEIGHTS, GUARD = "manifest.json", "model.safetensors", "guard.safetensors"
LICENCE = "Derived from the teacher's weights and fitted to the calibration data: the terms of both apply."
KINDS: dict[str, type[LowRankLinear] | type[Int8LowRankLinear] | type[CodeEncoder]] = {
    "low_rank": LowRankLinear,
    "int8": Int8LowRankLinear,
    "encoder": CodeEncoder,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
DTYPES["float64"] = torch.float64
Student = LowRankLinear | Int8LowRankLinear | CodeEncoder


def save(
    model: nn.Module,
    path: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    licence: str = LICENCE,
) -> Path:
    """Saves a student layer, or a model with student layers in it, with their provenance and measurements.

    Args:
        model: a `LowRankLinear`, an `Int8LowRankLinear`, a `CodeEncoder`, or a module that contains some. A model is saved
            with all of its weights.
        path: a folder; an artefact that is there already is replaced.
        metrics: measured figures, JSON values, with their intervals.
        data: what the student was calibrated on: source, digest.
        licence: a note on what the weights may be used for.

    Returns:
        The folder.

    Raises:
        InputError: nothing to save, weights that are not finite, or a path that is a file.
    """
    path = Path(path)
    everywhere = model.named_modules(remove_duplicate=False)
    students = {name: module for name, module in everywhere if isinstance(module, Student)}
    if not students:
        raise InputError(f"Expected a student layer or a model that holds one but got {type(model).__name__} without.")
    check_writable(path)
    state, aliases = _without_duplicates(model.state_dict())
    _check_finite(state, "the model")
    layers: dict[str, dict[str, Any]] = {}
    for name, student in students.items():
        first = next(key for key, other in students.items() if other is student)
        layers[name] = _describe(student) if first == name else {"same_as": first}
    own = {name: student for name, student in students.items() if "same_as" not in layers[name]}
    guards = _guard_tensors(own)
    files = {name: safetensors.torch.save(tensors) for name, tensors in ((WEIGHTS, state), (GUARD, guards)) if tensors}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "whole_model": "" not in students,
        "layers": layers,
        "aliases": aliases,
        "metrics": dict(metrics or {}),
        "data": dict(data or {}),
        "licence": licence,
        "versions": versions(),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    manifest = _as_json(manifest)
    manifest["sha256"] = _manifest_digest(manifest)
    files[MANIFEST] = (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
    _write(path, files)
    return path


def _guard_tensors(students: Mapping[str, Student]) -> dict[str, Tensor]:
    """The guards of the students that have one."""
    return {
        f"{name}.{part}": getattr(student.guard, part).cpu().contiguous()
        for name, student in students.items()
        if getattr(student, "guard", None) is not None
        for part in ("sketch", "offset")
    }


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files, the manifest last; a failure leaves the artefact that was there, or none, but no mixture."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():  # all are written before any old one is replaced
            (path / f".{name}.new").write_bytes(content)
        (path / MANIFEST).unlink(missing_ok=True)  # while the files change there is no artefact
        (path / GUARD).unlink(missing_ok=True)
        for name in files:
            (path / f".{name}.new").replace(path / name)
    except OSError as error:
        raise InputError(f"Expected to write to {path} but: {error.strerror}; name another place.") from error


def check_writable(path: Path) -> None:
    """Raise `InputError` if nothing can be saved there, before any work is done."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "cannot be written to" if folder.is_dir() else "is a file"
        raise InputError(f"Expected a folder to save to at {path} but {folder} {what}; name another place.")
    if kind := _other_content(path):
        raise InputError(f"Expected a folder to save to at {path} but it holds {kind}; name another place.")


def _other_content(path: Path) -> str | None:
    """What a folder holds that saving an artefact would destroy."""
    if any(path.glob("*.arrow")):
        return "a store of vectors"
    try:
        kind = json.loads((path / MANIFEST).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing, or what is left of an artefact
    return None if kind == FORMAT else f"{kind!r}"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Reads the manifest of an artefact, after its own hash and those of its files were checked.

    Raises:
        InputError: no artefact, one of a later version, or one that was changed or cut short.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        kind, version, files = manifest["format"], manifest["version"], dict(manifest["files"])
        hashes = {name: str(file["sha256"]) for name, file in files.items()}
    except FileNotFoundError as error:
        raise InputError(f"Expected an artefact at {path} but it has no {MANIFEST}; make one with `save`.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"Expected a manifest in {path / MANIFEST} but it cannot be read; save it again.") from error
    if kind != FORMAT or not isinstance(version, int) or version < 1:
        raise InputError(f"Expected a {FORMAT} artefact in {path} but its manifest is of {kind!r} {version!r}.")
    if version > VERSION:
        raise InputError(f"Expected an artefact of version {VERSION} but {path} has {version}; upgrade distil-rank.")
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise InputError(f"Expected {path / MANIFEST} as it was saved but its hash differs; get or save it again.")
    if WEIGHTS not in hashes or not hashes.keys() <= {WEIGHTS, GUARD}:
        raise InputError(f"Expected {WEIGHTS} in the artefact {path} but it lists {', '.join(hashes) or 'nothing'}.")
    for name, digest in hashes.items():
        if not (path / name).is_file():
            raise InputError(f"Expected {name} in the artefact {path} but it is missing; get or save it again.")
        if _file_digest(path / name) != digest:
            raise InputError(f"Expected {path / name} as it was saved but its hash differs; get or save it again.")
    return manifest


def load(path: str | Path, rank: int | None = None, into: nn.Module | None = None) -> nn.Module:
    """Loads what `save` wrote, bit for bit.

    Args:
        path: the folder.
        rank: of the student wanted, up to the saved one: its first directions are the student of that rank.
        into: for a whole model, one of the same architecture with its dense layers; they are replaced and every weight
            is loaded. For a single layer nothing is needed.

    Returns:
        The layer, or `into`.

    Raises:
        InputError: the artefact is damaged, hostile, or of a later version, or the rank is above the saved one.

    >>> import tempfile
    >>> layer = LowRankLinear(8, 6, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save(layer, folder), rank=2)
    LowRankLinear(in_features=8, out_features=6, rank=2, bias=True)
    """
    path = Path(path)
    manifest = read_manifest(path)
    state = _tensors(path / WEIGHTS)
    try:
        state |= {alias: state[name] for alias, name in manifest["aliases"].items()}
        layers = manifest["layers"]
        own = {name: _empty(description) for name, description in layers.items() if "same_as" not in description}
        students = {name: own[description.get("same_as", name)] for name, description in layers.items()}
        _check_rank(rank, own, path)
        if GUARD in manifest["files"]:
            _attach_guards(own, layers, _tensors(path / GUARD))
        if not manifest["whole_model"]:
            model: nn.Module = own[""]
            _assign(model, state)
        else:
            dense = _dense_layers(into, students, path)
            assert into is not None
            model = into
            install(model, students)
            try:
                _assign(model, state)
            except BaseException:
                install(model, dense)
                raise
    except InputError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected tensors in {path} as its manifest has them but they do not fit: {reason}"
        ) from error
    if rank is None:
        return model
    small = {name: student.truncate(min(rank, student.rank)) for name, student in own.items()}
    if "" in small:
        return small[""]
    install(model, {name: small[description.get("same_as", name)] for name, description in layers.items()})
    return model


def _check_rank(rank: Any, students: Mapping[str, Student], path: Path) -> None:
    top = max(student.rank for student in students.values())
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= top):
        raise InputError(f"Expected `rank` in [1, {top}], up to that of {path}, but got {rank!r}.")


def _assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads every tensor, or changes nothing: PyTorch itself would load those that fit before it complains."""
    wanted = model.state_dict()
    if wrong := sorted(wanted.keys() ^ state.keys()):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in wanted else 'not expected'}")
    for name, value in wanted.items():
        fresh = value.is_meta  # a student's own, whose dtype the manifest tells
        if state[name].shape != value.shape or (fresh and state[name].dtype != value.dtype):
            actual, expected = ((tuple(one.shape), one.dtype) for one in (state[name], value))
            raise ValueError(f"{name} is {actual}, not {expected}")
    device = next((value.device for value in model.parameters() if not value.is_meta), None)
    model.load_state_dict(state, assign=True)
    model.to(device)


def _describe(student: Student) -> dict[str, Any]:
    guard = None if getattr(student, "guard", None) is None else _describe_guard(student.guard)
    if isinstance(student, CodeEncoder):
        return {"kind": "encoder", **student.options, "guard": guard, "provenance": student.provenance}
    kind = next(name for name, cls in KINDS.items() if isinstance(student, cls))
    m, n = student.out_features, student.in_features
    has_mean = (student.input_mean if isinstance(student, LowRankLinear) else student.kept_mean) is not None
    return {
        "kind": kind,
        "in_features": n,
        "out_features": m,
        "rank": student.rank,
        "bias": student.bias is not None,
        "input_mean": has_mean,
        "dtype": str(student.A.dtype).removeprefix("torch."),
        "parameters": parameter_count(n, m, student.rank, student.bias is not None),
        "dense_parameters": parameter_count(n, m, None, student.bias is not None),
        "guard": guard,
        "provenance": student.provenance,
    }


def _describe_guard(guard: Guard) -> dict[str, Any]:
    return {"scale": guard.scale, "threshold": guard.threshold, "thresholds": list(guard.thresholds)}


def _empty(description: Mapping[str, Any]) -> Student:
    """A student of the right shape, without numbers: checked before anything is allocated."""
    if description["kind"] not in KINDS or not isinstance(description["rank"], int):
        raise InputError(
            f"Expected a layer of {', '.join(KINDS)} but got {description['kind']!r}; upgrade distil-rank."
        )
    student: Student
    if description["kind"] == "encoder":
        keys: tuple[str, ...] = ("in_features", "rank", "dtype")
    else:
        keys = ("in_features", "out_features", "rank", "bias", "input_mean")
    options = {key: description[key] for key in keys} | {"device": "meta"}
    if description["kind"] == "encoder":
        student = CodeEncoder(**options)
    elif description["kind"] == "int8":
        student = Int8LowRankLinear(**options)
    else:
        student = LowRankLinear(**options, dtype=DTYPES[description["dtype"]])
    student.provenance = dict(description["provenance"])
    return student


def _dense_layers(into: nn.Module | None, students: Mapping[str, Student], path: Path) -> dict[str, nn.Module]:
    """The dense layers of the model that the students replace."""
    if into is None:
        raise InputError(
            f"Expected `into`, a model to load {path} into, since it is a whole model with students at "
            f"{', '.join(students)}; give one of the same architecture."
        )
    layers = {}
    for name, student in students.items():
        try:
            layers[name] = old = into.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"Expected a layer {name!r} in `into` but it has none; give the same model.") from error
        shape = getattr(old, "out_features", None), getattr(old, "in_features", None)
        if shape != (student.out_features, student.in_features):
            expected = (student.out_features, student.in_features)
            raise InputError(f"Expected {name!r} of `into` to be {expected} but it is {shape}; give the same model.")
    return layers


def _attach_guards(students: Mapping[str, Student], layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, student in students.items():
        if (saved := layers[name]["guard"]) is not None:
            # Until 0.1.0 there was one threshold, of the saved rank.
            thresholds = saved.get("thresholds", [one for one in [saved.get("threshold")] if one is not None])
            fits = len(thresholds) <= student.rank and all(threshold >= 0 for threshold in thresholds)
            if not saved["scale"] > 0 or not fits:
                raise InputError(f"Expected a guard of positive scale and thresholds for {name!r} but got {saved}.")
            guard = Guard(tensors[f"{name}.sketch"], tensors[f"{name}.offset"], saved["scale"], thresholds)
            if guard.sketch.shape != (len(guard.offset), student.in_features):
                raise InputError(f"Expected a guard of width {student.in_features} for {name!r} in {GUARD}.")
            student.guard = guard


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"Expected safetensors in {path} but it is something else or damaged; get it again."
        ) from error
    _check_finite(state, str(path))
    return state


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"Expected finite weights in {where} but {name!r} holds NaN or inf.")


def _without_duplicates(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and the further names of those that are shared (tied embeddings)."""
    retained: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            retained[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return retained, aliases


def _as_json(value: Any) -> Any:
    """A JSON value; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value  # of numpy and torch
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(f"Expected JSON values to save beside the weights but got a {type(value).__name__}.")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
