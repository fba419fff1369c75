"""An evaluation as a report, with a picture of function against bytes."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distil_rank.evaluation.evaluate import Entry, Evaluation
from distil_rank.measure.statistics import Interval
from distil_rank.report.figures import STYLE, label_line
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
    """Each representation with its bytes, scores and what it retains of the full vector's."""
    e = evaluation
    data = {"schema": SCHEMA, **asdict(e)}
    return Report([table(e)], [f"Groups: {e.groups}.", *e.notes], METHOD, data=data, draw=partial(draw, e))


def table(evaluation: Evaluation) -> Table:
    """The table of the report."""
    headline = evaluation.headline
    head = ["representation", "bytes", headline, "95 %", "retained", "retained 95 %"]
    rows = []
    for entry in evaluation.entries:
        score, retained = entry.scores[headline], entry.retained.get(headline)
        cells = [entry.name, "–" if entry.bytes is None else f"{entry.bytes:,.0f}"]
        cells += [number(score.value, 3), _ends(score)]
        if retained is None:
            cells += ["1" if entry.role == "reference" else "–", ""]
        else:
            tie = " ≈" if retained.low <= 1 <= retained.high else ""
            cells += [f"{retained.value:.3f}{tie}", _ends(retained)]
        rows.append(cells + [number(entry.scores[metric].value, 3) for metric in evaluation.metrics[1:]])
    narrow = (*evaluation.metrics[:0:-1], "95 %", "retained 95 %")
    return Table(title(evaluation), [*head, *evaluation.metrics[1:]], rows, narrow)


def _ends(interval: Interval) -> str:
    return "" if not math.isfinite(interval.low) else f"[{interval.low:.3f}, {interval.high:.3f}]"


def title(evaluation: Evaluation) -> str:
    """What stands above the table."""
    return f"{evaluation.task} by {evaluation.labels}: {evaluation.evaluated:,} proteins evaluated"


def draw(evaluation: Evaluation, path: Path) -> None:
    """Function against bytes."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6.5, 4.5))
        stored = [entry for entry in evaluation.entries if entry.bytes is not None and entry.role != "baseline"]
        _panel(ax, evaluation, [(entry, float(entry.bytes or 0)) for entry in stored])
        ax.set(xlabel="bytes stored for each protein", ylabel=evaluation.headline)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_title(title(evaluation), loc="left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _panel(ax: Axes, evaluation: Evaluation, points: list[tuple[Entry, float]]) -> None:
    for place, (entry, x) in enumerate(sorted(points, key=lambda point: point[1])):
        score, colour = entry.scores[evaluation.headline], ROLE_COLOURS[entry.role]
        ax.errorbar(
            x, score.value, ([score.value - score.low], [score.high - score.value]), fmt="o", color=colour, capsize=2
        )
        end, offset = (score.low, (0, -10)) if place % 2 else (score.high, (0, 4))  # in turn, so that names have room
        ax.annotate(entry.name, (x, end), offset, textcoords="offset points", fontsize=7, color=colour, ha="center")
    for entry in evaluation.entries:
        if entry.role in ("baseline", "chance"):
            value = entry.scores[evaluation.headline].value
            ax.axhline(value, color=ROLE_COLOURS[entry.role], ls="--" if entry.role == "baseline" else ":", lw=1)
            label_line(ax, entry.name, value, ROLE_COLOURS[entry.role])
    ax.set_ylim(bottom=0)
    ax.margins(x=0.12)
