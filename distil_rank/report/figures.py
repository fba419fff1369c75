"""The figures of a result. They are drawn from it alone, so a saved result can be drawn again later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distil_rank.evaluation.results import OURS, RECIPE, ComparisonRow, ParetoPoint, Result, Spectrum, TeacherResult

# Okabe and Ito's palette: told apart by the colour-blind, and the same for a method in every figure.
COLOURS = {
    "constant": "#999999",
    "svd": "#D55E00",
    "svd_bias": "#E69F00",
    "whitened": "#CC79A7",
    "closed_form": "#000000",
    RECIPE: "#0072B2",
    OURS: "#009E73",
}
NAMES = {"svd": "SVD", "svd_bias": "SVD + bias", "closed_form": "closed form"}
SMALLEST = 1e-8  # what a logarithmic axis shows for nothing lost
LOWEST_R2 = -0.25  # where the sweep's axis ends; the plain SVD can lie far below
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """Panels to draw in, as an array `(rows, columns)` of axes; saved as PNG when the context ends.

    Args:
        size: width and height of one panel, in inches.
    """
    with plt.rc_context(STYLE):
        whole = (columns * size[0], rows * size[1])
        figure, axes = plt.subplots(rows, columns, figsize=whole, squeeze=False, **options)
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)


def final_report(result: Result, path: Path) -> None:
    """One row of panels per teacher: training, comparison, spectrum, and fidelity against rank."""
    data = result.data
    title = f"{data.source} ({data.backbone}), {data.rows.test} held-out rows, split by {data.split}"
    with picture(path, len(result.teachers), 4, (4, 3.6)) as axes:
        for row, teacher in zip(axes, result.teachers, strict=True):
            draw_training(row[0], teacher)
            draw_comparison(row[1], teacher.comparison)
            draw_spectrum(row[2], teacher.spectrum, teacher.rank)
            draw_pareto(row[3], teacher.pareto, teacher.rank)
        axes[0, 0].figure.suptitle(f"{title}\n{data.fallback}" if data.fallback else title, fontsize=10)


def reference_line(ax: Axes, name: str, y: float, colour: str = "#000000", style: str = "-") -> None:
    """A horizontal line for what the marks are compared with, its name at the right end."""
    ax.axhline(y, color=colour, ls=style, lw=1)
    place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    ax.annotate(name, (1, y), (-4, 3), fontsize=7, color=colour, **place)


def bytes_axis(ax: Axes) -> None:
    """What a protein takes, by powers of two."""
    ax.set_xlabel("bytes stored for each protein")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")


def draw_training(ax: Axes, teacher: TeacherResult) -> None:
    """Share of variance lost on validation while training, against the closed form's as a line."""
    ax.set_title(f"{teacher.teacher} teacher, rank {teacher.rank}: training")
    for method, curve in teacher.curves.items():
        name, colour = NAMES.get(method, method), COLOURS[method]
        ax.plot(curve.step, curve.val_residual, label=name, color=colour, marker=".", ms=3)
    ax.axhline(teacher.validation_optimum, color=COLOURS["closed_form"], ls="--", lw=1, label="closed form")
    ax.set(xlabel="optimiser step", ylabel="1 − R² on validation rows", yscale="log")
    ax.legend()


def draw_comparison(ax: Axes, comparison: Sequence[ComparisonRow]) -> None:
    """What every method loses: of the variance, with its 95 % interval, and of raw cosine as a hollow mark."""
    ax.set_title("lost on held-out rows")
    for y, row in enumerate(reversed(comparison)):
        r2, cosine, colour = row.metrics["r2"], row.metrics["cosine"].value, COLOURS[row.method]
        interval = [max(1 - bound, SMALLEST) for bound in r2.interval]
        ax.plot(interval, [y, y], color=colour, lw=3, alpha=0.6)
        ax.plot(max(1 - r2.value, SMALLEST), y, "o", color=colour)
        ax.plot(max(1 - cosine, SMALLEST), y, "o", mfc="white", mec=colour, ms=5)
    ax.set_yticks(range(len(comparison)), [NAMES.get(row.method, row.method) for row in reversed(comparison)])
    ax.set(xscale="log", xlabel="1 − R² (●, 95 %) and 1 − cosine (○)")


def draw_spectrum(ax: Axes, spectrum: Spectrum, rank: int) -> None:
    """Singular values of the weight beside the standard deviations of its output: the first is what SVD looks at."""
    ax.set_title("spectrum, normalised")
    weight, output = spectrum.singular_values, spectrum.output_std
    ax.plot(range(1, len(weight) + 1), weight, color=COLOURS["svd"], label="weight (singular values)")
    ax.plot(range(1, len(output) + 1), output, color=COLOURS["closed_form"], label="output (standard deviations)")
    ax.axvline(rank, color=COLOURS[OURS], ls="--", lw=1, label=f"rank {rank}")
    ax.set(xlabel="index", ylabel="value / largest", yscale="log", ylim=(1e-4, 1.5))
    ax.legend()


def draw_pareto(ax: Axes, curve: Sequence[ParetoPoint], rank: int) -> None:
    """What each rank keeps: predicted from the training rows, and measured on held-out rows."""
    ax.set_title("closed form: fidelity against rank")
    ranks = [point.rank for point in curve]
    low, high = [point.r2_low for point in curve], [point.r2_high for point in curve]
    ax.plot(ranks, [point.predicted_r2 for point in curve], color="#999999", ls=":", label="R², predicted")
    ax.plot(ranks, [point.r2 for point in curve], color=COLOURS["closed_form"], marker="o", ms=3, label="R², held-out")
    ax.fill_between(ranks, low, high, color="#000000", alpha=0.12, lw=0)
    ax.plot(ranks, [point.knn_overlap for point in curve], color="#56B4E9", marker="s", ms=3, label="kNN@10 overlap")
    ax.axvline(rank, color=COLOURS[OURS], ls="--", lw=1, label=f"rank {rank}, chosen")
    ax.set(xlabel="rank", ylabel="held-out fidelity", xscale="log", ylim=(0, 1.03))
    powers = [rank for rank in ranks if rank in (1, 4, 16, 64, 256, 1024)]
    ax.set_xticks(powers, [str(rank) for rank in powers])
    ax.minorticks_off()
    ax.legend(loc="lower right")


def sweep(result: Result, path: Path) -> Path:
    """Distil-Rank's held-out R² and neighbours at each rank of a sweep, beside the plain SVD's; returns `path`."""
    teachers = result.teachers
    ranks = [teacher.rank for teacher in teachers]
    with picture(path, 1, 1, (6, 4)) as axes:
        ax = axes[0, 0]
        for method, marker in ((OURS, "o"), (RECIPE, "^"), ("svd", "v")):
            r2 = [teacher.row(method).metrics["r2"] for teacher in teachers]
            spread = list(zip(*((one.value - one.interval[0], one.interval[1] - one.value) for one in r2), strict=True))
            marks: Any = {"color": COLOURS[method], "marker": marker, "ms": 4, "capsize": 2}
            ax.errorbar(ranks, [one.value for one in r2], spread, label=f"{NAMES.get(method, method)}, R²", **marks)
        knn = [teacher.row(OURS).metrics["knn_overlap"].value for teacher in teachers]
        ax.plot(ranks, knn, label=f"{OURS}, kNN@10 overlap", color="#56B4E9", marker="s", ms=4, ls="--")
        ax.set(xlabel="rank", ylabel="held-out fidelity", xscale="log", ylim=(LOWEST_R2, 1.03))
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        ax.minorticks_off()
        ax.set_title(f"{teachers[0].teacher} teacher, {result.data.source} ({result.data.backbone})")
        ax.legend()
    return path
