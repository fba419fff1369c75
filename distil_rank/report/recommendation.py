"""How a recommendation is shown: three lines, the Pareto front as table and picture, JSON, and a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distil_rank.embedding.layers import split_source
from distil_rank.recommendation.result import SCHEMA, Outcome, Recommendation
from distil_rank.report.figures import STYLE, label_line
from distil_rank.report.writer import Report, Table

CHOSEN, FRONT, OTHER, BASELINE = "#D55E00", "#0072B2", "#BBBBBB", "#009E73"
METHOD = (
    "Chosen on validation groups by the one-sided 95 % lower end of what is retained; the claim comes from "
    "confirmation groups that nothing was fitted or chosen on. Intervals: t-interval of the logarithm of the ratio, "
    "jackknife over groups. Retained: score ÷ the full vector's."
)


def lines(result: Recommendation) -> list[str]:
    """What to use, what it costs, what it retains and how sure that is."""
    chosen, full, pipeline = result.confirmed, result.full, result.chosen.pipeline
    metric = {
        "variance": "principal components",
        "whitened": "whitened directions",
        "invariant": "the invariant code",
    }[pipeline.metric]
    where = "" if pipeline.layer is None else f"layer {pipeline.layer} and "
    numbers = {"bit": "signs", "int8": "int8 numbers", "float32": "float32 numbers"}[pipeline.dtype]
    use = f"Use {where}{metric} of {pipeline.rank} {numbers}."
    cost = (
        f"It takes {chosen.bytes:,} bytes a protein instead of {full.bytes:,} ({full.bytes / chosen.bytes:,.0f}x less)"
    )
    exits = {one.layer: one for one in result.costs}
    if pipeline.layer in exits and chosen.time is not None:
        mine, whole = exits[pipeline.layer], max(one.seconds_per_1000 / one.share for one in result.costs)
        cost += (
            f" and {chosen.time:.2f} of the time ({mine.seconds_per_1000:.3g} s per 1,000 proteins instead of "
            f"{whole:.3g})"
        )
    if result.query_seconds:
        ours, theirs = (1e6 * seconds for seconds in result.query_seconds)
        cost += f"; a query takes {ours:,.0f} µs instead of {theirs:,.0f}"
    return [use, cost + ".", _claim(result)]


def _claim(result: Recommendation) -> str:
    parts = []
    for name, metric, interval in zip(result.tasks, result.metrics, result.confirmed.retained, strict=True):
        ends = f"(95 %: {interval.low:.3f} to {interval.high:.3f})"
        parts.append(f"{interval.value:.3f} of the full vector's {metric} on {name} {ends}")
    where = f"{result.proteins[2]:,} proteins of {result.groups[2]:,} untouched groups"
    claim = f"It retains {' and '.join(parts)}, measured once on {where}"
    least = result.confirmed.at_least
    return (
        claim
        + {
            "confirmed": f": at least the {result.keep:g} that was asked for.",
            "not confirmed": f": NOT CONFIRMED, at least {least:.3f} where {result.keep:g} was asked for.",
            "nothing keeps it": f": NOTHING RETAINS {result.keep:g} on the validation groups; this retains most.",
        }[result.verdict]
    )


def recommendation_report(result: Recommendation) -> Report:
    """The Pareto front on the validation groups, with the three lines of the answer."""
    fit, validate, confirm = result.proteins[:3]
    groups = " / ".join(f"{count:,}" for count in result.groups[:3])
    notes = [
        f"Groups ({result.grouping}): {groups} with {fit:,} / {validate:,} / {confirm:,} proteins to fit, to choose "
        "and to confirm on.",
        f"Noise of the invariant metric: {result.noise}.",
        f"{len(result.outcomes):,} pipelines compared in {result.seconds:.0f} s.",
    ]
    for one in result.baselines:
        if one.retained >= 1:
            notes.append(
                f"WARNING: {one.name} needs no embedding and does no worse than the full vector on {result.tasks[0]}."
            )
        notes.append(f"{one.name} on the confirmation groups: {one.retained:.3f} of the full vector.")
    return Report(
        [table(result)],
        [*notes, *result.notes],
        METHOD,
        lines(result),
        "what to use, what it costs, what it retains",
        {"schema": SCHEMA, **asdict(result)},
        partial(draw, result),
    )


def table(result: Recommendation) -> Table:
    """The Pareto front on the validation groups; the choice is marked."""
    timed = any(outcome.time is not None for outcome in result.front)
    head = ["pipeline", "bytes", *(["time"] if timed else [])]
    for name in result.tasks:
        head += [f"retained, {name}"] if len(result.tasks) > 1 else ["retained", "at least"]
    rows = []
    for outcome in result.front:
        mark = " ←" if outcome.pipeline == result.chosen.pipeline else ""
        cells = [f"{outcome.pipeline}{mark}", f"{outcome.bytes:,}"]
        cells += [f"{outcome.time:.2f}" if outcome.time is not None else "–"] if timed else []
        for interval in outcome.retained:
            cells += [f"{interval.value:.3f}", *([f"{interval.low:.3f}"] if len(result.tasks) == 1 else [])]
        rows.append(cells)
    title = f"Pipelines for {' and '.join(result.tasks)}: the Pareto front on the validation groups"
    return Table(title, head, rows)


def configuration(result: Recommendation, encoder: Path, about: Mapping[str, Any]) -> str:
    """Options of `distil-rank embed` for the chosen pipeline, as YAML, under the three lines."""
    options = {
        key: about[key]
        for key in ("backbone", "pooling", "precision", "long", "max_length")
        if about.get(key) is not None
    }
    if options.get("precision") == "int8" and about.get("source"):
        options["calibration"] = str(split_source(about["source"])[0])
    if result.chosen.pipeline.layer is not None:
        options["layer"] = result.chosen.pipeline.layer
    options["code"] = str(encoder)
    words = "".join(f"# {line}\n" for line in lines(result))
    return words + "".join(f"{key}: {json.dumps(value)}\n" for key, value in options.items())  # JSON is YAML


def draw(result: Recommendation, path: Path) -> None:
    """Function kept against bytes, and against time where it was measured; the choice is marked."""
    timed = len({outcome.time for outcome in result.outcomes}) > 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 1 + timed, figsize=(6.5 * (1 + timed), 4.6), squeeze=False, sharey=True)
        _panel(axes[0, 0], result, {id(outcome): float(outcome.bytes) for outcome in result.outcomes})
        axes[0, 0].set(xlabel="bytes stored for each protein", ylabel=f"{result.metrics[0]} ÷ the full vector's")
        axes[0, 0].set_xscale("log", base=2)
        axes[0, 0].xaxis.set_major_formatter("{x:,.0f}")
        axes[0, 0].set_title(f"{len(result.outcomes):,} pipelines for {' and '.join(result.tasks)}", loc="left")
        if timed:
            _panel(axes[0, 1], result, {id(outcome): outcome.time or 1.0 for outcome in result.outcomes})
            axes[0, 1].set(xlabel="share of the full backbone's time", xlim=(0, 1.08))
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _panel(ax: Axes, result: Recommendation, x: dict[int, float]) -> None:
    """All pipelines, the front, the choice with the confirmed interval, and lines for what it is compared with."""
    front = {outcome.pipeline for outcome in result.front}
    for others, colour, size in ((True, OTHER, 8), (False, FRONT, 16)):
        some = [outcome for outcome in result.outcomes if (outcome.pipeline in front) != others]
        label = "other pipelines" if others else "Pareto front (validation groups)"
        ax.scatter([x[id(one)] for one in some], [one.worst for one in some], size, colour, label=label, zorder=2)
    chosen = next((one for one in result.outcomes if one.pipeline == result.chosen.pipeline), None)
    if chosen is not None:
        _mark(ax, x[id(chosen)], result.confirmed)
    ax.axhline(1, color="#000000", lw=1)
    ax.axhline(result.keep, color=CHOSEN, lw=1, ls=":")
    label_line(ax, "full vector", 1)
    for baseline in result.baselines:
        ax.axhline(baseline.retained, color=BASELINE, lw=1, ls="--")
        label_line(ax, baseline.name, baseline.retained, BASELINE)
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower right", fontsize=7)


def _mark(ax: Axes, x: float, confirmed: Outcome) -> None:
    interval = min(confirmed.retained, key=lambda one: one.value)
    bar = ([interval.value - interval.low], [interval.high - interval.value])
    ax.errorbar(
        x, interval.value, bar, fmt="*", ms=13, color=CHOSEN, capsize=3, label="chosen, confirmed (95 %)", zorder=3
    )
