"""Representations judged on a labelled task, as one MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from distil_rank.commands.embed import extract
from distil_rank.commands.lineage import lineage_of_vectors
from distil_rank.compression.saved import load, read_manifest
from distil_rank.data.files import load_matrix
from distil_rank.errors import InputError
from distil_rank.evaluation.alignment import MISSING, alignment_scores, has_mmseqs
from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.evaluate import evaluate as evaluate_task
from distil_rank.evaluation.labelled import LabelledData, matching_rows, open_labelled
from distil_rank.evaluation.representations import (
    Candidate,
    composition,
    full_vector,
    module_output,
    student_bytes,
    variance_student,
)
from distil_rank.evaluation.retrieval import CUTOFF, Scores
from distil_rank.evaluation.task import Kind
from distil_rank.evaluation.trials import MAX_QUERIES
from distil_rank.options.embed import Precision
from distil_rank.options.evaluation import LabelOptions
from distil_rank.report import evaluation as report
from distil_rank.report.run_folder import publish, run_folder
from distil_rank.tracking.run import Run, start_run

log = logging.getLogger(__name__)

RANKS = (16, 32, 64, 128)  # of the students that are made where none are named


def evaluate(
    data: str = "auto",
    labels: LabelOptions = LabelOptions(),  # noqa: B008 - frozen
    task: Kind | Literal["auto"] = "auto",
    groups: str | None = None,
    fasta: str | None = None,
    backbone: str = "auto",
    ranks: Sequence[int] | None = None,
    students: Sequence[str] = (),
    others: Sequence[str] = (),
    alignment: bool = True,
    metric: str | None = None,
    fit_fraction: float = 0.5,
    neighbours: int = CUTOFF,
    max_queries: int = MAX_QUERIES,
    seed: int = 0,
    output: str = "results",
    config: str = "",
    precision: Precision = "auto",
) -> Evaluation:
    """Judge what representations of the same proteins keep of a labelled task.

    Args:
        data: The vectors: a store or any file that distil reads; auto is the labelled sample where no labels are named.
        labels: Where labels come from.
        task: retrieval, classification, multilabel or regression; auto decides by the labels.
        groups: What is kept on one side: a column of the table, a level of the label, clusters, mmseqs, none, or a
            file of the groups to fit on.
        fasta: Sequences to embed into `data` first (only what is missing there).
        backbone: ESM-2 model for that.
        ranks: Of the students that are fitted here on the fit groups; 16, 32, 64 and 128 by default, as far as the
            vectors are wide.
        students: Folders of artefacts; FOLDER:RANK takes a lower rank.
        others: Further matrices of the same proteins, NAME=PATH.
        alignment: Search with MMseqs2 too, where it is installed (retrieval only).
        metric: That function kept is about; by default mAP (retrieval), accuracy, macro_f1 or spearman.
        fit_fraction: Share of the proteins to fit on.
        neighbours: What average precision looks at.
        max_queries: Judged proteins to search with at most.
        seed: Of the draw of groups.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
        precision: To embed `fasta` in; see `distil-rank embed`.
    """
    if max_queries < 1 or neighbours < 1:
        raise InputError(
            f"Expected --max_queries and --neighbours of at least 1 but got {max_queries} and {neighbours}."
        )
    source = _embedded(data, fasta, backbone, precision)
    opened = open_labelled(source, labels, task, groups, fit_fraction, seed)
    candidates = _candidates(opened, ranks, students, others)
    scores, missing = _alignment(opened, alignment)
    log.info("Judging %d representations: %s", len(candidates), opened.groups.description)
    name = f"{Path(opened.source).stem} {opened.target.kind}"
    about = opened.embeddings.provenance
    params = {
        "source": opened.source,
        "labels": opened.labels,
        "task": opened.target.kind,
        "groups": opened.groups.description,
        "backbone": about.get("backbone", "unknown"),
    }
    with start_run("evaluate", name, params=params, tags=_lineage(opened, students)) as run:
        done = evaluate_task(
            opened.target,
            opened.groups,
            candidates,
            opened.labels,
            scores,
            [*opened.notes, *missing],
            max_queries,
            neighbours,
            metric,
            seed,
        )
        place = Path(output) / "evaluate" / Path(opened.source).stem
        folder = run_folder(place, run.id)
        _log(run, done, report.save(done, folder), config)
        publish(folder, place)
    log.info("Evaluation: %s", place / "evaluation.md")
    return done


def _embedded(data: str, fasta: str | None, backbone: str, precision: Precision) -> str:
    """The data to evaluate on, with the proteins of a FASTA file in them.

    Raises:
        InputError: a precision, but nothing to embed.
    """
    if fasta is not None:
        store = None if data == "auto" else data
        options = {"fasta": fasta, "store": store, "backbone": backbone, "pooling": "mean", "precision": precision}
        return extract(options).store
    if precision != "auto":
        raise InputError(
            f"Expected --fasta, whose proteins are to be embedded in {precision}, but got none; vectors that are there "
            "have theirs."
        )
    return data


def _alignment(opened: LabelledData, wanted: bool) -> tuple[Callable[[], Scores] | None, list[str]]:
    """MMseqs2's scores among the judged proteins, to be computed when needed, and why there are none."""
    sequences = opened.embeddings.sequences
    if sequences is None:
        return None, ["No sequences in the data: not compared with composition and MMseqs2."]
    if opened.target.kind != "retrieval" or not wanted:
        return None, []
    if not has_mmseqs():
        return None, [MISSING]
    return partial(alignment_scores, [sequences[row] for row in opened.groups.judged]), []


def _candidates(
    opened: LabelledData, ranks: Sequence[int] | None, students: Sequence[str], others: Sequence[str]
) -> list[Candidate]:
    """The full vector first, then students, other matrices and the composition."""
    x = opened.embeddings.x
    if ranks is None:
        ranks = [rank for rank in RANKS if rank < x.shape[1]]
    candidates = [full_vector(x), *(variance_student(x, rank) for rank in ranks)]
    candidates += [_artefact(given, opened) for given in students]
    candidates += [_matrix(given, opened) for given in others]
    if opened.embeddings.sequences is not None:
        candidates.append(composition(opened.embeddings.sequences))
    names = [candidate.name for candidate in candidates]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"Expected different names of representations but {repeated!r} comes twice; rename one.")
    return candidates


def _artefact(given: str, opened: LabelledData) -> Candidate:
    """A saved student, `FOLDER` or `FOLDER:RANK`."""
    folder, _, rank = given.rpartition(":") if given.rpartition(":")[2].isdigit() else (given, "", "")
    module = load(folder, rank=int(rank) if rank else None)
    width, dim = getattr(module, "in_features", None), opened.embeddings.x.shape[1]
    if width != dim:
        raise InputError(f"Expected a student for inputs of width {dim} in {folder} but got one for {width}.")
    return module_output(given, module.eval(), opened.embeddings.x, student_bytes(module, dim), None)


def _matrix(given: str, opened: LabelledData) -> Candidate:
    """Another matrix, `NAME=PATH` or `PATH`."""
    name, _, path = given.rpartition("=")
    other = load_matrix(path)
    rows = matching_rows(other, opened.embeddings.ids, path)
    return full_vector(other.x[rows], name or Path(path).name, "matrix")


def _lineage(opened: LabelledData, students: Sequence[str]) -> dict[str, str]:
    """Tags that lead to the runs behind the vectors and the students."""
    tags = lineage_of_vectors(opened.embeddings.provenance)
    for number, given in enumerate(students, 1):
        folder = given if Path(given).is_dir() else given.rpartition(":")[0]
        if run := read_manifest(folder).get("data", {}).get("run"):
            tags[f"student_{number}_run"] = str(run)
    return tags


def _log(run: Run, done: Evaluation, files: Sequence[Path], config: str) -> None:
    """Figures, files and the table of one evaluation; the run list shows the full vector beside the best student."""
    for entry in done.entries:
        scores = {metric_name(metric): score.value for metric, score in entry.scores.items()}
        if done.headline in entry.retained:
            scores["retained"] = entry.retained[done.headline].value
        run.log_metrics({f"{metric_name(entry.name)}/{name}": value for name, value in scores.items()})
    full, *rest = done.entries
    run.log_params({"metric": done.headline})
    run.log_metrics({"full": full.scores[done.headline].value})
    students = [entry for entry in rest if entry.role in ("student", "matrix")]
    if students:
        best = max(students, key=lambda entry: entry.scores[done.headline].value)
        run.log_params({"best": best.name})
        run.log_metrics({"best": best.scores[done.headline].value, "best_bytes": best.bytes or 0})
        if retained := best.retained.get(done.headline):  # none where the full vector's score is not positive
            run.log_metrics({"retained": retained.value, "retained_low": retained.low})
    run.log_text(config, "config.yaml")
    for file in files:
        run.log_artifact(file)
    run.note(report.markdown(done))


def metric_name(text: str) -> str:
    """A name that MLflow takes for a metric.

    >>> metric_name("superfamily@1 remote"), metric_name("student, rank 64")
    ('superfamily_at_1_remote', 'student_rank_64')
    """
    return "_".join("".join(c if c.isalnum() else " " for c in text.replace("@", " at ")).split())
