"""The public call: replace dense layers inside any model by low-rank ones, and report what they retain."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.compression.allocate import allocate
from distil_rank.compression.capture import (
    Capture,
    Forward,
    LayerInputs,
    Mask,
    as_mask,
    attention_mask,
    call_model,
    evaluating,
    output_rows,
    with_held_out,
)
from distil_rank.compression.report import CompressionReport, LayerRow, OutputFidelity
from distil_rank.compression.saved import install
from distil_rank.errors import InputError
from distil_rank.lowrank.fidelity import nested_r2
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.solvers import Factors, Solver, choose_rank, output_spectrum
from distil_rank.measure.latency import compare_layers

log = logging.getLogger(__name__)

Rank = int | float | str
LATENCY_BATCH = 32
MAX_OUTPUTS = 2**26  # numbers of the original model's output that are kept to compare with


def compress(
    model: nn.Module,
    layers: Mapping[str, Rank] | Sequence[str] | str,
    data: Iterable[Any] | Tensor,
    *,
    held_out: Iterable[Any] | Tensor | None = None,
    parameters: float | None = None,
    solver: Solver = "closed_form",
    forward: Forward = call_model,
    mask: Mask = attention_mask,
    inplace: bool = True,
) -> CompressionReport:
    """Replace linear layers inside a model by the best low-rank students for your data, in one pass over it.

    Each layer is solved for what it is given in the original model. To train a student through what stands behind its
    layer, see `DistilModule(head=…)`.

    Args:
        model: any module.
        layers: patterns of layer names (`*` stands for anything), each with its rank: an integer, a share of the
            layer's output variance in (0, 1), or `"auto"`; the first pattern that fits counts. With `parameters`, the
            patterns alone.
        data: batches to calibrate on, in any structure that `forward` takes; or a tensor of rows. Every fifth batch is
            held out unless `held_out` is given.
        held_out: batches to measure on.
        parameters: the share of these layers' weights to keep in all; ranks follow from it (see `allocate`).
        solver: see `distil_rank.lowrank.solvers`.
        forward: runs the model on a batch and returns its output. By default a mapping is passed as keyword arguments,
            a tensor as it is, and of a tuple or list the first element.
        mask: gives the `(batch, time)` mask of a batch, true for what is not padding; by default the batch's
            `attention_mask`, if it has one.
        inplace: change `model` itself, not a copy.

    Returns:
        The model and a row for each layer; `print` shows a table.

    Raises:
        InputError: a pattern that matches no linear layer, a layer that never runs or does more than its weights say,
            or a rank or budget out of range.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> report = compress(model, {"0": 3}, data=torch.randn(200, 16))
    >>> model[0].rank, report.parameters
    (3, (272, 112))
    """
    model = model if inplace else copy.deepcopy(model)
    ranks = _requested_ranks(model, layers, parameters)
    dense = {name: cast(nn.Linear, model.get_submodule(name)) for name in ranks}
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    shared = {name for name, layer in dense.items() if holders[id(layer.weight)] > 1}  # as tied embeddings are

    batches = 0
    originals: list[tuple[Any, Tensor]] = []  # held-out batches and what the model makes of them
    with evaluating(model), Capture(dense) as capture:
        for batch, is_held_out in with_held_out(data, held_out):
            batches += 1
            capture.mask, capture.held_out = as_mask(mask(batch)), is_held_out
            target = output_rows(forward(model, batch), capture.mask)
            if is_held_out and target is not None and sum(rows.numel() for _, rows in originals) < MAX_OUTPUTS:
                originals.append((batch, target))
    if not batches:
        raise InputError("Expected batches to calibrate on but `data` holds none.")
    if idle := [name for name in dense if name not in capture.inputs]:
        raise InputError(
            f"Expected {idle[0]!r} to run when the model does but it never did (its weights may be read by another"
            " module, as nn.MultiheadAttention does); leave it out."
        )
    if parameters is not None:
        own = {name: layer for name, layer in dense.items() if name not in shared}
        ranks |= _within_budget(own, dense, capture.inputs, parameters)

    rows: list[LayerRow] = []
    students: dict[str, nn.Module] = {}  # by every name in the model
    for name, inputs in capture.inputs.items():
        row, student = _solved(name, dense[name], ranks[name], inputs, solver, name in shared)
        rows.append(row)
        if student is not None:
            places = [path for path, one in model.named_modules(remove_duplicate=False) if one is dense[name]]
            students |= dict.fromkeys(places, student)
    before = {path: model.get_submodule(path) for path in students}
    install(model, students)
    if not originals:
        log.warning(
            "The model's output is not compared: nothing was held out (give `held_out`, or 5 batches at least), or it"
            " is no rows (give `forward=lambda model, batch: …` that returns the tensor that matters)."
        )
        return CompressionReport(model, rows)
    try:
        with evaluating(model):
            output = torch.cat([cast(Tensor, output_rows(forward(model, x), as_mask(mask(x)))) for x, _ in originals])
    except BaseException:
        install(model, before)  # never leave a model that does not run
        raise
    return CompressionReport(
        model, rows, _compared(output.double(), torch.cat([target for _, target in originals]).double())
    )


def _requested_ranks(
    model: nn.Module, layers: Mapping[str, Rank] | Sequence[str] | str, parameters: float | None
) -> dict[str, Any]:
    """The rank requested of each linear layer that a pattern fits; None with a budget."""
    if isinstance(layers, Mapping) == (parameters is not None):
        what = "a rank for each pattern, or `parameters`," if parameters is None else "patterns alone with `parameters`"
        raise InputError(f"Expected {what} but got {layers!r}.")
    if parameters is not None and not (isinstance(parameters, int | float) and 0 < parameters <= 1):
        raise InputError(f"Expected `parameters` in (0, 1], the share of the weights to keep, but got {parameters!r}.")
    if isinstance(layers, str):
        layers = [layers]
    patterns = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name:
            places.setdefault(module, []).append(name)
    ranks: dict[str, Any] = {}
    unused = dict(patterns)
    for names in places.values():
        for pattern in (one for one in patterns if any(fnmatchcase(name, one) for name in names)):
            unused.pop(pattern, None)
            ranks.setdefault(names[0], patterns[pattern])
    if unused:
        linear = [name for names in places.values() for name in names]
        some = ", ".join([*linear[:3], *["…"][: len(linear) > 3]]) or "none inside"
        raise InputError(f"Expected {next(iter(unused))!r} to fit a linear layer of the model but it has {some}.")
    return ranks


def _within_budget(
    free: Mapping[str, nn.Linear], dense: Mapping[str, nn.Linear], inputs: Mapping[str, LayerInputs], share: float
) -> dict[str, Any]:
    """The ranks of the layers that are free to shrink, so that all the dense ones together keep their share."""
    sizes = {id(layer.weight): layer.weight.numel() for layer in dense.values()}  # what is shared counts once
    free_sizes = sum(layer.weight.numel() for layer in free.values())
    biases = sum(layer.out_features for layer in free.values() if layer.bias is None)  # a student always has one
    budget = int(share * sum(sizes.values())) - (sum(sizes.values()) - free_sizes) - biases
    spectra = {name: output_spectrum(layer.weight, inputs[name].fit.moments())[0] for name, layer in free.items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in free.items()}
    ranks = allocate(spectra, shapes, budget)
    return {name: min(shapes[name]) if rank is None else rank for name, rank in ranks.items()}


def _solved(
    name: str, dense: nn.Linear, requested: Rank, inputs: LayerInputs, solver: Solver, shared: bool
) -> tuple[LayerRow, LowRankLinear | None]:
    """The student of one layer with its R² at every rank, or None where none would be smaller."""
    n, m = dense.in_features, dense.out_features
    moments = inputs.fit.moments()
    if moments.rows == 0 or not moments.covariance.isfinite().all():
        actual = "none" if moments.rows == 0 else "NaN or inf"
        raise InputError(f"Expected finite rows of input to {name!r} but got {actual}; look at the data and its mask.")
    if moments.rows < n:
        log.warning("%s: %d rows for %d inputs; more data would make a better student.", name, moments.rows, n)
    size = parameter_count(n, m, bias=dense.bias is not None)
    row = LayerRow(name, n, m, None, size, size)
    if shared:
        return replace(row, note="its weight is used elsewhere too"), None
    if not dense.weight.isfinite().all():
        raise InputError(f"Expected finite weights in {name!r} but found NaN or inf; look at the model.")
    limit = break_even_rank(n, m)
    large = isinstance(requested, int) and requested >= max(limit, 2)  # True is no rank
    rank = int(requested) if large else choose_rank(output_spectrum(dense.weight, moments)[0], requested)
    if rank >= limit:
        return replace(row, note=f"no weights saved from rank {limit:.0f} on"), None

    student = LowRankLinear.from_linear(dense, rank, moments, solver)
    student.train(dense.training).requires_grad_(dense.weight.requires_grad)
    held_out_r2 = None
    if inputs.held_out.rows > 0:
        held_out = inputs.held_out.moments()
        if not held_out.covariance.isfinite().all():
            raise InputError("Expected finite rows to measure on but some hold NaN or inf; look at the held-out data.")
        assert student.bias is not None
        factors = Factors(student.A, student.B, student.bias)
        layers = dense.weight, dense.bias, factors
        curve = nested_r2(*layers, held_out, student.input_mean, centre=moments.mean).tolist()
        student.provenance |= {"held_out_rows": held_out.rows, "r2_held_out": curve}
        held_out_r2 = curve[-1]
        if isinstance(requested, float) and held_out_r2 < requested:
            told = "%s: R² on held-out rows is %.4f, below the %g that was asked for; more rows or a higher share help."
            log.warning(told, name, held_out_r2, requested)
    timing = compare_layers(dense, student, batches=(LATENCY_BATCH,), repeats=20)[0]
    row = replace(row, rank=rank, parameters=parameter_count(n, m, rank), predicted_r2=student.provenance["r2"][-1])
    return replace(row, held_out_r2=held_out_r2, dense_us=timing.dense_us, student_us=timing.student_us), student


def _compared(output: Tensor, target: Tensor) -> OutputFidelity:
    """What the model with students puts out beside the original, both `(N, k)`."""
    residual, variance = float((output - target).square().sum()), float((target - target.mean(0)).square().sum())
    r2 = 1 - residual / variance if variance > 0 else float(residual == 0)
    ours, theirs = (rows.argmax(1) if rows.shape[1] > 1 else rows > 0 for rows in (output, target))
    return OutputFidelity(len(target), r2, float((ours == theirs).double().mean()))
