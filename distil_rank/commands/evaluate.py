"""Representations evaluated on a labelled task, as one MLflow run."""

import logging
from pathlib import Path

from distil_rank.commands.embed import embed
from distil_rank.compression.saved import load, read_manifest
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.evaluate import evaluate as evaluate_task
from distil_rank.evaluation.labelled import LabelledData, load_matching, open_labelled
from distil_rank.evaluation.representations import (
    Representation,
    alignment,
    full_vector,
    module_output,
    principal_components,
    sequence_baselines,
)
from distil_rank.options.embed import EmbedOptions
from distil_rank.options.evaluation import EvaluateOptions
from distil_rank.report.tables import evaluation_report
from distil_rank.report.writer import publish, run_folder
from distil_rank.tracking.run import Run, start_run
from distil_rank.tracking.run_store import lineage

log = logging.getLogger(__name__)

RANKS = (16, 32, 64, 128)  # of the students that are made where none are named


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Evaluate what representations of the same proteins retain of a labelled task."""
    o, source = options, options.data
    if o.fasta is not None:
        store = None if source == "auto" else source
        source = str(embed(EmbedOptions(o.fasta, store, o.backbone, precision=o.precision)).store)
    proteins = open_labelled(source, o.labels, o.task, o.groups, o.fit_fraction, o.seed)
    sequences, about = proteins.embeddings.sequences, proteins.embeddings.provenance
    representations, runs = _representations(o, proteins)
    searched = o.alignment and proteins.target.kind == "retrieval"
    baselines, missing = sequence_baselines(sequences, alignment if searched else None)
    representations, notes = [*representations, *baselines], [*proteins.notes, *missing]

    log.info("Evaluating %d representations: %s", len(representations), proteins.groups.description)
    place = Path(o.output) / "evaluate" / Path(proteins.source).stem
    params = {"source": proteins.source, "labels": proteins.labels, "task": proteins.target.kind}
    params |= {"groups": proteins.groups.description, "backbone": about.get("backbone", "unknown")}
    with start_run(
        "evaluate", f"{place.name} {proteins.target.kind}", params=params, tags=lineage(about) | runs
    ) as run:
        target, groups = proteins.target, proteins.groups
        evaluation = evaluate_task(target, groups, representations, proteins.labels, notes, o.metric, o.seed)
        folder = run_folder(place, run.id)
        report = evaluation_report(evaluation)
        run.keep(o, report.save(folder / "evaluation"), report.markdown())
        _log_figures(run, evaluation)
        publish(folder, place)
    report.show()
    log.info("Evaluation: %s", place / "evaluation.md")
    return evaluation


def _representations(o: EvaluateOptions, proteins: LabelledData) -> tuple[list[Representation], dict[str, str]]:
    """The full vector first, then students and other matrices; and tags of the students' runs."""
    x, runs = proteins.embeddings.x, dict[str, str]()
    ranks = [rank for rank in RANKS if rank < x.shape[1]] if o.ranks is None else o.ranks
    representations = [full_vector(x), *(principal_components(x, rank) for rank in ranks)]
    for number, name in enumerate(o.students, 1):
        folder, _, rank = name.rpartition(":") if name.rpartition(":")[2].isdigit() else (name, "", "")
        module = load(folder, rank=int(rank) if rank else None)
        if (width := getattr(module, "in_features", None)) != x.shape[1]:
            raise InputError(f"Expected a student for inputs of width {x.shape[1]} in {folder} but got {width}.")
        note = f"{name} was fitted elsewhere: no evaluated protein may have been among its calibration data"
        representations.append(module_output(name, module.eval(), x, note))
        if run_id := read_manifest(folder).get("data", {}).get("run"):
            runs[f"student_{number}_run"] = str(run_id)
    for one in o.others:
        name, _, path = one.rpartition("=")
        other = load_matching(path, proteins.embeddings.ids)
        representations.append(full_vector(other, name or Path(path).name, "matrix"))
    return representations, runs


def _log_figures(run: Run, evaluation: Evaluation) -> None:
    """Every score; the run list shows the full vector beside the best student."""
    metric = evaluation.headline
    figures: dict[str, float] = {"full": evaluation.entries[0].scores[metric].value}
    for entry in evaluation.entries:
        name = metric_name(entry.name)
        figures |= {f"{name}/{metric_name(key)}": one.value for key, one in entry.scores.items()}
        if metric in entry.retained:
            figures[f"{name}/retained"] = entry.retained[metric].value
    others = [entry for entry in evaluation.entries if entry.role in ("student", "matrix")]
    if others:
        best = max(others, key=lambda entry: entry.scores[metric].value)
        run.log_params({"best": best.name})
        figures |= {"best": best.scores[metric].value, "best_bytes": best.bytes or 0}
        if share := best.retained.get(metric):  # none where the full vector's score is not positive
            figures |= {"retained": share.value, "retained_low": share.low}
    run.log_params({"metric": metric})
    run.log_metrics(figures)


def metric_name(text: str) -> str:
    """A name that MLflow takes for a metric.

    >>> metric_name("superfamily@1 remote"), metric_name("student, rank 64")
    ('superfamily_at_1_remote', 'student_rank_64')
    """
    return "_".join("".join(c if c.isalnum() else " " for c in text.replace("@", " at ")).split())
