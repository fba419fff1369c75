"""The cheapest pipeline that keeps a function, as one MLflow run with a child for each pipeline on the front."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distil_rank.codes.sources import origin_of
from distil_rank.codes.store import ENCODER, write_codes
from distil_rank.commands.embed import extract
from distil_rank.commands.evaluate import metric_name
from distil_rank.commands.lineage import lineage_of_vectors
from distil_rank.compression.saved import save
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.run import default_store
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.evaluation.alignment import MISSING, alignment_scores, has_mmseqs
from distil_rank.evaluation.labelled import OWN_LABELS
from distil_rank.evaluation.representations import Representation, composition
from distil_rank.evaluation.task import Kind
from distil_rank.evaluation.trials import RetrievalTrial
from distil_rank.options.codes import AugmentationOptions
from distil_rank.options.embed import Precision
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.costs import measure_costs, query_seconds
from distil_rank.recommendation.opening import open_problem
from distil_rank.recommendation.parts import CONFIRM, FIT
from distil_rank.recommendation.pipelines import Fitted
from distil_rank.recommendation.problem import Problem
from distil_rank.recommendation.search import (
    QUERIES,
    Evaluator,
    Limits,
    Weigh,
    cheapest,
    check_limits,
    pareto_front,
    search_pipelines,
)
from distil_rank.recommendation.subset import subset_of
from distil_rank.report import recommendation as report
from distil_rank.report.choices import Baseline, Cost, Outcome, Recommendation
from distil_rank.report.run_folder import run_folder, set_latest
from distil_rank.samples import LABELLED, sample
from distil_rank.tracking.run import Run, start_run

log = logging.getLogger(__name__)

MOST_PROTEINS = 20_000


def recommend(
    data: str = "auto",
    labels: LabelOptions = LabelOptions(),  # noqa: B008 - frozen
    keep: float = 0.99,
    weigh: Weigh = "both",
    max_bytes: float | None = None,
    max_time: float | None = None,
    fasta: str | None = None,
    backbone: str = "auto",
    proteins: int = MOST_PROTEINS,
    task: Kind | Literal["auto"] = "auto",
    groups: str | None = None,
    metric: str | None = None,
    augmentation: AugmentationOptions = AugmentationOptions(),  # noqa: B008 - frozen
    max_queries: int = QUERIES,
    alignment: bool = True,
    seed: int = 0,
    output: str = "results",
    config: str = "",
    precision: Precision = "auto",
) -> Recommendation:
    """Recommend the cheapest pipeline that keeps a function.

    Args:
        data: A store of one or several layers, or any file that distil reads; auto embeds the labelled sample.
        labels: Where labels come from; several tables, separated by commas, are several tasks that all must be kept.
            Without labels proteins are to be found by their perturbed copies.
        keep: Share of the full vector's score that must be kept.
        weigh: What is to be cheap: time, bytes, or both (their product).
        max_bytes: For each protein at most.
        max_time: Share of the full backbone's time at most.
        fasta: Sequences to embed into `data` first, all layers in one pass (only what is missing there).
        backbone: ESM-2 model for that.
        proteins: At most so many of a larger FASTA file, whole groups of labels, the largest in part.
        task: retrieval, classification, multilabel or regression; auto decides by the labels.
        groups: What is kept on one side; see evaluate.
        metric: The score that is to be kept; by default mAP (retrieval), accuracy, macro_f1 or spearman.
        augmentation: How copies are perturbed, where there are no labels.
        max_queries: Validation proteins that each pipeline is searched with at most.
        alignment: Search with MMseqs2 too, where it is installed.
        seed: Of all draws.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
        precision: To embed `fasta` in; see `distil-rank embed`.
    """
    if not 0 < keep <= 2:
        raise InputError(f"Expected --keep in (0, 2], a share of the full vector's score, but got {keep}.")
    data, labels, notes = _embedded(data, labels, fasta, (backbone, precision), proteins, seed, output)
    started = time.perf_counter()
    problem = open_problem(data, labels, task, groups, metric, seed, Path(output), augmentation)
    limits = Limits(*(np.inf if limit is None else limit for limit in (max_bytes, max_time)))
    check_limits(problem, limits)
    name = f"{Path(problem.source).stem} keep {keep:g}"
    params = {"source": problem.source, "keep": keep, "weigh": weigh, "max_bytes": max_bytes, "max_time": max_time}
    params |= {"tasks": ", ".join(one.name for one in problem.tasks), "groups": problem.groups, "seed": seed}
    with start_run("recommend", name, params=params, tags=lineage_of_vectors(problem.about[problem.last])) as run:
        log.info("Measuring the time of each exit ...")
        costs, words = measure_costs(list(problem.layers), problem.about[problem.last], problem.sequences)
        fitted = Fitted(problem.layers, problem.part == FIT, problem.noise, _origins(problem))
        outcomes = search_pipelines(problem, fitted, costs, limits, max_queries, seed)
        result = _conclude(problem, fitted, costs, outcomes, keep, weigh, alignment, started, (*notes, words))
        folder = run_folder(Path(output) / "recommend", run.id)
        files = report.save(result, folder)
        _keep(problem, fitted, result, folder)
        _log(run, result, files, config)
        set_latest(folder)
    log.info("Recommendation: %s", folder / "recommendation.md")
    return result


def _embedded(
    data: str,
    labels: LabelOptions,
    fasta: str | None,
    model: tuple[str, Precision],
    proteins: int,
    seed: int,
    output: str,
) -> tuple[str, LabelOptions, list[str]]:
    """The store to use, with all layers embedded first where sequences are given or the sample is meant."""
    notes: list[str] = []
    if data == "auto" and fasta is None and labels.source is None:
        fasta, labels = sample(f"{LABELLED}.fasta.gz"), LabelOptions(f"{sample(LABELLED)}/{OWN_LABELS}")
    backbone, precision = model
    if fasta is None:
        if precision != "auto":
            raise InputError(
                f"Expected --fasta, whose proteins are to be embedded in {precision}, but got none; vectors that are "
                "there have theirs."
            )
        return data, labels, notes
    store = f"{default_store(fasta)}-layers" if data == "auto" else data
    fasta, note = subset_of(fasta, labels, proteins, seed, Path(output))
    how = {"backbone": backbone, "precision": precision, "pooling": "mean", "layer": "all"}
    extract({"fasta": fasta, "store": store, **how})
    return store, labels, [*notes, *([note] if note else [])]


def _conclude(
    problem: Problem,
    fitted: Fitted,
    costs: Mapping[str | None, Cost],
    outcomes: Sequence[Outcome],
    keep: float,
    weigh: Weigh,
    alignment: bool,
    started: float,
    notes: Sequence[str],
) -> Recommendation:
    """Choose on the validation groups, then look once at the confirmation groups."""
    chosen, reached = cheapest(outcomes, keep, weigh)
    evaluator = Evaluator(problem, fitted, CONFIRM)
    confirmed = evaluator.outcome(chosen.pipeline, costs)
    full = evaluator.outcome(evaluator.full, costs)
    verdict = "nothing keeps it" if not reached else "confirmed" if confirmed.at_least >= keep else "not confirmed"
    maps = [fitted.encoder(pipeline) for pipeline in (chosen.pipeline, full.pipeline)]
    seconds = query_seconds(maps, [problem.layers[one.pipeline.layer] for one in (chosen, full)])
    searchable = problem.sequences is not None and isinstance(evaluator.sides[0].trial, RetrievalTrial)
    if alignment and searchable and not has_mmseqs():
        notes = [*notes, MISSING]
    untimed = [] if seconds else ["A query's time was not measured: faiss is missing (pip install faiss-cpu)."]
    parts = range(problem.part.max() + 1)
    return Recommendation(
        problem.source,
        tuple(task.name for task in problem.tasks),
        evaluator.metrics,
        keep,
        weigh,
        verdict,
        chosen,
        confirmed,
        full,
        tuple(pareto_front(outcomes)),
        tuple(outcomes),
        tuple(costs.values()),
        tuple(_baselines(problem, evaluator, alignment)),
        seconds,
        tuple(int((problem.part == part).sum()) for part in parts),
        tuple(len(np.unique(problem.group[problem.part == part])) for part in parts),
        problem.groups,
        problem.noise_source,
        time.perf_counter() - started,
        (*problem.notes, *notes, *untimed),
    )


def _baselines(problem: Problem, evaluator: Evaluator, alignment: bool) -> list[Baseline]:
    """Composition, and for retrieval MMseqs2, on the first task."""
    if problem.sequences is None:
        return []
    side = evaluator.sides[0]
    sequences = [problem.sequences[row] for row in side.rows]
    rows = composition(problem.sequences).make(problem.part == FIT).queries[torch.from_numpy(side.rows)]
    simple = Representation("composition", rows, rows, 0)
    baselines = {"composition": side.trial.measure(simple)[side.metric].value}
    if alignment and isinstance(side.trial, RetrievalTrial) and has_mmseqs():
        statistics = side.trial.measure_scores(alignment_scores(sequences))
        baselines["MMseqs2"] = statistics[side.metric].value
    return [Baseline(name, value / side.reference.value) for name, value in baselines.items()]


def _origins(problem: Problem) -> dict[str | None, dict[str, Any]]:
    """What the code map of each layer tells of the vectors it is for."""
    return {layer: origin_of(about) for layer, about in problem.about.items()}


def _keep(problem: Problem, fitted: Fitted, result: Recommendation, folder: Path) -> None:
    """The chosen pipeline as a code map, as a configuration, and put to work on the store."""
    pipeline = result.chosen.pipeline
    encoder = fitted.encoder(pipeline)
    encoder.provenance["asked"] = {"recommended": str(pipeline), "keep": result.keep}
    metrics = {
        name: {"metric": metric, **asdict(interval)}
        for name, metric, interval in zip(result.tasks, result.metrics, result.confirmed.retained, strict=True)
    }
    place = folder / "codes"
    save(encoder, place / ENCODER, metrics={"retained": metrics}, data=encoder.provenance)
    (folder / "recommended.yaml").write_text(report.configuration(result, place / ENCODER, problem.about[problem.last]))
    about = problem.about[problem.last]
    if about.get("format") == "store" and about.get("pooling") != "residue":
        path, _ = split_source(problem.source)
        source = path if pipeline.layer is None else f"{path}:{pipeline.layer}"
        write_codes(Store.open(source), place, encoder)


def _log(run: Run, result: Recommendation, files: Sequence[Path], config: str) -> None:
    """The parent says what was chosen; each pipeline of the front is a child."""
    choice = str(result.chosen.pipeline)
    run.log_params({"choice": choice, "verdict": result.verdict})
    name = f"{choice}, {result.confirmed.bytes} bytes: keeps {result.confirmed.worst:.3f}, {result.verdict}"
    run.set_tags({"mlflow.runName": name})  # the list of runs then answers the question
    run.log_metrics({**_figures(result.confirmed), "pipelines": len(result.outcomes), "seconds": result.seconds})
    run.log_text(config, "config.yaml")
    for file in [
        *files,
        *sorted(files[0].parent.glob("recommended.yaml")),
        *sorted((files[0].parent / "codes" / ENCODER).iterdir()),
    ]:
        run.log_artifact(file)
    run.note(report.markdown(result))
    for outcome in result.front:
        pipeline = outcome.pipeline
        params = {"choice": str(pipeline), **asdict(pipeline)}
        with start_run("recommend", str(pipeline), params=params, tags={}, parent=run) as child:
            retained = {
                metric_name(f"kept {name}"): one.value for name, one in zip(result.tasks, outcome.retained, strict=True)
            }
            child.log_metrics({**_figures(outcome), **(retained if len(retained) > 1 else {})})


def _figures(outcome: Outcome) -> dict[str, float]:
    figures = {"retained": outcome.worst, "retained_low": outcome.at_least, "bytes": outcome.bytes}
    return figures if outcome.time is None else {**figures, "time": outcome.time}
