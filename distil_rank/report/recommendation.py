"""How a recommendation is shown: three lines, the Pareto front as table and picture, JSON, and a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from distil_rank.embedding.layers import split_source
from distil_rank.recommendation.result import SCHEMA, Pipeline, Recommendation
from distil_rank.report.figures import bytes_axis, picture, reference_line
from distil_rank.report.writer import Report, Table

CHOSEN, FRONT, OTHER, BASELINE = "#D55E00", "#0072B2", "#BBBBBB", "#009E73"
METRICS = {"variance": "principal components", "whitened": "whitened directions", "invariant": "the invariant code"}
NUMBERS = {"bit": "signs", "int8": "int8 numbers", "float32": "float32 numbers"}
METHOD = (
    "Chosen on validation groups by the one-sided 95 % lower end of what is retained; the claim comes from "
    "confirmation groups that nothing was fitted or chosen on. Intervals: t-interval of the logarithm of the ratio, "
    "jackknife over groups. Retained: score ÷ the full vector's."
)


def lines(result: Recommendation) -> list[str]:
    """What to use, what it costs, what it retains and how sure that is: three lines."""
    own, full, pipeline = result.confirmed, result.full, result.chosen.pipeline
    where = "" if pipeline.layer is None else f"layer {pipeline.layer} and "
    use = f"Use {where}{METRICS[pipeline.metric]} of {pipeline.rank} {NUMBERS[pipeline.dtype]}."

    less = f"{full.bytes / own.bytes:,.0f}x less"
    cost = f"It takes {own.bytes:,} bytes a protein instead of {full.bytes:,} ({less})"
    exits = {one.layer: one.seconds_per_1000 for one in result.costs}
    if pipeline.layer in exits and own.time is not None:
        whole = max(one.seconds_per_1000 / one.share for one in result.costs)
        seconds = f"{exits[pipeline.layer]:.3g} s per 1,000 proteins instead of {whole:.3g}"
        cost += f" and {own.time:.2f} of the time ({seconds})"
    if result.query_seconds:
        ours, theirs = (1e6 * seconds for seconds in result.query_seconds)
        cost += f"; a query takes {ours:,.0f} µs instead of {theirs:,.0f}"

    shares = " and ".join(
        f"{one.value:.3f} of the full vector's {metric} on {name} (95 %: {one.low:.3f} to {one.high:.3f})"
        for name, metric, one in zip(result.tasks, result.metrics, own.retained, strict=True)
    )
    verdict = {
        "confirmed": f"at least the {result.keep:g} that was asked for",
        "not confirmed": f"NOT CONFIRMED, at least {own.at_least:.3f} where {result.keep:g} was asked for",
        "nothing keeps it": f"NOTHING RETAINS {result.keep:g} on the validation groups; this retains most",
    }[result.verdict]
    once = f"measured once on {result.proteins[2]:,} proteins of {result.groups[2]:,} untouched groups"
    return [use, f"{cost}.", f"It retains {shares}, {once}: {verdict}."]


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
            warning = f"{one.name} needs no embedding and does no worse than the full vector on {result.tasks[0]}."
            notes.append(f"WARNING: {warning}")
        notes.append(f"{one.name} on the confirmation groups: {one.retained:.3f} of the full vector.")
    answer = Table("", ["what to use, what it costs, what it retains"], [[line] for line in lines(result)])
    data = {"schema": SCHEMA, **asdict(result)}
    return Report([table(result)], [*notes, *result.notes], METHOD, answer, data, partial(draw, result))


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
    keys = ("backbone", "pooling", "precision", "long", "max_length")
    options = {key: about[key] for key in keys if about.get(key) is not None}
    if options.get("precision") == "int8" and about.get("source"):
        options["calibration"] = str(split_source(about["source"])[0])
    if result.chosen.pipeline.layer is not None:
        options["layer"] = result.chosen.pipeline.layer
    options["code"] = str(encoder)
    words = "".join(f"# {line}\n" for line in lines(result))
    return words + "".join(f"{key}: {json.dumps(value)}\n" for key, value in options.items())  # JSON is YAML


def draw(result: Recommendation, path: Path) -> None:
    """Function retained against bytes, and against time where it was measured; the choice is marked."""
    timed = len({outcome.time for outcome in result.outcomes}) > 1
    with picture(path, 1, 1 + timed, (6.5, 4.6), sharey=True) as axes:
        first, *others = axes[0]
        _panel(first, result, {outcome.pipeline: outcome.bytes for outcome in result.outcomes})
        bytes_axis(first)
        first.set_ylabel(f"{result.metrics[0]} ÷ the full vector's")
        first.set_title(f"{len(result.outcomes):,} pipelines for {' and '.join(result.tasks)}", loc="left")
        for ax in others:
            _panel(ax, result, {outcome.pipeline: outcome.time or 1.0 for outcome in result.outcomes})
            ax.set(xlabel="share of the full backbone's time", xlim=(0, 1.08))


def _panel(ax: Axes, result: Recommendation, x: Mapping[Pipeline, float]) -> None:
    """All pipelines, the front, the choice with the confirmed interval, and lines for what it is compared with."""
    front = {outcome.pipeline for outcome in result.front}
    rest = [one for one in result.outcomes if one.pipeline not in front]
    ax.scatter([x[one.pipeline] for one in rest], [one.worst for one in rest], 8, OTHER, label="other pipelines")
    label = "Pareto front (validation groups)"
    ax.scatter([x[one.pipeline] for one in result.front], [one.worst for one in result.front], 16, FRONT, label=label)
    if result.chosen.pipeline in x:
        one = min(result.confirmed.retained, key=attrgetter("value"))
        spread = ([one.value - one.low], [one.high - one.value])
        marks: Any = {"fmt": "*", "ms": 13, "color": CHOSEN, "capsize": 3, "label": "chosen, confirmed (95 %)"}
        ax.errorbar(x[result.chosen.pipeline], one.value, spread, zorder=3, **marks)
    reference_line(ax, "full vector", 1)
    ax.axhline(result.keep, color=CHOSEN, lw=1, ls=":")
    for baseline in result.baselines:
        reference_line(ax, baseline.name, baseline.retained, BASELINE, "--")
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower right", fontsize=7)
