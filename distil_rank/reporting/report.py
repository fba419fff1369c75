"""The report: one dictionary with everything measured, as JSON, as a Markdown table and on the terminal.

`docs/report.md` documents the dictionary; `SCHEMA` rises when a key changes its meaning or goes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from distil_rank.reporting.evaluate import Row

SCHEMA = 1
WIDTH = 100  # characters in a line, where it is not a terminal that says
NARROW = (
    "kept 95 %",
    "rel. MSE",
    "cosine",
    "cos p5",
    "95 %",
    "cen. cos",
    "kNN@10",
    "probe",
)  # what narrow tables go without first
LADDER_COLUMNS = (
    ("r2", "R²"),
    ("centred_cosine", "cen. cos"),
    ("knn_overlap", "kNN@10"),
    ("cosine_p5", "cos p5"),
    ("cosine", "cosine"),
    ("relative_mse", "rel. MSE"),
)


METHOD_NOTE = (
    "Intervals are 95 % percentile intervals of a paired bootstrap over held-out proteins (2000 resamples, the same "
    "for every method). R² and centred cosine are taken about the teacher's mean output on the training rows. kNN@10: "
    "share of the ten nearest neighbours (Euclidean) among the held-out rows that stay. 'optimum' is R² over the "
    "closed form's; ≈ marks a tie with it: the interval of the paired difference holds zero."
)


def assemble(about: dict[str, Any], teachers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The dictionary that the rest of this module, and `figures`, work from."""
    return {"data": about, "teachers": teachers, "method_note": METHOD_NOTE, "seconds": seconds}


def row_as_dict(row: Row) -> dict[str, Any]:
    """One rung as it stands in the JSON."""
    content = asdict(row)
    content["metrics"] = content.pop("estimates")
    return content


def is_of_other_data(path: Path, report: dict[str, Any]) -> bool:
    """Whether a report that stands at `path` is about other data than this one."""
    try:
        return json.loads(path.read_text())["data"]["digest"] != report["data"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_json(report: dict[str, Any], path: Path) -> Path:
    """Write the report; a number that JSON has no word for (NaN, infinity) becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(_finite({"schema": SCHEMA, **report}), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rung(teacher: dict[str, Any], method: str) -> dict[str, Any]:
    """The ladder's row of one method."""
    return next(row for row in teacher["ladder"] if row["method"] == method)


def number(value: float | None, digits: int = 4) -> str:
    """A figure for a table; small ones keep two significant digits.

    >>> number(0.99671), number(0.0000241), number(None)
    ('0.9967', '2.4e-05', '–')
    """
    if value is None:
        return "–"
    if value != 0 and abs(value) < 10 ** (1 - digits):
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def summary_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The original's table: plain SVD beside our student, per teacher."""
    head = ["teacher", "rank", "R²: SVD → ours", "cosine", "rel. MSE", "parameters", "speed-up"]
    rows = []
    for teacher in report["teachers"]:
        svd, ours = rung(teacher, "svd")["metrics"], rung(teacher, "Distil-Rank")["metrics"]
        speed = next((row for row in teacher["latency"] if row["batch"] == 32), None)
        rows.append(
            [
                teacher["teacher"],
                str(teacher["rank"]),
                f"{number(svd['r2']['value'], 3)} → {number(ours['r2']['value'], 3)}",
                f"{number(svd['cosine']['value'])} → {number(ours['cosine']['value'])}",
                f"{number(svd['relative_mse']['value'])} → {number(ours['relative_mse']['value'])}",
                f"{teacher['parameters']['ratio']:.2f}x",
                "–" if speed is None else f"{speed['ratio']:.1f}x",
            ]
        )
    return head, rows


def title_of(teacher: dict[str, Any]) -> str:
    """What stands above a ladder."""
    seeds = max(row["seeds"] for row in teacher["ladder"])
    trained = f" (trained rows: mean of {seeds} seeds)" if seeds > 1 else ""
    return f"{teacher['teacher']} teacher, rank {teacher['rank']}{trained}"


def ladder_rows(teacher: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Every method on the same held-out rows."""
    head = ["method", "R²", "95 %", *(title for _, title in LADDER_COLUMNS[1:]), "optimum"]
    labelled = "probe_accuracy" in teacher["ladder"][0]["metrics"]
    if labelled:
        head.append("probe")
    rows = []
    for row in teacher["ladder"]:
        cells = [row["method"]]
        for key, _ in LADDER_COLUMNS:
            estimate = row["metrics"][key]
            cells.append(number(estimate["value"]))
            if key == "r2":
                cells.append(f"[{number(estimate['low'], 3)}, {number(estimate['high'], 3)}]")
        cells.append(f"{100 * row['share_of_optimum']:.1f} %" + (" ≈" if _tie(row) else ""))
        if labelled:
            cells.append(number(row["metrics"]["probe_accuracy"]["value"], 3))
        rows.append(cells)
    return head, rows


def _tie(row: dict[str, Any]) -> bool:
    return bool(row["ties_with_optimum"]) and row["method"] != "closed_form"


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know beside the numbers: fallbacks, warnings, what was predicted and what was found."""
    lines = []
    data = report["data"]
    if data.get("fallback"):
        lines.append(f"NOTE: {data['fallback']}")
    lines.append(
        f"Data: {data['source']} ({data['backbone']}, {data['pooling']} pooling); train / validation / test rows "
        f"{data['rows']['train']} / {data['rows']['val']} / {data['rows']['test']}; split by {data['split']}."
    )
    for teacher in report["teachers"]:
        lines.append(
            f"{teacher['teacher']}: rank {teacher['rank']} predicted R² {teacher['predicted_r2']:.4f} on the training "
            f"rows, held-out {teacher['held_out_r2']:.4f}{teacher['rank_note']}. {teacher['training_note']}"
            + (f" {teacher['held_out_note']}." if teacher.get("held_out_note") else "")
        )
        if teacher["check"]["warning"]:
            lines.append(f"WARNING: {teacher['check']['warning']}")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown tables, for `report.md` and for the tracking server."""
    parts = [markdown_table(*summary_rows(report))]
    for teacher in report["teachers"]:
        parts.append(f"### {title_of(teacher)}\n")
        parts.append(markdown_table(*ladder_rows(teacher)))
    parts.append("\n".join(f"- {line}" for line in notes(report)) + "\n")
    parts.append(f"{report['method_note']}\n")
    return "\n".join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, ready to paste."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(report: dict[str, Any]) -> None:
    """Print the tables and notes; colours only where there is a terminal."""
    console = _console()
    for teacher in report["teachers"]:
        _print_table(console, title_of(teacher), *ladder_rows(teacher))
    _print_table(console, "Plain SVD beside Distil-Rank", *summary_rows(report))
    show_notes(notes(report))


def show_table(title: str, head: list[str], rows: list[list[str]], narrow: Sequence[str] = ()) -> None:
    """Print a table whose figures are never cut; columns named in `narrow` go first where it does not fit."""
    _print_table(_console(), title, head, rows, narrow)


def show_notes(lines: list[str]) -> None:
    """Print notes, one a line; warnings stand out."""
    console = _console()
    for line in lines:
        console.print(line, style="bold yellow" if line.startswith(("NOTE", "WARNING")) else None)


def show_facts(title: str, facts: dict[str, Any]) -> None:
    """Print names and values, one a line."""
    console = _console()
    console.print(title, style="bold")
    for name, value in facts.items():
        if value is not None:
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            console.print(f"  {name:<11}{text}", style="bold yellow" if name == "fallback" else None)


def show_markdown(text: str) -> None:
    """Print Markdown: rendered on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        _console().print(Markdown(text))
    else:
        print(text)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _print_table(
    console: Console, title: str, head: list[str], rows: list[list[str]], narrow: Sequence[str] = NARROW
) -> None:
    """A table whose figures are never cut: what does not fit is left out in whole columns."""
    table, unlimited = _table(title, head, rows), console.options.update(max_width=10_000)
    for name in narrow:
        if console.measure(table, options=unlimited).maximum <= console.width:
            break
        if name in head:
            index = head.index(name)
            head, *rows = ([*line[:index], *line[index + 1 :]] for line in (head, *rows))
            table = _table(f"{title} (the report has all columns)", head, rows)
    console.print(table)


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("Distil-Rank") else None)
    return table
