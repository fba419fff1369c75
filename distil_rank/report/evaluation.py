"""How a evaluation is shown: table, Markdown, JSON and a picture of function against bytes and against cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distil_rank.evaluation.evaluate import Entry, Evaluation
from distil_rank.measure.statistics import Interval
from distil_rank.report import report
from distil_rank.report.figures import STYLE

SCHEMA = 1
METHOD = (
    "Judged on groups that nothing was fitted on. Intervals are 95 % percentile intervals of a paired bootstrap over "
    "groups (2000 samples, the same for every row). Kept: score ÷ the full vector's; ≈ marks a tie with it: the "
    "interval holds 1."
)
ROLE_COLOURS = {
    "reference": "#000000",
    "student": "#0072B2",
    "matrix": "#009E73",
    "baseline": "#D55E00",
    "chance": "#999999",
}


def table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each representation with its bytes, cost, scores and what it keeps of the full vector's."""
    headline = evaluation.headline
    costs = any(entry.cost is not None for entry in evaluation.entries if entry.role != "baseline")
    head = ["representation", "bytes", *(["cost"] if costs else []), headline, "95 %", "retained", "kept 95 %"]
    rows = []
    for entry in evaluation.entries:
        score, retained = entry.scores[headline], entry.retained.get(headline)
        cells = [entry.name, "–" if entry.bytes is None else f"{entry.bytes:,.0f}"]
        cells += ["–" if entry.cost is None else f"{entry.cost:.2f}"] if costs else []
        cells += [_number(score.value), _interval(score)]
        cells += (
            ["1" if entry.role == "reference" else "–", ""]
            if retained is None
            else [_kept(entry, retained), _interval(retained)]
        )
        rows.append(cells + [_number(entry.scores[metric].value) for metric in evaluation.metrics[1:]])
    return [*head, *evaluation.metrics[1:]], rows


def _kept(entry: Entry, retained: Interval) -> str:
    return f"{retained.value:.3f}" + (" ≈" if retained.low <= 1 <= retained.high else "")


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _interval(interval: Interval) -> str:
    return "" if not math.isfinite(interval.low) else f"[{interval.low:.3f}, {interval.high:.3f}]"


def title(evaluation: Evaluation) -> str:
    """What stands above the table."""
    return f"{evaluation.task} by {evaluation.labels}: {evaluation.judged:,} proteins judged"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader must know beside the numbers."""
    return [f"Groups: {evaluation.groups}.", *evaluation.notes]


def markdown(evaluation: Evaluation) -> str:
    """The table and its notes."""
    lines = "".join(f"- {line}\n" for line in notes(evaluation))
    return f"### {title(evaluation)}\n\n{report.markdown_table(*table(evaluation))}\n{lines}\n{METHOD}\n"


def show(evaluation: Evaluation) -> None:
    """Print the table and its notes."""
    report.show_table(title(evaluation), *table(evaluation), narrow=(*evaluation.metrics[:0:-1], "95 %", "kept 95 %"))
    report.show_notes(notes(evaluation))


def as_json(evaluation: Evaluation) -> str:
    """The evaluation as `docs/evaluate.md` documents it; figures that are not numbers become null."""
    return json.dumps({"schema": SCHEMA, **finite(asdict(evaluation))}, indent=1, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The same with null for figures that are not numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write JSON, Markdown and picture; returns their paths."""
    return save_files(folder / "evaluation", as_json(evaluation), markdown(evaluation), partial(draw, evaluation))


def save_files(stem: Path, as_json: str, markdown: str, draw: Callable[[Path], None]) -> list[Path]:
    """Write STEM.json, STEM.md and STEM.png; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    files[0].write_text(as_json)
    files[1].write_text(markdown)
    draw(files[2])
    return files


def draw(evaluation: Evaluation, path: Path) -> None:
    """Function against bytes, and against cost where two representations have one."""
    costed = [entry for entry in evaluation.entries if entry.cost is not None and entry.role != "baseline"]
    with plt.rc_context(STYLE):
        panels = 1 + (len(costed) > 1)
        figure, axes = plt.subplots(1, panels, figsize=(6.5 * panels, 4.5), squeeze=False, sharey=True)
        stored = [entry for entry in evaluation.entries if entry.bytes is not None and entry.role != "baseline"]
        _panel(axes[0, 0], evaluation, [(entry, float(entry.bytes or 0)) for entry in stored])
        axes[0, 0].set(xlabel="bytes stored for each protein", ylabel=evaluation.headline)
        axes[0, 0].set_xscale("log", base=2)
        axes[0, 0].xaxis.set_major_formatter("{x:,.0f}")
        if panels == 2:
            _panel(axes[0, 1], evaluation, [(entry, float(entry.cost or 0)) for entry in costed])
            axes[0, 1].set(xlabel="share of the full backbone's cost", xlim=(0, 1.05))
        axes[0, 0].set_title(title(evaluation), loc="left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _panel(ax: Axes, evaluation: Evaluation, points: list[tuple[Entry, float]]) -> None:
    for number, (entry, x) in enumerate(sorted(points, key=lambda point: point[1])):
        score, colour = entry.scores[evaluation.headline], ROLE_COLOURS[entry.role]
        ax.errorbar(
            x, score.value, ([score.value - score.low], [score.high - score.value]), fmt="o", color=colour, capsize=2
        )
        end, place = (score.low, (0, -10)) if number % 2 else (score.high, (0, 4))  # in turn, so that names have room
        ax.annotate(entry.name, (x, end), place, textcoords="offset points", fontsize=7, color=colour, ha="center")
    for entry in evaluation.entries:
        if entry.role in ("baseline", "chance"):
            value = entry.scores[evaluation.headline].value
            ax.axhline(value, color=ROLE_COLOURS[entry.role], ls="--" if entry.role == "baseline" else ":", lw=1)
            ax.annotate(
                entry.name,
                (1, value),
                (-4, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=7,
                ha="right",
                color=ROLE_COLOURS[entry.role],
            )
    ax.set_ylim(bottom=0)
    ax.margins(x=0.12)
