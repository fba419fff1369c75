"""Students and encoders on disk: plain tensors and a manifest. Loading them takes torch and safetensors, nothing else.

model.safetensors   the weights: of one layer, or of a whole model with student layers in it
manifest.json       shapes, ranks, provenance, R²; the hashes of the file and its own (`distil_rank.artefact`)

For other runtimes there are `to_onnx`, whose file ONNX Runtime's own quantiser (`onnxruntime.quantization`) takes for
integers, and `LowRankLinear.to_linear`.
"""

import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distil_rank.artefact import read_folder, write_atomically, write_folder
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.predictor import Predictor
from distil_rank.options.compression import FORMAT
from distil_rank.tracking.run_store import versions

WEIGHTS = "model.safetensors"
LICENCE = "Derived from the teacher's weights and fitted to the calibration data: the terms of both apply."
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
OPSET = 17  # of ONNX: old enough for any runtime of the last years; nothing newer is needed
TOLERANCE = 1e-4  # of an export's check, relative to the largest output
ENCODER_SHAPE = ("in_features", "rank", "dtype")  # what builds a `CodeEncoder`
SHAPE = ("in_features", "out_features", "rank", "bias", "input_mean")  # what builds a `LowRankLinear`
Student = LowRankLinear | CodeEncoder
# What tensors and descriptions raise that do not belong together, or are no tensors at all
UNFIT = (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Saves a student layer, or a model with student layers in it, with their provenance and measurements.

    Args:
        model: a `LowRankLinear`, a `CodeEncoder`, or a module that contains some, saved with all of its weights; of a
            `Predictor` also what builds it.
        path: a folder; one that was saved there before is replaced.
        metrics: measured figures, JSON values, with their intervals.
        data: what the student was calibrated on: source, digest.
        files: what else belongs into the folder, by name.

    Raises:
        InputError: nothing to save, weights that are not finite, or a place that cannot be written.
    """
    places = model.named_modules(remove_duplicate=False)
    students = {name: module for name, module in places if isinstance(module, Student)}
    if not students and not isinstance(model, Predictor):
        raise InputError(f"Expected a student layer or a model that holds one but got {type(model).__name__} without.")
    first_name: dict[Student, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, student in students.items():
        first = first_name.setdefault(student, name)
        layers[name] = _describe(student) if first == name else {"same_as": first}
    state, first_key = model.state_dict(keep_vars=True), dict[int, str]()
    aliases = {}  # further names of tensors that are shared (tied embeddings)
    for key, value in state.items():
        if first_key.setdefault(id(value), key) != key:
            aliases[key] = first_key[id(value)]
    layout = torch.contiguous_format
    tensors = {key: state[key].detach().cpu().clone(memory_format=layout) for key in first_key.values()}
    _check_finite(tensors, "the model")
    manifest = {
        "format": FORMAT,
        "whole_model": "" not in students,
        "layers": layers,
        "aliases": aliases,
        "metrics": dict(metrics or {}),
        "data": dict(data or {}),
        "licence": LICENCE,
        "versions": versions(),
    }
    if isinstance(model, Predictor):
        manifest["predictor"] = model.description()
    return write_folder(path, manifest, {WEIGHTS: safetensors.torch.save(tensors), **(files or {})})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of what `save` wrote, after every hash was checked."""
    return read_folder(path, FORMAT)[0]


def load(path: str | Path, rank: int | None = None, into: nn.Module | None = None) -> nn.Module:
    """Loads what `save` wrote, bit for bit.

    Args:
        path: the folder.
        rank: of the student wanted, up to the saved one: its first directions are the student of that rank.
        into: for a whole model, one of the same architecture; its dense layers are replaced, every weight is loaded,
            and it is what is returned. A `Predictor` needs none, and keeps its rank.

    Raises:
        InputError: the folder is damaged, hostile, or of a later version, or the rank is above the saved one.

    >>> import tempfile
    >>> layer = LowRankLinear(8, 6, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save(layer, folder), rank=2)
    LowRankLinear(in_features=8, out_features=6, rank=2, bias=True)
    """
    manifest, files = read_folder(path, FORMAT)
    try:
        state = safetensors.torch.load_file(files[WEIGHTS])
        _check_finite(state, str(path))
        state |= {alias: state[name] for alias, name in manifest["aliases"].items()}
        layers, whole = manifest["layers"], manifest["whole_model"]
        own = {name: _empty(description) for name, description in layers.items() if "same_as" not in description}
        top = max((student.rank for student in own.values()), default=0)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= top):
            raise InputError(f"Expected `rank` in [1, {top}], up to that of {path}, but got {rank!r}.")
        students = {name: own[description.get("same_as", name)] for name, description in layers.items()}
        if not whole:
            into, students = own[""], {}
        elif into is None and "predictor" in manifest and rank is None:
            into = Predictor.empty(manifest["predictor"])
        elif into is None:
            raise InputError(f"Expected `into` to load {path}, a whole model; give one of the same architecture.")
        _check_fits(state, into, students)
    except InputError:
        raise
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected tensors in {path} as its manifest has them but they do not fit: {reason}; save it again."
        ) from error
    install(into, students)
    device = next((value.device for value in into.parameters() if not value.is_meta), None)
    into.load_state_dict(state, assign=True)
    into = into.eval() if isinstance(into, Predictor) else into
    into.to(device)
    if rank is None:
        return into
    small = {name: student.truncate(min(rank, student.rank)) for name, student in own.items()}
    if not whole:
        return small[""]
    install(into, {name: small[description.get("same_as", name)] for name, description in layers.items()})
    return into


def install(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules into a model in place of those of the same names."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def _describe(student: Student) -> dict[str, Any]:
    if isinstance(student, CodeEncoder):
        shape = {name: getattr(student, name) for name in ENCODER_SHAPE}
        return {"kind": "encoder", **shape, "provenance": student.provenance}
    dtype = str(student.A.dtype).removeprefix("torch.")
    return {"kind": "low_rank", **student.shape, "dtype": dtype, "provenance": student.provenance}


def _empty(description: Mapping[str, Any]) -> Student:
    """A student of the right shape, without numbers: checked before anything is allocated."""
    kind = description["kind"]
    if kind not in ("low_rank", "encoder") or not isinstance(description["rank"], int):
        raise InputError(f"Expected a layer of kind low_rank or encoder but got {kind!r}; make it again.")
    student: Student
    if kind == "low_rank":
        shape = {key: description[key] for key in SHAPE}
        student = LowRankLinear(**shape, device="meta", dtype=DTYPES[description["dtype"]])
    else:
        student = CodeEncoder(**{key: description[key] for key in ENCODER_SHAPE}, device="meta")
    student.provenance = dict(description["provenance"])
    return student


def _check_fits(state: Mapping[str, Tensor], model: nn.Module, students: Mapping[str, Student]) -> None:
    """Whether a model has the students' places, and tensors are all of its: PyTorch would load those that fit first."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, student in students.items():
        place = (getattr(student, "out_features", student.rank), student.in_features)
        shape = tuple(getattr(modules.get(name), side, None) for side in ("out_features", "in_features"))
        if shape != place:
            actual = shape if name in modules else "missing"
            raise InputError(f"Expected {name!r} of `into` to be {place} but it is {actual}; give the same model.")
    replaced = tuple(f"{name}." for name in students)
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(replaced)}
    for name, student in students.items():
        expected |= student.state_dict(prefix=f"{name}.")
    if wrong := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in expected else 'not expected'}")
    for key, value in expected.items():
        fresh = value.is_meta  # a student's own, whose dtype the manifest tells
        if state[key].shape != value.shape or (fresh and state[key].dtype != value.dtype):
            actual, right = ((tuple(one.shape), one.dtype) for one in (state[key], value))
            raise ValueError(f"{key} is {actual}, not {right}")


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"Expected finite weights in {where} but {name!r} holds NaN or inf.")


def to_onnx(layer: LowRankLinear | nn.Linear, path: str | Path) -> Path:
    """Save a layer as an ONNX graph, `(rows, n)` → `(rows, m)` float32 for any number of rows; ONNX Runtime checks it.

    Half precision is widened to float32.

    Raises:
        InputError: onnx or onnxruntime is not installed, or the file cannot be written.
        RuntimeError: ONNX Runtime does not give what the layer gives.
    """
    try:
        import onnx  # noqa: F401, PLC0415 - torch writes with it
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Expected onnx and onnxruntime but they are missing; pip install onnx onnxruntime.") from error
    plain, graph = copy.deepcopy(layer).cpu().float().eval(), io.BytesIO()
    example, axes = torch.zeros(2, layer.in_features), {"x": {0: "rows"}, "y": {0: "rows"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter in its place needs onnxscript, for no gain
        names: dict[str, Any] = {"f": graph, "input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
        torch.onnx.export(plain, (example,), **names, opset_version=OPSET, dynamo=False)
        session = onnxruntime.InferenceSession(graph.getvalue(), providers=["CPUExecutionProvider"])
        for rows in (1, 7):
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
            output, expected = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), plain(x)
            difference = float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:
                raise RuntimeError(f"The graph differs from the layer by {difference:.2g} of its largest output.")
    write_atomically(path, graph.getvalue())
    return Path(path)
