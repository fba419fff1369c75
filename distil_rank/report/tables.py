"""Each result as a report: of a comparison, of an evaluation, of a recommendation."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distil_rank.embedding.layers import split_source
from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.results import OURS, Result, TeacherResult
from distil_rank.evaluation.trust import PredictorResult
from distil_rank.measure.statistics import Interval
from distil_rank.recommendation.search import SCHEMA, Confirmed, Recommendation
from distil_rank.report import pictures
from distil_rank.report.writer import Report, Table, number

EVALUATION_SCHEMA = 1  # of the JSON; a comparison and a recommendation have their own
NARROW = ("rel. MSE", "cosine", "cos p5", "95 %", "cen. cos", "kNN@10")
COLUMNS = {
    "r2": "R²",
    "centred_cosine": "cen. cos",
    "knn_overlap": "kNN@10",
    "cosine_p5": "cos p5",
    "cosine": "cosine",
    "relative_mse": "rel. MSE",
}
SUMMARY = {"r2": 3, "cosine": 4, "relative_mse": 4}  # columns of the summary, with their digits
EVALUATION_METHOD = (
    "Evaluated on groups that nothing was fitted on. Intervals are 95 % percentile intervals of a paired bootstrap "
    "over groups (2000 samples, the same for every row). Retained: score ÷ the full vector's; ≈ marks a tie with it: "
    "the interval holds 1."
)
PREDICTION_METHOD = (
    "Trained head and linear probe are fitted on training groups and chosen on validation groups; nearest neighbour, "
    "MMseqs2's best hit (where it finds none, the most frequent answer), composition and majority have both. The "
    "scores are of the other groups. Intervals are 95 % percentile intervals of a paired bootstrap over groups. "
    "Retained: score ÷ that of the first row."
)
CODE_METRICS = {
    "variance": "principal components",
    "whitened": "whitened directions",
    "invariant": "the invariant code",
}
NUMBERS = {"bit": "signs", "int8": "int8 numbers", "float32": "float32 numbers"}
RECOMMENDATION_METHOD = (
    "At least: one-sided 95 % lower end on the validation groups. Likely: the chance, from these groups alone, that as "
    "many others confirm it (predictive power). An answer is likelier to be confirmed than not, and saves most in "
    "expectation: likely × ln(full vector's ÷ its time, or bytes). The claims come from groups "
    "that nothing was fitted or chosen on, with intervals that hold together at 95 % (Bonferroni): t-intervals "
    "of the logarithm of the ratio, jackknife over groups. Retained: score ÷ the full vector's."
)


def comparison_report(result: Result) -> Report:
    """Each teacher's comparison, and the original's table: plain SVD beside our student."""
    tables, draw = [*map(teacher_table, result.teachers), summary_table(result)], partial(pictures.final_report, result)
    return Report(tables, comparison_notes(result), result.method_note, data=asdict(result), draw=draw)


def teacher_table(teacher: TeacherResult) -> Table:
    """Every method on the same held-out rows."""
    seeds = max(row.seeds for row in teacher.comparison)
    trained = f" (trained rows: mean of {seeds} seeds)" if seeds > 1 else ""
    first, *others = COLUMNS.values()
    head, rows = ["method", first, "95 %", *others, "optimum"], []
    for row in teacher.comparison:
        value, *values = (number(row.metrics[key].value) for key in COLUMNS)
        tie = " ≈" if row.ties_with_optimum and row.method != "closed_form" else ""
        rows.append([row.method, value, _ends(row.metrics["r2"]), *values, f"{100 * row.share_of_optimum:.1f} %{tie}"])
    return Table(f"{teacher.teacher} teacher, rank {teacher.rank}{trained}", head, rows, NARROW)


def summary_table(result: Result) -> Table:
    """The original's table: plain SVD beside our student, per teacher."""
    rows = []
    for teacher in result.teachers:
        svd, ours = teacher.row("svd").metrics, teacher.row(OURS).metrics
        speed_up = teacher.speed_up()
        pairs = [f"{number(svd[key].value, n)} → {number(ours[key].value, n)}" for key, n in SUMMARY.items()]
        speed = "–" if speed_up is None else f"{speed_up:.1f}x"
        rows.append([teacher.teacher, str(teacher.rank), *pairs, f"{teacher.parameters['ratio']:.2f}x", speed])
    head = ["teacher", "rank", "R²: SVD → ours", "cosine", "rel. MSE", "parameters", "speed-up"]
    return Table("Plain SVD beside Distil-Rank", head, rows, NARROW)


def comparison_notes(result: Result) -> list[str]:
    """What a reader must know beside the numbers: fallbacks, warnings, predicted and measured R²."""
    data = result.data
    lines = [f"NOTE: {data.fallback}"] if data.fallback else []
    lines.append(
        f"Data: {data.source} ({data.backbone}, {data.pooling} pooling); train / validation / test rows "
        f"{' / '.join(map(str, data.rows.values()))}; split by {data.split}."
    )
    for teacher in result.teachers:
        lines.append(
            f"{teacher.teacher}: rank {teacher.rank} predicted R² {teacher.predicted_r2:.4f} on the training "
            f"rows, held-out {teacher.held_out_r2:.4f}{teacher.rank_note}. {teacher.training_note}"
            + (f" {teacher.held_out_note}." if teacher.held_out_note else "")
        )
        if teacher.check.warning:
            lines.append(f"WARNING: {teacher.check.warning}")
    return [*lines, f"Machine: {result.machine}."]


def evaluation_report(evaluation: Evaluation, following: str | None = None) -> Report:
    """Each representation with its bytes, scores and what it retains of the full vector's.

    Or a teacher from labels beside what needs no training, where `following` is what to type next.
    """
    data, table = {"schema": EVALUATION_SCHEMA, **asdict(evaluation)}, [evaluation_table(evaluation)]
    notes = [f"Groups: {evaluation.groups}.", *evaluation.notes]
    if following is not None:
        return Report(table, notes, PREDICTION_METHOD, Table("", ["what to type next"], [[following]]), data)
    return Report(table, notes, EVALUATION_METHOD, data=data, draw=partial(pictures.draw_evaluation, evaluation))


def predictor_report(result: PredictorResult) -> Report:
    """A predictor: what the student retains of its teacher, its scores, and how far they can be trusted."""
    trust, (dense, small), evaluation = result.trust, result.parameters, result.evaluation
    title = f"{100 * trust.confidence:.0f} % {'sets' if trust.by_class or trust.reliability else 'intervals'}"
    gain = "." if small < dense else ", NO FEWER: no smaller one gives these predictions."
    lines = [
        f"Rank {result.rank} retains {number(result.retained.value)} {_ends(result.retained)} of the teacher's "
        f"predictions on {evaluation.evaluated:,} untouched proteins: {result.verdict.upper()} at {result.share:g}.",
        f"Its layer has {small:,} parameters where the teacher's has {dense:,}: {dense / small:.1f}x{gain}",
        f"{title} hold the truth for {trust.coverage.value:.3f} {_ends(trust.coverage)}; their mean size is "
        f"{number(trust.size, 2)}.",
    ]
    if trust.calibration_error is not None:
        lines.append(
            f"Calibration error {trust.before:.3f} before and {trust.calibration_error:.3f} after temperature scaling; "
            f"probabilities differ from the teacher's by {number(result.probability_error)} on average."
        )
    rows = [[name, f"{share:.2f}"] for name, share in trust.by_class.items()]
    tables = [
        evaluation_table(evaluation),
        *[Table(f"{title} by class", ["class", "truths inside"], rows)] * bool(rows),
    ]
    answer = Table("", ["what it retains, and how far it can be trusted"], [[line] for line in lines])
    data, draw = {"schema": EVALUATION_SCHEMA, **asdict(result)}, partial(pictures.draw_predictor, result)
    notes = [f"Groups: {evaluation.groups}.", *evaluation.notes]
    return Report(tables, notes, PREDICTION_METHOD, answer, data, draw)


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row for each representation, the headline's columns first."""
    headline, *others = evaluation.metrics
    rows = []
    for entry in evaluation.entries:
        score, retained = entry.scores[headline], entry.retained.get(headline)
        cells = [
            entry.name,
            "–" if entry.bytes is None else f"{entry.bytes:,.0f}",
            number(score.value, 3),
            _ends(score),
        ]
        if retained is None:
            cells += ["1" if entry.role == "reference" else "–", ""]
        else:
            cells += [f"{retained.value:.3f}{' ≈' if 1 in retained else ''}", _ends(retained)]
        rows.append(cells + [number(entry.scores[metric].value, 3) for metric in others])
    head = ["representation", "bytes", headline, "95 %", "retained", "retained 95 %", *others]
    return Table(pictures.evaluation_title(evaluation), head, rows, (*others[::-1], "95 %", "retained 95 %"))


def _ends(interval: Interval) -> str:
    return "" if not math.isfinite(interval.low) else f"[{interval.low:.3f}, {interval.high:.3f}]"


def recommendation_report(result: Recommendation) -> Report:
    """The Pareto front on the validation groups, with the lines of the answer."""
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
    answer = Table("", ["what to use, what it costs, what it retains"], [[line] for line in answer_lines(result)])
    data = {"schema": SCHEMA, **asdict(result)}
    draw = partial(pictures.draw_recommendation, result)
    return Report([recommendation_table(result)], [*notes, *result.notes], RECOMMENDATION_METHOD, answer, data, draw)


def recommendation_table(result: Recommendation) -> Table:
    """The Pareto front on the validation groups; the three answers are marked."""
    timed = any(outcome.time is not None for outcome in result.front)
    head = ["pipeline", *["bytes"] * result.searched, *["time"] * timed]
    for name in result.tasks:
        head += [f"retained, {name}"] if len(result.tasks) > 1 else [result.metrics[0], "retained", "at least"]
    rows = []
    for outcome in result.front:
        marks = [name for name, one in result.answers.items() if one.chosen.pipeline == outcome.pipeline]
        cells = [f"{outcome.pipeline}{' ← ' if marks else ''}{', '.join(marks)}"]
        cells += [f"{outcome.bytes:,}"] if result.searched else []
        cells += [f"{outcome.time:.2f}" if outcome.time is not None else "–"] if timed else []
        for score, interval in zip(outcome.scores, outcome.retained, strict=True):
            value = f"{interval.value:.3f}"
            cells += [value] if len(result.tasks) > 1 else [number(score, 3), value, f"{interval.low:.3f}"]
        rows.append([*cells, f"{outcome.likely or 0:.2f}"])
    title = f"Pipelines for {' and '.join(result.tasks)}: the Pareto front on the validation groups"
    return Table(title, [*head, "likely"], rows)


def configuration(result: Recommendation, encoder: Path, about: Mapping[str, Any]) -> str:
    """Options of `distil-rank embed` for the chosen pipeline, as YAML, under the lines of the answer."""
    keys = ("backbone", "pooling", "precision", "long", "max_length")
    options = {key: about[key] for key in keys if about.get(key) is not None}
    if options.get("precision") == "int8" and about.get("source"):
        options["calibration"] = str(split_source(about["source"])[0])
    if (layer := result.answer.chosen.pipeline.layer) is not None:
        options["layer"] = layer
    options["code"] = str(encoder)
    words = "".join(f"# {line}\n" for line in answer_lines(result))
    return words + "".join(f"{key}: {json.dumps(value)}\n" for key, value in options.items())  # JSON is YAML


def answer_lines(result: Recommendation) -> list[str]:
    """What to use, what it costs, what it scores and how sure that is, the other answers, and what to type next."""
    answer = result.answer
    own, full, pipeline = answer.confirmed, result.full, answer.chosen.pipeline
    where = "" if pipeline.layer is None else f"layer {pipeline.layer} and "
    which = "" if result.headline == "fastest" and own.time is None else f": {result.headline}"
    use = f"Use {where}{CODE_METRICS[pipeline.metric]} of {pipeline.rank} {NUMBERS[pipeline.dtype]}{which}."

    costs = [f"{own.bytes:,} bytes a protein instead of {full.bytes:,} ({full.bytes / own.bytes:,.0f}x less)"]
    exits = {one.layer: one.seconds_per_1000 for one in result.costs}
    costs = costs if result.searched else []
    if pipeline.layer in exits and own.time is not None:
        whole = max(one.seconds_per_1000 / one.share for one in result.costs)
        seconds = f"{exits[pipeline.layer]:.3g} s per 1,000 proteins instead of {whole:.3g}"
        costs.append(f"{own.time:.2f} of the time ({seconds})")
    cost = f"It takes {' and '.join(costs)}." if costs else "Nothing is stored and no time was measured: no gain."

    beside = ", ".join(f"{one.name} {number(one.score, 3)}" for one in result.baselines)
    scores = " and ".join(
        f"{number(ours, 3)} {metric} on {name}, the full vector {number(theirs, 3)}{f' ({beside})' if not i else ''}"
        for i, (name, metric, ours, theirs) in enumerate(
            zip(result.tasks, result.metrics, own.scores, full.scores, strict=True)
        )
    )
    once = f"measured once on {result.proteins[2]:,} proteins of {result.groups[2]:,} untouched groups"
    lines = [use, cost, f"It scores {scores}. It retains {_claim(answer, result.keep)}, {once}."]
    for name, one in result.answers.items():
        if name != result.headline:
            time = "" if one.confirmed.time is None else f", {one.confirmed.time:.2f} of the time"
            stored = f", {one.confirmed.bytes:,} bytes" if result.searched else ""
            scored = ", ".join(
                f"{number(score, 3)} {metric}"
                for score, metric in zip(one.confirmed.scores, result.metrics, strict=True)
            )
            lines.append(
                f"{name.capitalize()}: {one.chosen.pipeline}{stored}{time}: {scored}, {_claim(one, result.keep)}."
            )
    offer = [] if result.predictor is None else [f"For a predictor of these labels: {result.predictor}"]
    return [*lines, f"Next: {result.next}", *offer]


def _claim(answer: Confirmed, keep: float) -> str:
    shares = " and ".join(
        f"{one.value:.3f} (95 %: {one.low:.3f} to {one.high:.3f})" for one in answer.confirmed.retained
    )
    verdict = {
        "confirmed": f"at least the {keep:g} that was asked for",
        "not confirmed": f"NOT CONFIRMED, at least {answer.confirmed.at_least:.3f} where {keep:g} was asked for "
        "(more labels, or a lower keep, settle it)",
        "nothing retains it": f"NOTHING RETAINS {keep:g} on the validation groups; this is the likeliest",
    }[answer.verdict]
    return f"{shares}: {verdict}"
