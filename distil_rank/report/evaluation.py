"""An evaluation as a report, with a picture of function against bytes."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distil_rank.evaluation.evaluate import Evaluation
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
    """Function against bytes, with lines for what needs no embedding and for chance."""
    headline = evaluation.headline
    stored = [entry for entry in evaluation.entries if entry.bytes is not None and entry.role != "baseline"]
    widest = max(entry.bytes or 0 for entry in stored)
    with picture(path, 1, 1, (6.5, 4.5)) as axes:
        ax = axes[0, 0]
        for entry in stored:
            score, colour, x = entry.scores[headline], ROLE_COLOURS[entry.role], entry.bytes or 0
            spread = ([score.value - score.low], [score.high - score.value])
            ax.errorbar(x, score.value, spread, fmt="o", color=colour, capsize=2)
            place: Any = {"xytext": (-6, 3), "ha": "right"} if x == widest else {"xytext": (6, 3), "ha": "left"}
            ax.annotate(entry.name, (x, score.value), textcoords="offset points", fontsize=7, color=colour, **place)
        for entry in evaluation.entries:
            if style := {"baseline": "--", "chance": ":"}.get(entry.role):
                reference_line(ax, entry.name, entry.scores[headline].value, ROLE_COLOURS[entry.role], style)
        bytes_axis(ax)
        ax.set_title(title(evaluation), loc="left")
        ax.set_ylabel(headline)
        ax.set_ylim(bottom=0)
        ax.margins(x=0.12)
