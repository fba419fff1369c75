"""The comparison of every replacement of a teacher, as tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from distil_rank.evaluation.results import OURS, ComparisonRow, Result, TeacherResult
from distil_rank.report import figures
from distil_rank.report.writer import Report, Table, number

NARROW = ("rel. MSE", "cosine", "cos p5", "95 %", "cen. cos", "kNN@10", "probe", "function")
COLUMNS = (
    ("r2", "R²"),
    ("centred_cosine", "cen. cos"),
    ("knn_overlap", "kNN@10"),
    ("cosine_p5", "cos p5"),
    ("cosine", "cosine"),
    ("relative_mse", "rel. MSE"),
)


def comparison_report(result: Result) -> Report:
    """Each teacher's comparison, and the original's table: plain SVD beside our student."""
    tables = [*map(teacher_table, result.teachers), summary_table(result)]
    return Report(
        tables, notes(result), result.method_note, data=asdict(result), draw=partial(figures.final_report, result)
    )


def summary_table(result: Result) -> Table:
    """The original's table: plain SVD beside our student, per teacher."""
    rows = []
    for teacher in result.teachers:
        svd, ours = teacher.row("svd").metrics, teacher.row(OURS).metrics
        speed_up = teacher.speed_up()
        pairs = [f"{number(svd[key].value, n)} → {number(ours[key].value, n)}" for key, n in _SUMMARY]
        speed = "–" if speed_up is None else f"{speed_up:.1f}x"
        rows.append([teacher.teacher, str(teacher.rank), *pairs, f"{teacher.parameters.ratio:.2f}x", speed])
    head = ["teacher", "rank", "R²: SVD → ours", "cosine", "rel. MSE", "parameters", "speed-up"]
    return Table("Plain SVD beside Distil-Rank", head, rows, NARROW)


_SUMMARY = (("r2", 3), ("cosine", 4), ("relative_mse", 4))  # with their digits


def teacher_table(teacher: TeacherResult) -> Table:
    """Every method on the same held-out rows."""
    seeds = max(row.seeds for row in teacher.comparison)
    trained = f" (trained rows: mean of {seeds} seeds)" if seeds > 1 else ""
    title = f"{teacher.teacher} teacher, rank {teacher.rank}{trained}"
    labelled = "probe_accuracy" in teacher.comparison[0].metrics
    evaluated = any(row.function_retained for row in teacher.comparison)
    head = ["method", "R²", "95 %", *(name for _, name in COLUMNS[1:]), "optimum"]
    head += ["probe"] * labelled + ["function"] * evaluated
    return Table(title, head, [_cells(row, labelled, evaluated) for row in teacher.comparison], NARROW)


def _cells(row: ComparisonRow, labelled: bool, evaluated: bool) -> Sequence[str]:
    r2 = row.metrics["r2"]
    cells = [number(row.metrics[key].value) for key, _ in COLUMNS]
    cells.insert(1, f"[{number(r2.low, 3)}, {number(r2.high, 3)}]")
    tie = " ≈" if row.ties_with_optimum and row.method != "closed_form" else ""
    cells.append(f"{100 * row.share_of_optimum:.1f} %{tie}")
    if labelled:
        cells.append(number(row.metrics["probe_accuracy"].value, 3))
    if evaluated:
        cells.append("–" if row.function_retained is None else number(row.function_retained.retained.value, 3))
    return [row.method, *cells]


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
        function = next((row.function_retained for row in teacher.comparison if row.function_retained), None)
        if function:
            share = f"function is the share retained of the teacher's {function.metric}"
            lines.append(f"{teacher.teacher}: {share}, {function.task}.")
        if teacher.check.warning:
            lines.append(f"WARNING: {teacher.check.warning}")
    return [*lines, f"Machine: {result.machine}."]
