"""An evaluation as a report, with a picture of function against bytes and against cost."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from distil_rank.evaluation.evaluate import Entry, Evaluation
from distil_rank.measure.statistics import Interval
from distil_rank.report.figures import bytes_axis, picture, reference_line
from distil_rank.report.writer import Report, Table, number

SCHEMA = 1
METHOD = (
    "Evaluated on groups that nothing was fitted on. Intervals are 95 % percentile intervals of a paired bootstrap "
    "over groups (2000 samples, the same for every row). Retained: score ÷ the full vector's; ≈ marks a tie with it: "
    "the interval holds 1."
)
ROLE_COLOURS = {
    "reference": "#000000",
    "student": "#0072B2",
    "matrix": "#009E73",
    "baseline": "#D55E00",
    "chance": "#999999",
}


def evaluation_report(evaluation: Evaluation) -> Report:
    """Each representation with its bytes, cost, scores and what it retains of the full vector's."""
    e = evaluation
    data = {"schema": SCHEMA, **asdict(e)}
    return Report([table(e)], [f"Groups: {e.groups}.", *e.notes], METHOD, data=data, draw=partial(draw, e))


def table(evaluation: Evaluation) -> Table:
    """The table of the report."""
    headline = evaluation.headline
    costs = any(entry.cost is not None for entry in evaluation.entries if entry.role != "baseline")
    head = ["representation", "bytes", *(["cost"] if costs else []), headline, "95 %", "retained", "retained 95 %"]
    rows = []
    for entry in evaluation.entries:
        score, retained = entry.scores[headline], entry.retained.get(headline)
        cells = [entry.name, "–" if entry.bytes is None else f"{entry.bytes:,.0f}"]
        cells += ["–" if entry.cost is None else f"{entry.cost:.2f}"] if costs else []
        cells += [number(score.value, 3), _ends(score)]
        if retained is None:
            cells += ["1" if entry.role == "reference" else "–", ""]
        else:
            cells += [f"{retained.value:.3f}" + " ≈" * entry.ties(headline), _ends(retained)]
        rows.append(cells + [number(entry.scores[metric].value, 3) for metric in evaluation.metrics[1:]])
    narrow = (*evaluation.metrics[:0:-1], "95 %", "retained 95 %")
    return Table(title(evaluation), [*head, *evaluation.metrics[1:]], rows, narrow)


def _ends(interval: Interval) -> str:
    return "" if not math.isfinite(interval.low) else f"[{interval.low:.3f}, {interval.high:.3f}]"


def title(evaluation: Evaluation) -> str:
    """What stands above the table."""
    return f"{evaluation.task} by {evaluation.labels}: {evaluation.judged:,} proteins evaluated"


def draw(evaluation: Evaluation, path: Path) -> None:
    """Function against bytes, and against cost where two representations have one."""
    own = [entry for entry in evaluation.entries if entry.role != "baseline"]
    costs = [(entry, entry.cost) for entry in own if entry.cost is not None]
    with picture(path, 1, 1 + (len(costs) > 1), (6.5, 4.5), sharey=True) as axes:
        first, *others = axes[0]
        _panel(first, evaluation, [(entry, entry.bytes) for entry in own if entry.bytes is not None])
        bytes_axis(first)
        first.set_ylabel(evaluation.headline)
        first.set_title(title(evaluation), loc="left")
        for ax in others:
            _panel(ax, evaluation, costs)
            ax.set(xlabel="share of the full backbone's cost", xlim=(0, 1.05))


def _panel(ax: Axes, evaluation: Evaluation, points: list[tuple[Entry, float]]) -> None:
    widest = max(x for _, x in points)
    for entry, x in points:
        score, colour = entry.scores[evaluation.headline], ROLE_COLOURS[entry.role]
        spread = ([score.value - score.low], [score.high - score.value])
        ax.errorbar(x, score.value, spread, fmt="o", color=colour, capsize=2)
        place: Any = {"xytext": (-6, 3), "ha": "right"} if x == widest else {"xytext": (6, 3), "ha": "left"}
        ax.annotate(entry.name, (x, score.value), textcoords="offset points", fontsize=7, color=colour, **place)
    for entry in evaluation.entries:
        if style := {"baseline": "--", "chance": ":"}.get(entry.role):
            value = entry.scores[evaluation.headline].value
            reference_line(ax, entry.name, value, ROLE_COLOURS[entry.role], style)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.12)
