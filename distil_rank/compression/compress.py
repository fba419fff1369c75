"""The public call: replace dense layers inside any model by low-rank ones, and report what they keep."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast, get_args

import numpy as np
from torch import Tensor, nn

from distil_rank.compression.allocate import allocate
from distil_rank.compression.batches import Batches, Forward, Mask, attention_mask, call_model
from distil_rank.compression.capture import Inputs
from distil_rank.compression.modules import install
from distil_rank.compression.replacement import Rank, Replacement
from distil_rank.compression.report import Report
from distil_rank.errors import InputError
from distil_rank.lowrank.solvers import Solver, output_spectrum
from distil_rank.training.losses import Outputs


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

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> report = compress(model, {"0": 3}, data=torch.randn(200, 16))
    >>> model[0].rank, report.parameters
    (3, (272, 112))
    """
    _check_options(data, held_out, parameters, tune, outputs)
    model = model if inplace else copy.deepcopy(model)
    requested = _requested_ranks(model, layers, parameters)
    dense = {name: cast(nn.Linear, model.get_submodule(name)) for name in requested}
    batches = Batches(data, held_out)
    one_by_one = sequential and len(dense) > 1
    if (tune or one_by_one) and batches.unrepeatable:
        raise InputError(batches.unrepeatable)
    work = Replacement(model, dense, _shared_weights(model, dense), batches, forward, mask, outputs, one_by_one)
    runs, captured = work.first_pass(whole=not one_by_one or parameters is not None)
    if parameters is not None:
        own = {name: dense[name] for name in dense.keys() - work.shared.keys()}
        requested |= _within_budget(own, dense, captured, parameters)
    try:
        work.replace_layers(runs, captured, requested, solver)
        untuned, tuning = work.tune(tune) if tune and work.solved else (None, None)
        agreed = None if batches.unrepeatable else work.agreement()
    except BaseException:
        install(model, work.originals)  # never leave a model half replaced
        raise
    return Report(model, work.timed_rows(), agreed, untuned, tuning)


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
