"""The pictures of results. They are drawn from these alone, so a saved result can be drawn again later."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.representations import ALIGNMENT, COMPOSITION
from distil_rank.evaluation.results import OURS, RECIPE, ComparisonRow, ParetoPoint, Result, Spectrum, TeacherResult
from distil_rank.evaluation.trust import PredictorResult
from distil_rank.recommendation.pipelines import Pipeline
from distil_rank.recommendation.search import Recommendation

# Okabe and Ito's palette: told apart by the colour-blind, and the same for a method in every figure.
COLOURS = {
    "constant": "#999999",
    "svd": "#D55E00",
    "svd_bias": "#E69F00",
    "whitened_svd": "#CC79A7",
    "closed_form": "#000000",
    RECIPE: "#0072B2",
    OURS: "#009E73",
}
ROLE_COLOURS = {
    "reference": "#000000",
    "student": "#0072B2",
    "matrix": "#009E73",
    "baseline": "#D55E00",
    "chance": "#999999",
}
CHOSEN, FRONT, OTHER, BASELINE = "#D55E00", "#0072B2", "#BBBBBB", "#009E73"
NAMES = {"svd": "SVD", "svd_bias": "SVD + bias", "whitened_svd": "whitened SVD", "closed_form": "closed form"}
SMALLEST = 1e-8  # what a logarithmic axis shows for nothing lost
MOST_NAMES = 30  # of classes that a confusion matrix has room for
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
    title = f"{data.source} ({data.backbone}), {data.rows['test']} held-out rows, split by {data.split}"
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
        interval = [max(1 - bound, SMALLEST) for bound in (r2.low, r2.high)]
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
    """What each rank retains: predicted from the training rows, and measured on held-out rows."""
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
            spread = [one.value - one.low for one in r2], [one.high - one.value for one in r2]
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


def draw_evaluation(evaluation: Evaluation, path: Path) -> None:
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
        ax.set_title(evaluation_title(evaluation), loc="left")
        ax.set_ylabel(headline)
        ax.set_ylim(bottom=0)
        ax.margins(x=0.12)


def draw_predictor(result: PredictorResult, path: Path) -> None:
    """What each rank retains, what is taken for what, and calibration."""
    true, predicted = result.decisions
    panels = {"regression": 2, "multilabel": 2, "classification": 3}[result.evaluation.task]
    with picture(path, 1, panels, (4.2, 3.6)) as axes:
        ranks, decisions, trust = axes[0, 0], axes[0, 1], axes[0, -1]
        for key, name in {"closed_form": "closed form", "retained": OURS}.items():
            known = [point for point in result.curve if point[key] is not None]
            at, shares = [point["rank"] for point in known], [max(point[key], 0) for point in known]
            ranks.plot(at, shares, color=COLOURS.get(key, COLOURS[OURS]), marker="o", ms=4, label=name)
        reference_line(ranks, "asked for", result.share, CHOSEN, "--")
        ranks.plot(result.rank, result.retained.value, "*", color=CHOSEN, ms=12, label="on untouched groups")
        ranks.set(title="predictions retained", xlabel="rank", xscale="log", ylim=(0, 1.03))
        ranks.legend(loc="lower right")
        if result.evaluation.task == "regression":
            decisions.plot(true, predicted, ".", color=FRONT)
            decisions.axline((true[0], true[0]), slope=1, color="#000000", lw=1)
            decisions.set(title="predicted values", xlabel="true", ylabel="predicted")
            return
        said, came, proteins = zip(*[bin for bin in result.trust.reliability if bin[2]], strict=True)
        trust.plot([0, 1], [0, 1], color="#999999", lw=1)
        trust.scatter(said, came, [5 + 2 * count for count in proteins], FRONT)
        trust.set(title="calibration (area: proteins)", xlabel="probability", ylabel="share that came true")
        if result.evaluation.task == "classification":
            order = range(len(result.classes))
            counts = Counter(zip(true, predicted, strict=True))
            shares = [[counts[k, other] / max(true.count(k), 1) for other in order] for k in order]
            decisions.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            decisions.grid(False)
            if len(order) <= MOST_NAMES:
                decisions.set_xticks(order, result.classes, rotation=90, fontsize=6)
                decisions.set_yticks(order, result.classes, fontsize=6)
            decisions.set(title="share of each class", xlabel="predicted", ylabel="true")


def evaluation_title(evaluation: Evaluation) -> str:
    """What stands above its table and its picture."""
    return f"{evaluation.task} by {evaluation.labels}: {evaluation.evaluated:,} proteins evaluated"


def draw_recommendation(result: Recommendation, path: Path) -> None:
    """Function retained against bytes, and against time where it was measured; the answers are marked."""
    timed = len({outcome.time for outcome in result.outcomes}) > 1
    stored = result.searched or not timed
    with picture(path, 1, stored + timed, (6.5, 4.6), sharey=True) as axes:
        first = axes[0][0]
        first.set_ylabel(f"{result.metrics[0]} ÷ the full vector's")
        first.set_title(f"{len(result.outcomes):,} pipelines for {' and '.join(result.tasks)}", loc="left")
        if stored:
            _panel(first, result, {outcome.pipeline: outcome.bytes for outcome in result.outcomes})
            bytes_axis(first)
        for ax in axes[0][stored:]:
            _panel(ax, result, {outcome.pipeline: outcome.time or 1.0 for outcome in result.outcomes})
            ax.set(xlabel="share of the full backbone's time", xlim=(0, 1.08))


def _panel(ax: Axes, result: Recommendation, x: Mapping[Pipeline, float]) -> None:
    """All pipelines, the front, the answers with their confirmed intervals, and lines for what it is compared with."""
    front = {outcome.pipeline for outcome in result.front}
    rest = [one for one in result.outcomes if one.pipeline not in front]
    ax.scatter([x[one.pipeline] for one in rest], [one.worst for one in rest], 8, OTHER, label="other pipelines")
    label = "Pareto front (validation groups)"
    ax.scatter([x[one.pipeline] for one in result.front], [one.worst for one in result.front], 16, FRONT, label=label)
    label = "answers, confirmed (95 % together)"
    for answer in {one.chosen.pipeline: one for one in result.answers.values()}.values():
        one = min(answer.confirmed.retained, key=attrgetter("value"))
        spread = ([max(one.value - max(one.low, 0), 0)], [one.high - one.value])
        marks: Any = {"fmt": "*", "ms": 13, "color": CHOSEN, "capsize": 3, "label": label}
        ax.errorbar(
            x[answer.chosen.pipeline], one.value, spread if math.isfinite(one.high) else None, zorder=3, **marks
        )
        label = ""
    reference_line(ax, "full vector", 1)
    ax.axhline(result.keep, color=CHOSEN, lw=1, ls=":")
    for baseline in result.baselines:
        if baseline.name in (COMPOSITION, ALIGNMENT):
            reference_line(ax, baseline.name, baseline.retained, BASELINE, "--")
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower right", fontsize=7)
