"""Replace the layers of one model by students, one after the other or all from one pass over the data."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from distil_rank.compression.agreement import Agreement, agreement
from distil_rank.compression.batches import Batches, Forward, Mask
from distil_rank.compression.capture import GUARD_ROWS, Inputs, capture, count_runs
from distil_rank.compression.modules import install
from distil_rank.compression.report import LayerRow
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


@dataclass
class Replacement:
    """The layers of one model while students replace them.

    Attributes:
        dense: the layers to replace, by name.
        shared: those that share their weight with others, and with which.
        one_by_one: each layer is calibrated on what comes through the students before it.
        originals: the layers replaced so far, by each of their places in the model.
        owner: by place, the name of the layer.
        rows: of the report, by name.
        solved: students and what was measured at their inputs, by name.
    """

    model: nn.Module
    dense: dict[str, nn.Linear]
    shared: dict[str, str]
    batches: Batches
    forward: Forward
    mask: Mask
    outputs: Outputs
    one_by_one: bool
    originals: dict[str, nn.Module] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    rows: dict[str, LayerRow] = field(default_factory=dict)
    solved: dict[str, tuple[LowRankLinear, Inputs]] = field(default_factory=dict)

    def first_pass(self, whole: bool) -> tuple[dict[str, int], dict[str, Inputs]]:
        """How often each layer runs in a pass, in the order in which they run, and their inputs if `whole`.

        One by one the order is enough, unless a budget needs every layer's spectrum beforehand.
        """
        captured = capture(self.model, self.dense, self.batches, self.forward, self.mask) if whole else {}
        counted = {name: inputs.runs for name, inputs in captured.items()}
        runs = counted if whole else count_runs(self.model, self.dense, self.batches, self.forward)
        _check_ran(self.dense, runs, self.batches)
        return runs, captured

    def replace_layers(
        self, runs: Mapping[str, int], captured: dict[str, Inputs], ranks: Mapping[str, Rank], solver: Solver
    ) -> None:
        """Put students in the places of the layers."""
        for name in runs:
            log.info("compressing %s (%d of %d)", name, len(self.rows) + 1, len(self.dense))
            layer = self.dense[name]
            if name in captured and not (self.one_by_one and self.originals):
                inputs = captured.pop(name)
            else:
                once = runs[name] == 1
                inputs = capture(self.model, {name: layer}, self.batches, self.forward, self.mask, once)[name]
            self.rows[name], student = _replaced(name, layer, ranks[name], inputs, solver, self.shared.get(name))
            if student is not None:
                paths = [path for path, other in self.model.named_modules(remove_duplicate=False) if other is layer]
                self.originals |= dict.fromkeys(paths, layer)
                self.owner |= dict.fromkeys(paths, name)
                install(self.model, dict.fromkeys(paths, student))
                self.solved[name] = student, inputs

    def agreement(self) -> Agreement | None:
        """Of the model's output with and without students; None without held-out rows."""
        return agreement(self.model, self.originals, self.batches, self.outputs, self.forward, self.mask)

    def tune(self, steps: int) -> tuple[Agreement | None, Tuning]:
        """Fine-tune the students together; the agreement before it, and how it went."""
        untuned = self.agreement()
        moments = {path: self.solved[self.owner[path]][1].moments() for path in self.originals}
        tuning = match_outputs(
            self.model, self.originals, moments, self.batches, steps, self.outputs, self.forward, self.mask
        )
        for name, (student, inputs) in self.solved.items():
            student.provenance |= {"tuned_steps": tuning.steps if tuning.best_loss < tuning.start_loss else 0}
            measured = _measure_at_every_rank(student, self.dense[name], inputs)
            predicted = student.provenance["r2"][-1]
            self.rows[name] = replace(self.rows[name], predicted_r2=predicted, held_out_r2=measured)
        return untuned, tuning

    def timed_rows(self) -> list[LayerRow]:
        """Rows of the report; those of replaced layers with their latency."""
        return [
            timed_row(row, self.dense[name], self.solved[name][0]) if name in self.solved else row
            for name, row in self.rows.items()
        ]


def _check_ran(dense: Mapping[str, nn.Linear], ran: Collection[str], batches: Batches) -> None:
    if not batches.seen:
        raise InputError("Expected batches to calibrate on but `data` holds none.")
    if idle := [name for name in dense if name not in ran]:
        raise InputError(
            f"Expected {idle[0]!r} to run when the model does but it never did (its weights may be read by another"
            " module, as nn.MultiheadAttention does); leave it out."
        )


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
