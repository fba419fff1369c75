"""Make a shortened backbone: fit the map behind an early layer, measure it, and save it with what it needs to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.splits import Split
from distil_rank.deployment.artefact import check_writable, save
from distil_rank.embedding.backbones import Backbone, load_backbone
from distil_rank.embedding.esm2 import check_exact
from distil_rank.embedding.layer_spec import split_source
from distil_rank.embedding.provenance import read_provenance
from distil_rank.embedding.shortened import ShortenedManifest, write_shortened
from distil_rank.embedding.store import Store, read_manifest
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows, augment
from distil_rank.exits.bos_layers import with_bos_layers
from distil_rank.exits.exit_map import Augmentation, ExitMap, PooledStates, features_of, fit_exit
from distil_rank.exits.function import FunctionKept, function_kept
from distil_rank.exits.measure import ExitScores, measure_exit
from distil_rank.exits.tuning import TrainingOptions, Tuned, tune_exit
from distil_rank.tasks.labelled import LabelledData
from distil_rank.training.exit_training import ExitTraining, RunLog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to shorten a backbone.

    Attributes:
        layer: The last layer to run.
        rank: Of the map; full by default.
        target: From the last layer's vectors to what the map is to estimate.
        described: That, in words.
        tail: What stands behind the target, to be matched at its end by training.
        bos_layers: Further layers that only the BOS token runs.
        copies: Perturbed copies of each protein to fit to besides; used where validation says that they help.
        training: Beyond the closed form, kept where it clearly wins; None for the closed form alone.
        with_weights: Copy the kept layers' weights.
    """

    layer: int
    rank: int | None = None
    target: Callable[[Tensor], Tensor] | None = None
    described: str = "the last layer"
    tail: nn.Module | None = None
    bos_layers: int = 0
    copies: int = 0
    training: TrainingOptions | None = None
    with_weights: bool = False

    @property
    def bos_only_after(self) -> int | None:
        """The layer behind which the BOS token goes on alone; None where it does not."""
        return self.layer if self.bos_layers else None


@dataclass(frozen=True)
class Shortened:
    """A saved shortened backbone.

    Attributes:
        folder: Where it is.
        layer: The last layer that runs.
        depth: Layers of the whole backbone.
        features: The states that are pooled.
        target: What the map estimates, in words.
        ridge: λ.
        rank: Of the map.
        scores: On test rows.
        cost: Share of the whole backbone's time, measured when the store was made; None where it was not.
        augmentation: What perturbed copies added; None without.
        training: How training went; None where it was not tried.
        function: What the map's output keeps of the last layer's vector on a labelled task; None without labels.
    """

    folder: Path
    layer: int
    depth: int
    features: str
    target: str
    ridge: float
    rank: int
    scores: ExitScores
    cost: float | None
    augmentation: Augmentation | None = None
    training: ExitTraining | None = None
    function: FunctionKept | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For a reader, by name."""
        shown = ("folder", "layer", "depth", "features", "target", "ridge", "rank", "cost")
        facts = {**{name: getattr(self, name) for name in shown}, **asdict(self.scores)}
        if (more := self.augmentation) is not None:
            verdict = "used" if more.used else "no better, not used"
            facts["copies"] = f"{more.copies:,}: validation R² {more.without:.4f} to {more.r2:.4f}, {verdict}"
        if (training := self.training) is not None:
            facts["training"] = str(training)
        if (function := self.function) is not None:
            facts["function"] = (
                f"{function.score:.3f} of {function.metric} on {function.labels}, {function.full:.3f} by all layers"
            )
        return facts


def layers_needed(layer: int, depth: int) -> str:
    """What to embed for an exit behind a layer: it, the earlier ones, and the last, its target.

    Raises:
        InputError: the layer is not between the first and the one before the last.

    >>> layers_needed(3, 6)
    '1,2,3,3n,6'
    """
    if not 1 <= layer < depth:
        raise InputError(f"Expected an exit behind a layer from 1 to {depth - 1}, before the last, but got {layer}.")
    return ",".join([*map(str, range(1, layer + 1)), f"{layer}n", str(depth)])


def open_states(data: EmbeddingDataModule) -> Store:
    """The store of several layers behind the data.

    Raises:
        InputError: it is a file, or a store of one layer.
    """
    path = split_source(data.source)[0]
    if read_manifest(path) is None:
        raise InputError(f"Expected a store of several layers but {path} is none; make it with embed --layer all.")
    store = Store.open(path)
    if not store.layers:
        raise InputError(
            f"Expected a store of several layers but {path} holds layer {store.manifest['layer']} only; embed with "
            "--layer all into another."
        )
    return store


def shorten(
    backbone: str,
    data: EmbeddingDataModule,
    output: Path,
    recipe: Recipe,
    copies_folder: Path = Path("results/copies"),
    logger: RunLog | None = None,
    task: LabelledData | None = None,
) -> tuple[Shortened, ExitMap]:
    """Fit and save the map behind a layer.

    Args:
        backbone: The whole model; must be the one that made the store.
        data: Set up on a store of several layers.
        output: Folder to save to.
        recipe: What to make.
        copies_folder: For the stores of copies.
        logger: Of the training.
        task: Labels of the store's proteins, to measure what is kept of a function.

    Raises:
        InputError: no such layer in the store, or another model's store.
    """
    check_writable(output)
    store = open_states(data)
    model, split = _whole(backbone, store), data.split_rows
    rows, copies = _rows(model, store, split, recipe, copies_folder)
    origin = {"backbone_sha256": model.sha256, "layer": recipe.layer, "target": recipe.described}
    found, tuned = fit_exit(rows, rows.features, split, origin, copies), None
    if (options := recipe.training) is not None:
        alone = recipe.bos_only_after
        tuned = tune_exit(model, store, found, rows, split, options, recipe.tail, logger, copies, alone)
        found = tuned.found
    judged = None
    if task is not None:
        judged = function_kept(task, store, *_outputs(found, rows, split.test, recipe.rank, tuned))
    done = Shortened(
        output,
        recipe.layer,
        model.depth,
        ", ".join(map(str, rows.features)),
        recipe.described,
        found.choice.ridge,
        min(found.layer.rank, recipe.rank or found.layer.rank),
        _scores(found, rows, split.test, recipe.rank, tuned),
        None if recipe.bos_layers else measured_cost(store, recipe.layer),
        found.augmentation,
        tuned.training if tuned else None,
        judged,
    )
    _save(done, found, data, recipe, store, model, tuned)
    return done, found


def _rows(
    model: Backbone, store: Store, split: Split, recipe: Recipe, folder: Path
) -> tuple[PooledStates, AugmentedRows | None]:
    """Features and targets of the store's proteins, and of copies of those that are fitted to."""
    features, copies = features_of(recipe.layer, store.layers), None
    rows = PooledStates(store, features, recipe.target)
    if recipe.copies:
        fitted = np.concatenate([split.train, split.val])
        copies = augment(store, features, fitted, recipe.copies, folder, recipe.target)
    if recipe.bos_layers:
        rows, copies = with_bos_layers(model, store, rows, copies, recipe.layer, recipe.bos_layers)
    return rows, copies


def _whole(backbone: str, store: Store) -> Backbone:
    """The model that is to be shortened, which must have made the store."""
    model = load_backbone(backbone)
    if model.exit is not None:
        raise InputError(f"Expected a whole backbone to shorten but {backbone} is a shortened one; name its original.")
    check_exact(model.model)
    if store.manifest["weights_sha256"] != model.sha256:
        raise InputError(
            f"Expected a store that {backbone} made but {store.path} was made by {store.manifest['backbone']} with "
            "other weights; embed with the same model."
        )
    return model


def _scores(found: ExitMap, rows: PooledStates, test: np.ndarray, rank: int | None, tuned: Tuned | None) -> ExitScores:
    """On test rows; of a trained layer from its own states."""
    if tuned is None or not tuned.weights:
        return measure_exit(found, rows, test, rank)
    return measure_exit(found, lambda _: (tuned.features, tuned.target), tuned.rows, rank)


@torch.no_grad()
def _outputs(
    found: ExitMap, rows: PooledStates, test: np.ndarray, rank: int | None, tuned: Tuned | None
) -> tuple[np.ndarray, Tensor]:
    """Numbers of test rows, and what the map gives for them."""
    layer = found.layer if rank is None else found.layer.truncate(rank)
    if tuned is None or not tuned.weights:
        return test, layer(rows(test)[0])
    return tuned.rows, layer(tuned.features)


def _save(
    done: Shortened,
    found: ExitMap,
    data: EmbeddingDataModule,
    recipe: Recipe,
    store: Store,
    model: Backbone,
    tuned: Tuned | None,
) -> None:
    """The map's artefact with what was measured, and the manifest of the shortened backbone beside it."""
    metrics: dict[str, Any] = {
        **asdict(done.scores),
        "cost": done.cost,
        "ridge_curve": [list(point) for point in found.choice.curve],
        "augmentation": done.augmentation and asdict(done.augmentation),
        "training": done.training and asdict(done.training),
        "function": done.function and asdict(done.function),
    }
    student = found.layer if recipe.rank is None else found.layer.truncate(recipe.rank)
    save(student, done.folder, metrics=metrics, data=asdict(data.description()))
    state = model.model.state_dict()
    prefixes = (
        "embed_tokens.",
        "emb_layer_norm_after.",
        *(f"layers.{number}." for number in range(found.features[-1].layer)),
    )
    manifest = ShortenedManifest(
        model.name if not Path(model.name).exists() else str(Path(model.name).resolve()),
        model.sha256,
        model.depth,
        found.features,
        store.manifest["pooling"],
        recipe.described,
        model.fallback,
        {"heads": model.model.attention_heads, "token_dropout": bool(model.model.token_dropout)},
        recipe.bos_only_after,
    )
    weights = {key: value for key, value in state.items() if key.startswith(prefixes)} if recipe.with_weights else None
    write_shortened(done.folder, manifest, weights, (tuned.weights or None) if tuned else None)


def measured_cost(store: Store, layer: int) -> float | None:
    """Share of the whole backbone's time up to a layer, as measured by the last extraction; None where it was not."""
    for extraction in reversed(read_provenance(store.path)["extractions"]):
        for cost in extraction.get("layer_costs", []):
            if cost["layer"] == layer:
                return float(cost["share"])
    return None
