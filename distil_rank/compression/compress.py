"""The public call: replace dense layers inside any model by low-rank ones, and report what they keep."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.compression.agreement import Agreement, agreement
from distil_rank.compression.allocate import allocate
from distil_rank.compression.capture import (
    GUARD_ROWS,
    Batches,
    Forward,
    Inputs,
    Mask,
    attention_mask,
    call_model,
    capture,
    count_runs,
    install,
)
from distil_rank.compression.tune import Tuning, match_outputs
from distil_rank.errors import InputError
from distil_rank.lowrank.fidelity import nested_r2
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.solvers import Factors, Solver, choose_rank, output_spectrum
from distil_rank.measure.latency import compare_layers
from distil_rank.training.losses import Outputs

log = logging.getLogger(__name__)

Rank = int | float | str
LATENCY_BATCH = 32


@dataclass(frozen=True)
class LayerRow:
    """The outcome for one layer.

    Attributes:
        name: where it is in the model.
        in_features: n.
        out_features: m.
        rank: of the student; None where the layer was left dense, and `note` says why.
        dense_parameters: before.
        parameters: after.
        predicted_r2: share of the output's variance that the student keeps on the rows it was fitted to.
        held_out_r2: the same on held-out rows; None without any.
        dense_us: median time of the dense layer for 32 rows, in microseconds.
        student_us: of its student.
        note: why the layer was left dense; empty otherwise.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    dense_parameters: int
    parameters: int
    predicted_r2: float | None = None
    held_out_r2: float | None = None
    dense_us: float | None = None
    student_us: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `compress` did.

    Attributes:
        model: with the students in place.
        layers: one row for each layer that was asked for, in the order in which they run.
        outputs: the whole model's agreement with the original; None without held-out rows.
        untuned: the same before fine-tuning.
        tuning: how fine-tuning went; None without.
    """

    model: nn.Module
    layers: list[LayerRow]
    outputs: Agreement | None = None
    untuned: Agreement | None = None
    tuning: Tuning | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Of these layers, before and after."""
        return sum(row.dense_parameters for row in self.layers), sum(row.parameters for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the models."""
        parts = {"outputs": self.outputs, "untuned": self.untuned, "tuning": self.tuning}
        return {"layers": [asdict(row) for row in self.layers]} | {
            name: None if part is None else asdict(part) for name, part in parts.items()
        }

    def __str__(self) -> str:
        """A Markdown table."""
        head = "| layer | shape | rank | parameters | predicted R² | held-out R² | µs for 32 rows |"
        lines = [head, "|---|---|---|---|---|---|---|"]
        for row in self.layers:
            shape = f"{row.in_features} → {row.out_features}"
            if row.rank is None:
                lines.append(f"| {row.name} | {shape} | dense: {row.note} | {row.parameters:,} | | | |")
                continue
            held_out = "" if row.held_out_r2 is None else f"{row.held_out_r2:.4f}"
            lines.append(
                f"| {row.name} | {shape} | {row.rank} | {row.dense_parameters:,} → {row.parameters:,} "
                f"| {row.predicted_r2:.4f} | {held_out} | {row.dense_us:.0f} → {row.student_us:.0f} |"
            )
        before, after = self.parameters
        lines += ["", f"Parameters of these layers: {before:,} → {after:,} ({after / before:.1%})."]
        if self.tuning is not None:
            lines.append("Fine-tuned for the whole model's output, which the layers' own R² may have paid for.")
        for when, agreed in (("", self.outputs), (" before fine-tuning", self.untuned)):
            if agreed is not None:
                kept = agreed.predictions_kept
                kept_text = "" if kept is None else f", predictions kept {kept:.2%}"
                lines.append(
                    f"The whole model's output{when} on {agreed.rows:,} held-out rows: R² {agreed.r2:.4f}{kept_text}."
                )
        return "\n".join(lines)

    _repr_markdown_ = __str__  # a table in a notebook


def compress(
    model: nn.Module,
    layers: Mapping[str, Rank] | Sequence[str] | str,
    data: Iterable[Any] | Tensor,
    *,
    held_out: Iterable[Any] | Tensor | None = None,
    parameters: float | None = None,
    sequential: bool = True,
    solver: Solver = "closed_form",
    tune: int = 0,
    outputs: Outputs = "classification",
    forward: Forward = call_model,
    mask: Mask = attention_mask,
    inplace: bool = True,
) -> Report:
    """Replace linear layers inside a model by low-rank students that keep the most of their function on your data.

    Args:
        model: any module.
        layers: patterns of layer names (`*` stands for anything), each with its rank: an integer, a share of the
            layer's output variance in (0, 1), or `"auto"`; the first pattern that fits counts. With `parameters`, the
            patterns alone.
        data: batches to calibrate on, in any structure that `forward` takes; or a tensor of rows. Every fifth batch is
            held out unless `held_out` is given.
        held_out: batches to measure on.
        parameters: the share of these layers' weights to keep in all; ranks follow from it (see `allocate`).
        sequential: calibrate each layer on what comes through the layers already replaced before it, one pass over the
            data for each; otherwise all in one pass over the original model.
        solver: see `distil_rank.lowrank.solvers`.
        tune: steps to fine-tune the students together, against what the whole original model puts out; 1500 is a good
            number. What does not help is not kept.
        outputs: whether the model puts out logits of classes (one column: of yes against no) or values; for
            fine-tuning and for the report.
        forward: runs the model on a batch and returns its output. By default a mapping is passed as keyword arguments,
            a tensor as it is, and of a tuple or list the first element.
        mask: gives the `(batch, time)` mask of a batch, true for what is not padding; by default the batch's
            `attention_mask`, if it has one.
        inplace: change `model` itself, not a copy.

    Returns:
        The model and a row for each layer; `print` shows a table.

    Raises:
        InputError: a pattern that matches no linear layer, a layer that never runs or does more than its weights say, a
            rank or budget out of range, data that cannot be passed over again where that is needed.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> report = compress(model, {"0": 3}, data=torch.randn(200, 16))
    >>> model[0].rank, report.parameters
    (3, (272, 112))
    """
    _check_options(data, held_out, parameters, tune, outputs)
    model = model if inplace else copy.deepcopy(model)
    requested = _requested_ranks(model, layers, parameters)
    dense = {name: cast(nn.Linear, model.get_submodule(name)) for name in requested}
    shared = _shared_weights(model, dense)
    batches = Batches(data, held_out)
    one_by_one = sequential and len(dense) > 1
    if (tune or one_by_one) and batches.unrepeatable:
        raise InputError(batches.unrepeatable)
    # One by one, a first pass only tells the order of the layers; a budget needs every layer's spectrum beforehand.
    whole = not one_by_one or parameters is not None
    inputs_of = capture(model, dense, batches, forward, mask) if whole else {}
    counted = {name: inputs.runs for name, inputs in inputs_of.items()}
    runs = counted if whole else count_runs(model, dense, batches, forward)
    _check_ran(dense, runs, batches)
    if parameters is not None:
        requested |= _within_budget(
            {name: dense[name] for name in dense.keys() - shared.keys()}, dense, inputs_of, parameters
        )

    originals: dict[str, nn.Module] = {}
    owner: dict[str, str] = {}
    rows: dict[str, LayerRow] = {}
    solved: dict[str, tuple[LowRankLinear, Inputs]] = {}
    try:
        for name in runs:
            log.info("compressing %s (%d of %d)", name, len(rows) + 1, len(dense))
            if name in inputs_of and not (one_by_one and originals):
                inputs = inputs_of.pop(name)
            else:
                inputs = capture(model, {name: dense[name]}, batches, forward, mask, once=runs[name] == 1)[name]
            rows[name], student = _replaced(name, dense[name], requested[name], inputs, solver, shared.get(name))
            if student is not None:
                paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is dense[name]]
                originals |= dict.fromkeys(paths, dense[name])
                owner |= dict.fromkeys(paths, name)
                install(model, dict.fromkeys(paths, student))
                solved[name] = student, inputs

        compare = partial(agreement, model, originals, batches, outputs, forward, mask)
        untuned, tuning = None, None
        if tune and solved:
            untuned = compare()
            moments = {path: solved[owner[path]][1].moments() for path in originals}
            tuning = match_outputs(model, originals, moments, batches, tune, outputs, forward, mask)
            for name, (student, inputs) in solved.items():
                student.provenance |= {"tuned_steps": tuning.steps if tuning.best_loss < tuning.start_loss else 0}
                held_out_r2 = _measure_at_every_rank(student, dense[name], inputs)
                rows[name] = replace(rows[name], predicted_r2=student.provenance["r2"][-1], held_out_r2=held_out_r2)
        agreed = None if batches.unrepeatable else compare()
    except BaseException:
        install(model, originals)  # never leave a model half replaced
        raise
    timed = [row if name not in solved else timed_row(row, dense[name], solved[name][0]) for name, row in rows.items()]
    return Report(model, timed, agreed, untuned, tuning)


def _check_options(data: Any, held_out: Any, parameters: Any, tune: Any, outputs: Any) -> None:
    for name, value in (("data", data), ("held_out", held_out)):
        if (value is None and name == "data") or (isinstance(value, Tensor) and value.ndim < 2):
            actual = "None" if value is None else f"a tensor of shape {tuple(value.shape)}"
            raise InputError(f"Expected `{name}` as batches, or a tensor of rows, but got {actual}.")
        if isinstance(value, Mapping | str | np.ndarray) or (value is not None and not isinstance(value, Iterable)):
            kind = type(value).__name__
            raise InputError(f"Expected `{name}` as several batches but got one {kind}; give a list or a loader.")
    if parameters is not None and (isinstance(parameters, bool) or not isinstance(parameters, int | float)):
        raise InputError(f"Expected `parameters` in (0, 1], the share of the weights to keep, but got {parameters!r}.")
    if isinstance(tune, bool) or not isinstance(tune, int) or tune < 0:
        raise InputError(f"Expected `tune` as a number of steps, 0 for none, but got {tune!r}.")
    if outputs not in get_args(Outputs):
        raise InputError(f"Expected `outputs` out of {', '.join(get_args(Outputs))} but got {outputs!r}.")


def _requested_ranks(
    model: nn.Module, layers: Mapping[str, Rank] | Sequence[str] | str, budget: float | None
) -> dict[str, Any]:
    """The rank asked for of each linear layer that a pattern fits."""
    if isinstance(layers, Mapping) == (budget is not None):
        what = "patterns without ranks beside `parameters`" if budget else "a rank for each pattern, or `parameters`"
        raise InputError(f"Expected {what} but got {layers!r}.")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"Expected `parameters` in (0, 1], the share of the weights to keep, but got {budget}.")
    patterns = (
        dict(layers) if isinstance(layers, Mapping) else dict.fromkeys([layers] if isinstance(layers, str) else layers)
    )
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name:
            places.setdefault(module, []).append(name)
    linear = [name for names in places.values() for name in names]
    fits = {
        names[0]: next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)
        for names in places.values()
    }
    if unused := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in linear)]:
        names = ", ".join(linear[:8]) + (", …" if len(linear) > 8 else "")
        raise InputError(
            f"Expected {unused[0]!r} to fit a linear layer of the model but it has {names or 'none inside'}."
        )
    return {name: patterns[pattern] for name, pattern in fits.items() if pattern is not None}


def _check_ran(dense: Mapping[str, nn.Linear], ran: Collection[str], batches: Batches) -> None:
    if not batches.seen:
        raise InputError("Expected batches to calibrate on but `data` holds none.")
    if idle := [name for name in dense if name not in ran]:
        raise InputError(
            f"Expected {idle[0]!r} to run when the model does but it never did (its weights may be read by another"
            " module, as nn.MultiheadAttention does); leave it out."
        )


def _shared_weights(model: nn.Module, dense: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Of each layer whose weight another module holds too (tied embeddings), that other's name for it."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((f"{path}.{key}", module))
    others = {
        name: [path for path, holder in holders[id(module.weight)] if holder is not module]
        for name, module in dense.items()
        if id(module.weight) in holders  # a parametrised weight is computed, not shared
    }
    return {name: paths[0] for name, paths in others.items() if paths}


def _within_budget(
    free: Mapping[str, nn.Linear], dense: Mapping[str, nn.Linear], inputs_of: Mapping[str, Inputs], share: float
) -> dict[str, Any]:
    """The ranks of the layers that are free to shrink, so that all the dense ones together keep their share."""
    weights = {name: layer.weight for name, layer in dense.items()}
    held = {id(weight): weight.numel() for name, weight in weights.items() if name not in free}
    total = sum({id(weight): weight.numel() for weight in weights.values()}.values())
    biases = sum(layer.out_features for layer in free.values() if layer.bias is None)  # a student always has one
    budget = int(share * total) - sum(held.values()) - biases
    spectra = {name: output_spectrum(layer.weight, inputs_of[name].moments())[0] for name, layer in free.items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in free.items()}
    ranks = allocate(spectra, shapes, budget)
    return {name: min(shapes[name]) if rank is None else rank for name, rank in ranks.items()}


def _replaced(
    name: str, dense: nn.Linear, requested: Rank, inputs: Inputs, solver: Solver, shared: str | None
) -> tuple[LayerRow, LowRankLinear | None]:
    """The student of one layer, or None where none would be smaller."""
    n, m = dense.in_features, dense.out_features
    moments = inputs.moments()
    if moments.rows == 0 or not moments.covariance.isfinite().all():
        actual = "none" if moments.rows == 0 else "NaN or inf"
        raise InputError(f"Expected finite rows of input to {name!r} but got {actual}; look at the data and its mask.")
    if moments.rows < n:
        log.warning("%s: %d rows for %d inputs; more data would make a better student.", name, moments.rows, n)
    size = parameter_count(n, m, bias=dense.bias is not None)
    row = LayerRow(name, n, m, None, size, size)
    if shared is not None:
        return replace(row, note=f"its weight is also {shared}"), None
    if not dense.weight.isfinite().all():
        raise InputError(f"Expected finite weights in {name!r} but found NaN or inf; look at the model.")
    large = isinstance(requested, int) and not isinstance(requested, bool) and requested >= break_even_rank(n, m)
    rank = int(requested) if large else choose_rank(output_spectrum(dense.weight, moments)[0], requested)
    if rank >= break_even_rank(n, m):
        return replace(row, note=f"no weights saved from rank {break_even_rank(n, m):.0f} on"), None
    student = LowRankLinear.from_linear(dense, rank, moments, solver)
    student.train(dense.training).requires_grad_(dense.weight.requires_grad)
    held_out_r2 = _measure_at_every_rank(student, dense, inputs)
    measured = {"predicted_r2": student.provenance["r2"][-1], "held_out_r2": held_out_r2}
    return replace(row, rank=rank, parameters=parameter_count(n, m, rank), **measured), student


def _measure_at_every_rank(student: LowRankLinear, dense: nn.Linear, inputs: Inputs) -> float | None:
    """Record in a student its R² at every rank, and give it a guard; returns its held-out R²."""
    moments, held_out = inputs.moments(), inputs.held_out_moments()
    assert student.bias is not None
    factors = Factors(student.A, student.B, student.bias)
    layers = dense.weight, dense.bias, factors
    student.provenance["r2"] = nested_r2(*layers, moments, student.input_mean).tolist()
    if held_out is None:
        return None
    if not held_out.covariance.isfinite().all():
        raise InputError("Expected finite rows to measure on but some hold NaN or inf; look at the held-out data.")
    curve = nested_r2(*layers, held_out, student.input_mean, centre=moments.mean).tolist()
    student.provenance |= {"held_out_rows": held_out.rows, "r2_held_out": curve}
    rows = torch.cat(inputs.rows)[:GUARD_ROWS]
    if len(rows) > 1:
        student.guard = Guard.of(dense, student, rows)
    return curve[-1]


def timed_row(row: LayerRow, dense: nn.Linear, student: nn.Module) -> LayerRow:
    """The row with the time that both take for `LATENCY_BATCH` rows."""
    timing = compare_layers(dense, student, batches=(LATENCY_BATCH,), repeats=20)[0]
    return replace(row, dense_us=timing.dense_us, student_us=timing.student_us)
