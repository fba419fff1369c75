"""Students in formats of other runtimes: ONNX, `torch.export`, or one plain dense layer.

For integers, hand the ONNX file to ONNX Runtime's own quantiser (`onnxruntime.quantization`).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear

OPSET = 17  # old enough for any runtime of the last years; nothing newer is needed
TOLERANCE = 1e-4  # of a check, relative to the largest output


def to_dense(model: nn.Module) -> nn.Module:
    """A copy with a plain `nn.Linear`, `W' = B A`, for each student: the same outputs from the original architecture.

    A student always has a bias; where the dense layer had none, the copy's layer still has one.
    """
    if isinstance(model, LowRankLinear):
        return model.to_linear()
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, module.to_linear())
    return model


def to_torch(model: nn.Module, path: str | Path, example: Tensor) -> Path:
    """Save a layer or model as a `torch.export` program for any number of rows; it runs without this package.

    Args:
        model: takes one tensor.
        path: the `.pt2` file.
        example: an input, `(rows, …)`.

    Raises:
        RuntimeError: the program does not give what the model gives.
    """
    path, model = Path(path), copy.deepcopy(model).cpu().eval()
    example = torch.cat([example, example])[: max(2, len(example))].cpu()  # one row would fix the number at one
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        for rows in (example, torch.cat([example] * 3)):
            _check_same(loaded(rows), model(rows), path)
    return path


def to_onnx(layer: LowRankLinear | nn.Linear, path: str | Path) -> Path:
    """Save a layer as an ONNX graph, `(rows, n)` → `(rows, m)` float32 for any number of rows; ONNX Runtime checks it.

    Half precision is widened to float32.

    Raises:
        InputError: onnx or onnxruntime is not installed.
        RuntimeError: ONNX Runtime does not give what the layer gives.
    """
    try:
        import onnx  # noqa: F401, PLC0415 - torch writes with it
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Expected onnx and onnxruntime but they are missing; pip install onnx onnxruntime.") from error
    path, plain = Path(path), copy.deepcopy(layer).cpu().float().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    example, axes = torch.zeros(2, layer.in_features), {"x": {0: "rows"}, "y": {0: "rows"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter in its place needs onnxscript, for no gain
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
        torch.onnx.export(plain, (example,), path, **names, opset_version=OPSET, dynamo=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for rows in (1, 7):
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
            _check_same(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), plain(x), path)
    return path


def _check_same(output: Tensor, expected: Tensor, path: Path) -> None:
    error = float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"The exported {path.name} differs from the layer by {error:.2g} of its largest output.")
