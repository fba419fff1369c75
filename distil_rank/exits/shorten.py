"""Make a shortened backbone: fit the map behind an early layer, measure it, and save it with what it needs to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.deployment.artefact import check_writable, save
from distil_rank.embedding.backbones import Backbone, load_backbone
from distil_rank.embedding.layer_spec import State, split_source
from distil_rank.embedding.provenance import read_provenance
from distil_rank.embedding.shortened import ShortenedManifest, write_shortened
from distil_rank.embedding.store import Store, read_manifest
from distil_rank.errors import InputError
from distil_rank.exits.exit_map import ExitMap, PooledStates, features_of, fit_exit
from distil_rank.exits.measure import ExitScores, measure_exit
from distil_rank.exits.tuning import TrainingOptions, Tuned, tune_exit
from distil_rank.training.exit_training import ExitTraining, RunLog

log = logging.getLogger(__name__)


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
        training: How training the last kept layer went; None where it was not tried.
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
    training: ExitTraining | None = None


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
    layer: int,
    data: EmbeddingDataModule,
    output: Path,
    rank: int | None = None,
    target: Callable[[Tensor], Tensor] | None = None,
    described: str = "the last layer",
    with_weights: bool = False,
    training: TrainingOptions | None = None,
    tail: nn.Module | None = None,
    logger: RunLog | None = None,
) -> tuple[Shortened, ExitMap]:
    """Fit and save the map behind a layer.

    Args:
        backbone: The whole model; must be the one that made the store.
        layer: The last layer to run.
        data: Set up on a store of several layers.
        output: Folder to save to.
        rank: Of the map; full by default.
        target: From the last layer's vectors to what the map is to estimate.
        described: That, in words.
        with_weights: Copy the kept layers' weights.
        training: Train the last kept layer too, which is kept where it clearly wins; None for the closed form alone.
        tail: What stands behind the target, to be matched at its end by training.
        logger: Of the training.

    Raises:
        InputError: no such layer in the store, or another model's store.
    """
    check_writable(output)
    store = open_states(data)
    model = load_backbone(backbone)
    if model.exit is not None:
        raise InputError(f"Expected a whole backbone to shorten but {backbone} is a shortened one; name its original.")
    if store.manifest["weights_sha256"] != model.sha256:
        raise InputError(
            f"Expected a store that {backbone} made but {store.path} was made by {store.manifest['backbone']} with "
            "other weights; embed with the same model."
        )
    features = features_of(layer, store.layers)
    rows = PooledStates(store, features, target)
    origin = {"backbone_sha256": model.sha256, "layer": layer, "target": described}
    found = fit_exit(rows, features, data.split_rows, origin)
    tuned = None
    if training is not None:
        tuned = tune_exit(model, store, found, rows, data.split_rows, training, tail, logger)
        found = tuned.found
    scores = _scores(found, rows, data, rank, tuned)
    student = found.layer if rank is None else found.layer.truncate(rank)
    metrics = {**asdict(scores), "ridge_curve": [list(point) for point in found.choice.curve]}
    save(student, output, metrics=metrics, data=asdict(data.description()))
    _write(output, store, model, features, described, with_weights, tuned.weights if tuned else {})
    done = Shortened(
        output,
        layer,
        model.depth,
        ", ".join(map(str, features)),
        described,
        found.choice.ridge,
        student.rank,
        scores,
        measured_cost(store, layer),
        tuned.training if tuned else None,
    )
    return done, found


def _scores(
    found: ExitMap, rows: PooledStates, data: EmbeddingDataModule, rank: int | None, tuned: Tuned | None
) -> ExitScores:
    """On test rows; of a trained layer from its own states."""
    if tuned is None or not tuned.weights:
        return measure_exit(found, rows, data.split_rows.test, rank)
    return measure_exit(found, lambda _: (tuned.features, tuned.target), tuned.rows, rank)


def _write(
    output: Path,
    store: Store,
    model: Backbone,
    features: tuple[State, ...],
    described: str,
    with_weights: bool,
    tuned: dict[str, Tensor],
) -> None:
    kept = features[-1].layer
    state = model.model.state_dict()
    prefixes = ("embed_tokens.", "emb_layer_norm_after.", *(f"layers.{number}." for number in range(kept)))
    manifest = ShortenedManifest(
        model.name if not Path(model.name).exists() else str(Path(model.name).resolve()),
        model.sha256,
        model.depth,
        features,
        store.manifest["pooling"],
        described,
        model.fallback,
        {"heads": model.model.attention_heads, "token_dropout": bool(model.model.token_dropout)},
    )
    weights = {key: value for key, value in state.items() if key.startswith(prefixes)} if with_weights else None
    write_shortened(output, manifest, weights, tuned or None)


def measured_cost(store: Store, layer: int) -> float | None:
    """Share of the whole backbone's time up to a layer, as measured by the last extraction; None where it was not."""
    for extraction in reversed(read_provenance(store.path)["extractions"]):
        for cost in extraction.get("layer_costs", []):
            if cost["layer"] == layer:
                return float(cost["share"])
    return None
