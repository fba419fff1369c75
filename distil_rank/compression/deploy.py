"""A layer of the user's own, from a file to a folder that deploys, and from there to other runtimes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from distil_rank.compression.artefact import check_writable, load, save
from distil_rank.compression.compress import compress
from distil_rank.compression.export import to_dense, to_int8, to_onnx, to_torch
from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.compression.own_layer import load_head, load_linear
from distil_rank.compression.replacement import timed_row
from distil_rank.compression.report import Report
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure.metrics import residual
from distil_rank.measure.statistics import estimate, group_sums, ratio, resample_counts
from distil_rank.training.losses import Outputs

BATCH = 256  # rows at once
BATCHES = 20  # at least, so that fine-tuning has some to check on, also with few rows


def compress_file(
    data: EmbeddingDataModule,
    model: str,
    layer: str | None = None,
    rank: int | float | str = 0.99,
    head: str | None = None,
    tune: int = 0,
    outputs: Outputs = "classification",
    int8: bool = False,
    output: str = "compressed",
) -> tuple[Report, Path]:
    """Compress one layer of a saved model into a folder that deploys; returns the report and that folder.

    Args:
        data: The layer's inputs.
        model: A `.safetensors` or PyTorch file with a state dict, or a Hugging Face directory.
        layer: Its name in there, like `classifier.dense`; not needed where there is just one.
        rank: An integer, a share of the layer's output variance to keep (0.99), or `auto`.
        head: What stands behind the layer: steps like `tanh,head.safetensors:classifier.out_proj`.
        tune: Steps to fine-tune against what the head puts out; 1500 is a good number.
        outputs: Whether the head puts out logits of classes (one column: of yes against no) or values.
        int8: Keep the factors in int8, if that costs at most 0.001 of R².
        output: The folder.

    Raises:
        InputError: the layer or the data cannot be used together, or a low rank would save nothing.
    """
    check_writable(Path(output))
    dense = load_linear(model if layer is None else f"{model}:{layer}")
    data.prepare_data()
    data.setup()
    if data.dim != dense.in_features:
        raise InputError(
            f"Expected inputs of width {dense.in_features} for this layer but the data have {data.dim}; embed with"
            " the model that the layer belongs to."
        )
    fit = torch.cat([data.rows("train"), data.rows("val")]).to(dense.weight)
    held_out = data.rows("test").to(dense.weight)
    steps = {"layer": dense, "head": nn.Identity() if head is None else load_head(head).to(dense.weight.dtype)}
    report = compress(
        nn.Sequential(OrderedDict(steps)),
        {"layer": rank},
        fit.split(max(1, min(BATCH, len(fit) // BATCHES))),
        held_out=held_out.split(BATCH),
        tune=tune,
        outputs="regression" if head is None else outputs,
    )
    student = report.model.get_submodule("layer")
    if not isinstance(student, LowRankLinear):
        raise InputError(f"Expected a rank that saves something but {report.layers[0].note}; ask for a lower one.")
    final = to_int8(student, dense, Moments.of(held_out)) if int8 else student
    r2 = _held_out_r2(dense, final, held_out, data.proteins("test"), fit)
    row = replace(report.layers[0], name=layer or Path(model).stem)
    if int8:
        row = timed_row(replace(row, held_out_r2=r2["value"]), dense, final)
    report = replace(report, layers=[row])
    return report, save(final, output, metrics={"held_out_r2": r2, **report.to_dict()}, data=asdict(data.description()))


@torch.no_grad()
def _held_out_r2(
    dense: nn.Linear, student: nn.Module, x: Tensor, proteins: np.ndarray, fit: Tensor
) -> dict[str, float]:
    """R² with its 95 % bootstrap interval over proteins."""
    target, mean = dense(x), dense(fit.double().mean(0).to(fit))
    error = group_sums(residual(student(x), target).numpy(), proteins)
    spread = group_sums(residual(mean.expand_as(target), target).numpy(), proteins)
    lost = estimate(ratio(error, spread), resample_counts(len(spread)))
    return {"value": 1 - lost.value, "low": 1 - lost.high, "high": 1 - lost.low}


def export_artefact(
    artefact: str,
    to: Literal["onnx", "onnx-int8", "torch", "dense", "int8"] = "onnx",
    rank: int | None = None,
    output: str | None = None,
    teacher: str | None = None,
    data: str | None = None,
) -> Path:
    """Turn a saved student into what another runtime takes.

    Args:
        artefact: The folder that `compress` or `distil` made.
        to: `onnx`; `onnx-int8`, which ONNX Runtime computes in integers; `torch`, a program for `torch.export.load`;
            `dense`, weight and bias of one plain layer; or `int8`, another such folder of about a quarter of the bytes.
        rank: A lower rank than the saved one.
        output: The file or folder; by default within or beside the artefact.
        teacher: For int8: the dense layer, `<file>:<key>`, that fidelity is measured against.
        data: For int8 and onnx-int8: embeddings to measure it on; whatever `compress` takes as their source.

    Raises:
        InputError: the artefact is damaged or holds a whole model, or integers would cost more than 0.001 of R².
    """
    loaded = load(artefact, rank)
    if isinstance(loaded, CodeEncoder):
        raise InputError(
            f"Expected a student layer to export but {artefact} is a code map; `distil_rank.load` reads it."
        )
    student = cast(LowRankLinear | Int8LowRankLinear, loaded)
    folder = Path(artefact).resolve()
    if to != "int8" and output is not None and Path(output).is_dir():
        raise InputError(f"Expected a file to export to but {output} is a folder; name a file in it.")
    if to == "onnx":
        return to_onnx(student, output or folder / "layer.onnx")
    if to == "torch":
        dtype = student.A.dtype if student.A.is_floating_point() else torch.float32
        return to_torch(student, output or folder / "layer.pt2", torch.zeros(2, student.in_features, dtype=dtype))
    if to == "dense":
        path = Path(output or folder / "dense.safetensors")
        check_writable(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors.torch.save(dict(to_dense(student).state_dict())))
        return path
    if data is None or (teacher is None and to == "int8") or not isinstance(student, LowRankLinear):
        needed = "a float student, `teacher` and `data`" if to == "int8" else "a float student and `data`"
        raise InputError(f"Expected {needed} for {to}, whose cost is measured; give them.")
    rows = EmbeddingDataModule(source=data)
    rows.setup()
    assert teacher is not None
    small = to_int8(student, load_linear(teacher), Moments.of(rows.rows("test")))
    return save(small, output or folder.with_name(f"{folder.name}-int8"), data=asdict(rows.description()))
