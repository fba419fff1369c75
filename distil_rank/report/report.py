"""A result as Markdown and on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from distil_rank.evaluation.results import OURS, ComparisonRow, Result, TeacherResult

WIDTH = 100  # characters in a line where the output is not a terminal
NARROW = (
    "kept 95 %",
    "rel. MSE",
    "cosine",
    "cos p5",
    "95 %",
    "cen. cos",
    "kNN@10",
    "probe",
    "function",
)  # columns that narrow tables drop, in this order
LADDER_COLUMNS = (
    ("r2", "R²"),
    ("centred_cosine", "cen. cos"),
    ("knn_overlap", "kNN@10"),
    ("cosine_p5", "cos p5"),
    ("cosine", "cosine"),
    ("relative_mse", "rel. MSE"),
)


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


def summary_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """The original's table: plain SVD beside our student, per teacher."""
    head = ["teacher", "rank", "R²: SVD → ours", "cosine", "rel. MSE", "parameters", "speed-up"]
    rows = []
    for teacher in result.teachers:
        svd, ours = teacher.row("svd").metrics, teacher.row(OURS).metrics
        speed_up = teacher.speed_up()
        rows.append(
            [
                teacher.teacher,
                str(teacher.rank),
                f"{number(svd['r2'].value, 3)} → {number(ours['r2'].value, 3)}",
                f"{number(svd['cosine'].value)} → {number(ours['cosine'].value)}",
                f"{number(svd['relative_mse'].value)} → {number(ours['relative_mse'].value)}",
                f"{teacher.parameters.ratio:.2f}x",
                "–" if speed_up is None else f"{speed_up:.1f}x",
            ]
        )
    return head, rows


def ladder_title(teacher: TeacherResult) -> str:
    """The title of a comparison."""
    seeds = max(row.seeds for row in teacher.comparison)
    trained = f" (trained rows: mean of {seeds} seeds)" if seeds > 1 else ""
    return f"{teacher.teacher} teacher, rank {teacher.rank}{trained}"


def ladder_rows(comparison: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """Every method on the same held-out rows."""
    head = ["method", "R²", "95 %", *(title for _, title in LADDER_COLUMNS[1:]), "optimum"]
    labelled = "probe_accuracy" in comparison[0].metrics
    judged = any(row.function_retained for row in comparison)
    head += ["probe"] * labelled + ["function"] * judged
    rows = []
    for row in comparison:
        cells = [row.method]
        for key, _ in LADDER_COLUMNS:
            estimate = row.metrics[key]
            cells.append(number(estimate.value))
            if key == "r2":
                cells.append(f"[{number(estimate.low, 3)}, {number(estimate.high, 3)}]")
        cells.append(f"{100 * row.share_of_optimum:.1f} %" + (" ≈" if _is_tie(row) else ""))
        if labelled:
            cells.append(number(row.metrics["probe_accuracy"].value, 3))
        if judged:
            cells.append("–" if row.function_retained is None else number(row.function_retained.retained.value, 3))
        rows.append(cells)
    return head, rows


def _is_tie(row: ComparisonRow) -> bool:
    return row.ties_with_optimum and row.method != "closed_form"


def notes(result: Result) -> list[str]:
    """What a reader must know beside the numbers: fallbacks, warnings, predicted and measured R²."""
    data = result.data
    lines = [f"NOTE: {data.fallback}"] if data.fallback else []
    lines.append(
        f"Data: {data.source} ({data.backbone}, {data.pooling} pooling); train / validation / test rows "
        f"{data.rows.train} / {data.rows.val} / {data.rows.test}; split by {data.split}."
    )
    for teacher in result.teachers:
        lines.append(
            f"{teacher.teacher}: rank {teacher.rank} predicted R² {teacher.predicted_r2:.4f} on the training "
            f"rows, held-out {teacher.held_out_r2:.4f}{teacher.rank_note}. {teacher.training_note}"
            + (f" {teacher.held_out_note}." if teacher.held_out_note else "")
        )
        judged = next((row.function_retained for row in teacher.comparison if row.function_retained), None)
        if judged:
            lines.append(
                f"{teacher.teacher}: function is the share kept of the teacher's {judged.metric}, {judged.task}."
            )
        if teacher.check.warning:
            lines.append(f"WARNING: {teacher.check.warning}")
    return [*lines, f"Machine: {result.machine}."]


def markdown(result: Result) -> str:
    """The whole result as Markdown tables, for a file and for the tracking server."""
    parts = [markdown_table(*summary_rows(result))]
    for teacher in result.teachers:
        parts.append(f"### {ladder_title(teacher)}\n")
        parts.append(markdown_table(*ladder_rows(teacher.comparison)))
    parts.append("\n".join(f"- {line}" for line in notes(result)) + "\n")
    parts.append(f"{result.method_note}\n")
    return "\n".join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(result: Result) -> None:
    """Print the tables and notes; colours only on a terminal."""
    console = _console()
    for teacher in result.teachers:
        _print_table(console, ladder_title(teacher), *ladder_rows(teacher.comparison))
    _print_table(console, "Plain SVD beside Distil-Rank", *summary_rows(result))
    show_notes(notes(result))


def show_table(title: str, head: list[str], rows: list[list[str]], narrow: Sequence[str] = ()) -> None:
    """Print a table whose figures are never cut; if it does not fit, the columns in `narrow` are dropped in order."""
    _print_table(_console(), title, head, rows, narrow)


def show_notes(lines: list[str]) -> None:
    """Print notes, one a line, with warnings highlighted."""
    console = _console()
    for line in lines:
        console.print(line, style="bold yellow" if line.startswith(("NOTE", "WARNING")) else None)


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print names and values, one a line."""
    console = _console()
    console.print(title, style="bold")
    for name, value in facts.items():
        if value is not None:
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            console.print(f"  {name:<11}{text}", style="bold yellow" if name == "fallback" else None)


def show_markdown(text: str) -> None:
    """Print Markdown: rendered on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty():
        _console().print(Markdown(text))
    else:
        print(text)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _print_table(
    console: Console, title: str, head: list[str], rows: list[list[str]], narrow: Sequence[str] = NARROW
) -> None:
    """A table whose figures are never cut: what does not fit is dropped in whole columns."""
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
