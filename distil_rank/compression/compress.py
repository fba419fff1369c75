"""The public call: replace dense layers inside any model by low-rank ones, and report what they retain."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from distil_rank.compression.capture import (
    Capture,
    LayerInputs,
    as_mask,
    attention_mask,
    call_model,
    evaluating,
    output_rows,
    with_held_out,
)
from distil_rank.compression.saved import install
from distil_rank.errors import InputError, examples
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.solvers import Factors, Solver, choose_rank, nested_r2, output_spectrum
from distil_rank.measure.latency import compare_layers

log = logging.getLogger(__name__)

Rank = int | float | str
Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]
LATENCY_BATCH = 32
MAX_OUTPUTS = 2**26  # numbers of the original model's output that are kept to compare with


@dataclass(frozen=True)
class LayerRow:
    """The outcome for one layer.

    Attributes:
        rank: of the student; None where the layer was left dense, and `note` says why.
        predicted_r2: share of the output's variance that the student keeps on the rows it was fitted to.
        held_out_r2: the same on held-out rows; None without any.
        dense_us: median time for `LATENCY_BATCH` rows, in microseconds; `student_us` alike.
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
class OutputFidelity:
    """The whole model's output beside the original's, on held-out rows.

    Attributes:
        rows: how many were compared.
        r2: share of the outputs' variance retained.
        predictions_retained: share of rows whose largest output stayed the largest; of a single output, whose sign did.
    """

    rows: int
    r2: float
    predictions_retained: float


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        model: with the students in place.
        layers: in the order in which they run.
        outputs: the whole model beside the original; None without held-out rows.
    """

    model: nn.Module
    layers: list[LayerRow]
    outputs: OutputFidelity | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Of these layers, before and after."""
        return sum(row.dense_parameters for row in self.layers), sum(row.parameters for row in self.layers)

    def __str__(self) -> str:
        """A Markdown table, and what it does not say."""
        head = ["layer", "shape", "rank", "parameters", "predicted R²", "held-out R²", f"µs for {LATENCY_BATCH} rows"]
        table = [head, ["---"] * len(head)]
        for row in self.layers:
            cells = [f"dense: {row.note}", f"{row.parameters:,}", "", "", ""]
            if row.rank is not None:
                cells = [str(row.rank), f"{row.dense_parameters:,} → {row.parameters:,}", f"{row.predicted_r2:.4f}"]
                cells += ["" if row.held_out_r2 is None else f"{row.held_out_r2:.4f}"]
                cells += [f"{row.dense_us:.0f} → {row.student_us:.0f}"]
            table.append([row.name, f"{row.in_features} → {row.out_features}", *cells])
        before, after = self.parameters
        notes = [f"Parameters of these layers: {before:,} → {after:,} ({after / before:.1%})."]
        if (o := self.outputs) is not None:
            figures = f"R² {o.r2:.4f}, predictions retained {o.predictions_retained:.2%}"
            notes.append(f"The whole model's output on {o.rows:,} held-out rows: {figures}.")
        return "\n".join([*(f"| {' | '.join(line)} |" for line in table), "", *notes])

    _repr_markdown_ = __str__  # a table in a notebook


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

    inputs, originals = _run(model, dense, with_held_out(data, held_out), forward, mask)
    if parameters is not None:
        own = {name: layer for name, layer in dense.items() if name not in shared}
        ranks |= _within_budget(own, dense, inputs, parameters)

    rows: list[LayerRow] = []
    students: dict[str, nn.Module] = {}  # by every name in the model
    for name, sums in inputs.items():
        row, student = _solved(name, dense[name], ranks[name], sums, solver, name in shared)
        rows.append(row)
        if student is not None:
            places = [path for path, one in model.named_modules(remove_duplicate=False) if one is dense[name]]
            students |= dict.fromkeys(places, student)
    before = {path: model.get_submodule(path) for path in students}
    install(model, students)
    try:
        return CompressionReport(model, rows, _output_fidelity(model, originals, forward, mask))
    except BaseException:
        install(model, before)  # never leave a model that does not run
        raise


def _run(
    model: nn.Module, dense: Mapping[str, nn.Linear], batches: Iterable[tuple[Any, bool]], forward: Forward, mask: Mask
) -> tuple[dict[str, LayerInputs], list[tuple[Any, Tensor]]]:
    """The one pass: what the layers are given, and held-out batches with what the model makes of them."""
    count = 0
    originals: list[tuple[Any, Tensor]] = []
    with evaluating(model), Capture(dense) as capture:
        for batch, is_held_out in batches:
            count += 1
            capture.mask, capture.held_out = as_mask(mask(batch)), is_held_out
            target = output_rows(forward(model, batch), capture.mask)
            if is_held_out and target is not None and sum(rows.numel() for _, rows in originals) < MAX_OUTPUTS:
                originals.append((batch, target))
    if not count:
        raise InputError("Expected batches to calibrate on but `data` holds none.")
    if idle := [name for name in dense if name not in capture.inputs]:
        raise InputError(
            f"Expected {idle[0]!r} to run when the model does but it never did (its weights may be read by another"
            " module, as nn.MultiheadAttention does); leave it out."
        )
    return capture.inputs, originals


def _output_fidelity(
    model: nn.Module, originals: list[tuple[Any, Tensor]], forward: Forward, mask: Mask
) -> OutputFidelity | None:
    """The model with its students on held-out batches, beside what it gave before."""
    if not originals:
        log.warning(
            "The model's output is not compared: nothing was held out (give `held_out`, or 5 batches at least), or it"
            " is no rows (give `forward=lambda model, batch: …` that returns the tensor that matters)."
        )
        return None
    with evaluating(model):
        outputs = [cast(Tensor, output_rows(forward(model, batch), as_mask(mask(batch)))) for batch, _ in originals]
    output, target = torch.cat(outputs).double(), torch.cat([rows for _, rows in originals]).double()
    residual, variance = float((output - target).square().sum()), float((target - target.mean(0)).square().sum())
    r2 = 1 - residual / variance if variance > 0 else float(residual == 0)
    ours, theirs = (x.argmax(1) if x.shape[1] > 1 else x > 0 for x in (output, target))
    return OutputFidelity(len(target), r2, float((ours == theirs).double().mean()))


def _requested_ranks(
    model: nn.Module, layers: Mapping[str, Rank] | Sequence[str] | str, parameters: float | None
) -> dict[str, Any]:
    """The rank requested of each linear layer that a pattern fits; None with a budget."""
    if isinstance(layers, Mapping) == (parameters is not None):
        what = "a rank for each pattern, or `parameters`," if parameters is None else "patterns alone with `parameters`"
        raise InputError(f"Expected {what} but got {layers!r}.")
    if parameters is not None and not (isinstance(parameters, int | float) and 0 < parameters <= 1):
        raise InputError(f"Expected `parameters` in (0, 1], the share of the weights to keep, but got {parameters!r}.")
    layers = [layers] if isinstance(layers, str) else layers
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
        raise InputError(
            f"Expected {next(iter(unused))!r} to fit a linear layer of the model but it has {examples(linear)} inside."
        )
    return ranks


def _within_budget(
    free: Mapping[str, nn.Linear], dense: Mapping[str, nn.Linear], inputs: Mapping[str, LayerInputs], share: float
) -> dict[str, int]:
    """The ranks of the layers that are free to shrink, so that all the dense ones together keep their share."""
    size = sum({id(layer.weight): layer.weight.numel() for layer in dense.values()}.values())  # shared ones count once
    fixed = size - sum(layer.weight.numel() for layer in free.values())
    biases = sum(layer.out_features for layer in free.values() if layer.bias is None)  # a student always has one
    spectra = {name: output_spectrum(layer.weight, inputs[name].fit.moments())[0] for name, layer in free.items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in free.items()}
    ranks = allocate(spectra, shapes, int(share * size) - fixed - biases)
    return {name: min(shapes[name]) if rank is None else rank for name, rank in ranks.items()}


def allocate(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int | None]:
    """Ranks that leave the least residual, as shares of each layer's output variance, within a number of weights.

    The next rank always goes where it removes the most residual for each weight it costs. Eigenvalues fall, so that is
    the best there is, up to the remainder that fits no further rank; a layer that reaches its break-even rank, from
    which two factors hold no fewer weights than the dense matrix, becomes dense instead.

    Args:
        spectra: eigenvalues of each layer's output covariance, largest first, from `output_spectrum`.
        shapes: `(m, n)` of each.
        budget: weights in all, biases not counted.

    Returns:
        A rank for each layer; None where it stays dense.

    Raises:
        InputError: not even rank 1 everywhere fits.

    >>> steep, flat = torch.tensor([8.0, 1.0, 0.5, 0.5]), torch.tensor([3.0, 3.0, 2.0, 2.0])
    >>> allocate({"a": steep, "b": flat}, {"a": (8, 8), "b": (8, 8)}, budget=64)
    {'a': 1, 'b': 3}
    """
    cost = dict.fromkeys(spectra, 0)
    rank: dict[str, int | None] = dict.fromkeys(spectra, 0)
    least = sum(sum(shapes[name]) for name in spectra)
    if budget < least:
        raise InputError(f"Expected room for rank 1 in all {len(spectra)} layers ({least} weights) but got {budget}.")

    steps = []  # residual removed for each weight, by the rank after k in a layer
    for name, spectrum in spectra.items():
        total = float(spectrum.sum())
        shares = [2.0, *(value / total for value in spectrum.tolist()[1:] if value > 0)]  # no layer goes without
        steps += [(-share / sum(shapes[name]), name, k) for k, share in enumerate(shares)]
    for _, name, k in sorted(steps):
        if rank[name] != k:  # dense by now, or there was no room for a rank before
            continue
        m, n = shapes[name]
        dense = k + 1 >= break_even_rank(n, m)
        price = m * n if dense else (k + 1) * (m + n)
        if sum(cost.values()) - cost[name] + price <= budget:
            cost[name], rank[name] = price, None if dense else k + 1
    return rank


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
        factors = Factors(student.A, student.B, cast(Tensor, student.bias))
        curve = nested_r2(dense.weight, dense.bias, factors, held_out, student.input_mean, moments.mean).tolist()
        student.provenance |= {"held_out_rows": held_out.rows, "r2_held_out": curve}
        held_out_r2 = curve[-1]
        if isinstance(requested, float) and held_out_r2 < requested:
            warning = (
                "%s: R² on held-out rows is %.4f, below the %g that was asked for; more rows or a higher share help."
            )
            log.warning(warning, name, held_out_r2, requested)
    timing = compare_layers(dense, student, batches=(LATENCY_BATCH,), repeats=20)[0]
    row = replace(row, rank=rank, parameters=parameter_count(n, m, rank), predicted_r2=student.provenance["r2"][-1])
    return replace(row, held_out_r2=held_out_r2, dense_us=timing.dense_us, student_us=timing.student_us), student
