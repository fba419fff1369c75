"""The dense layer to be distilled: generated, trained or read from a file, checked, saved and reused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer, seed_everything
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from distil_rank.commands.lineage import lineage
from distil_rank.compression.own_layer import load_linear
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.results import TeacherCheck
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import choose_rank
from distil_rank.tracking.logger import RunLogger
from distil_rank.tracking.run import Run, start_run
from distil_rank.training.callbacks import LogLosses, Progress
from distil_rank.training.seeds import TRAINER_DEFAULTS
from distil_rank.training.teacher import TeacherModule, check_teacher, random_teacher, spectral_teacher

log = logging.getLogger(__name__)

BUILT_IN = ("denoising", "random", "spectral")


@dataclass(frozen=True)
class Teacher:
    """A dense layer, its check, its file and the MLflow run that made it."""

    name: str
    layer: nn.Linear
    check: TeacherCheck
    path: Path
    run_id: str


def kind_of(teacher: dict[str, Any] | None) -> str:
    """The kind in options of `train_teacher`."""
    return str((teacher or {}).get("kind", "denoising"))


def largest_rank(data: EmbeddingDataModule, teacher: dict[str, Any] | None) -> int:
    """Of a student of the layer that `train_teacher` makes on these data with these options."""
    kind = kind_of(teacher)
    return data.dim if kind in BUILT_IN else min(_own(kind, data.dim).weight.shape)


def check_rank_request(data: EmbeddingDataModule, rank: int | float | str, teacher: dict[str, Any] | None) -> None:
    """Raise `InputError` for a rank that no teacher of these options has, before one is trained."""
    choose_rank(torch.ones(largest_rank(data, teacher)), rank)


def train_teacher(
    data: EmbeddingDataModule,
    kind: str = "denoising",
    noise: float = 0.3,
    noise_scale: Literal["absolute", "relative"] = "absolute",
    lr: float = 1e-3,
    steps: int = 500,
    seed: int = 42,
    trainer: dict[str, Any] | None = None,
    output: str = "results",
    config: str = "",
    reuse: bool = False,
) -> Teacher:
    """Make the dense layer that is to be distilled, and check that it is worth it.

    Args:
        data: The embeddings.
        kind: `denoising` trains a linear denoiser; `random` and `spectral` are made, not trained; anything else is a
            layer of your own, `<file>:<key>`.
        noise: Standard deviation of the denoiser's noise.
        noise_scale: Whether that is `absolute`, or `relative` to each dimension's standard deviation.
        lr: Learning rate of the denoiser.
        steps: Optimiser steps of the denoiser.
        seed: Of the initialisation and the noise.
        trainer: Options of Lightning's Trainer.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
        reuse: Take the one that an earlier command made with these very options on these very data, if it did.
    """
    if kind not in BUILT_IN and ":" not in kind and not Path(kind).exists():
        raise InputError(f"Expected a teacher out of {', '.join(BUILT_IN)}, or <file>:<key>, but got {kind!r}.")
    data.prepare_data()
    data.setup()
    settings: dict[str, Any] = {"teacher": kind, "data": data.digest, "seed": seed}
    if kind == "denoising":
        settings |= {"noise": noise, "noise_scale": noise_scale, "lr": lr, "steps": steps}
        settings |= {name: data.hparams[name] for name in ("batch_size", "replacement")}
    name = kind if kind in BUILT_IN else _name_of(kind)
    path = Path(output) / "teachers" / f"{name}.safetensors"
    if reuse and kind in BUILT_IN and (saved := _saved_teacher(path, settings)):
        return saved
    about = data.description()
    title = f"{name} {about.dim}-d {Path(about.source).stem}"
    params = {**settings, "backbone": about.backbone, "source": about.source}
    with start_run("teacher", title, params=params, tags=lineage(about)) as run:
        moments = Moments.of(data.stream("train"))
        if kind == "denoising":
            std = moments.covariance.diagonal().clamp_min(0).sqrt()
            seed_everything(seed, verbose=False)
            layer = _trained(TeacherModule(data.dim, noise, noise_scale, lr, std), data, steps, trainer or {}, run)
        else:
            layer = _made(kind, data.dim, seed)
        held_out = data.rows("test") if kind == "denoising" else None
        check = check_teacher(layer, moments, held_out, noise, relative=noise_scale == "relative")
        made = Teacher(name, layer, check, path, run.id)
        _keep(made, settings, config, run)
    log.info("Teacher %s: %s (effective rank %.0f).", name, path, check.effective_rank)
    return made


def _trained(
    module: TeacherModule, data: EmbeddingDataModule, steps: int, trainer: Mapping[str, Any], run: Run
) -> nn.Linear:
    """A denoiser after so many steps."""
    options = {**TRAINER_DEFAULTS, **trainer, "max_steps": steps, "enable_checkpointing": False}
    callbacks = [LogLosses(), Progress("training the teacher")]
    Trainer(**options, logger=RunLogger(run), callbacks=callbacks).fit(module, data)
    return module.layer.cpu()


def _made(kind: str, dim: int, seed: int) -> nn.Linear:
    """A layer that needs no training: random, of a given spectrum, or out of a file."""
    if kind == "random":
        return random_teacher(dim, seed=seed)
    return spectral_teacher(dim, seed=seed) if kind == "spectral" else _own(kind, dim)


def _own(spec: str, dim: int) -> nn.Linear:
    """A layer out of a file, for inputs of this width."""
    layer = load_linear(spec)
    if layer.in_features != dim:
        raise InputError(
            f"Expected a layer for the data's {dim} numbers but {spec} takes {layer.in_features}; embed with the model "
            "that the layer belongs to."
        )
    if not layer.weight.any():
        raise InputError(f"Expected a layer that computes something but the weights of {spec} are all zero.")
    return layer


def _keep(made: Teacher, settings: Mapping[str, Any], config: str, run: Run) -> None:
    """Write the layer, with what it was made by, to its file and to the run."""
    figures = {key: value for key, value in asdict(made.check).items() if isinstance(value, float)}
    run.log_metrics(figures)
    if made.check.warning:
        run.set_tags({"warning": made.check.warning})
    made.path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in made.layer.state_dict().items()}
    about = {"settings": json.dumps(settings), "run_id": run.id, "check": json.dumps(asdict(made.check))}
    save_file(tensors, made.path, about)
    run.log_artifact(made.path)
    run.log_text(config, "config.yaml")
    size = f"{made.layer.out_features} × {made.layer.in_features}"
    run.note(f"**{made.name}** teacher, {size}. Checked: `{figures}`")


def _name_of(layer: str) -> str:
    """The name of a layer in a file: the file's name, and the layer's within it.

    >>> _name_of("models/head.safetensors:classifier.dense"), _name_of("head.pt")
    ('head-classifier.dense', 'head')
    """
    file, _, key = layer.rpartition(":")
    return f"{Path(file).stem}-{key}" if file else Path(layer).stem


def _saved_teacher(path: Path, settings: dict[str, Any]) -> Teacher | None:
    """The teacher in a file, if it was made with these very settings on these very data."""
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError), safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["settings"]) == settings:
            log.info("Using the teacher in %s.", path)
            check = TeacherCheck(**json.loads(metadata["check"]))
            return Teacher(settings["teacher"], load_linear(str(path)), check, path, metadata["run_id"])
    return None
