"""The cheapest pipeline that retains a function, as one MLflow run with a child for each pipeline on the front."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml

from distil_rank.codes.store import ENCODER, write_codes
from distil_rank.commands.embed import embed
from distil_rank.commands.evaluate import metric_name
from distil_rank.compression.saved import save
from distil_rank.data.files import LABELLED, sample
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.embedding.extraction import default_store
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.store import Store
from distil_rank.evaluation.labelled import OWN_LABELS
from distil_rank.evaluation.representations import NO_MMSEQS
from distil_rank.options.embed import EmbedOptions
from distil_rank.options.evaluation import RecommendOptions
from distil_rank.recommendation.pipelines import Fitted, full_pipeline, measure_costs
from distil_rank.recommendation.problem import CONFIRM, FIT, VALIDATE, open_problem, subset_of
from distil_rank.recommendation.search import (
    Costs,
    Evaluator,
    Outcome,
    Recommendation,
    cheapest,
    pareto_front,
    search_pipelines,
    within_limits,
)
from distil_rank.report.tables import configuration, recommendation_report
from distil_rank.report.writer import run_folder, set_latest
from distil_rank.tracking.run import Run, start_run
from distil_rank.tracking.run_store import lineage

log = logging.getLogger(__name__)

CHILDREN = 20  # runs below one, as many as a page of runs shows


def recommend(options: RecommendOptions) -> Recommendation:
    """Recommend the cheapest pipeline that retains a function."""
    o, output = options, Path(options.output)
    data, labels, fasta, notes = o.data, o.labels, o.fasta, list[str]()
    if data == "auto" and fasta is None and labels.source is None:
        fasta, labels = sample(f"{LABELLED}.fasta.gz"), replace(labels, source=f"{sample(LABELLED)}/{OWN_LABELS}")
    if fasta is not None:
        data = f"{default_store(fasta)}-layers" if data == "auto" else data
        fasta, note = subset_of(fasta, labels, o.proteins, o.seed, output)
        notes += [note] if note else []
        embed(EmbedOptions(fasta, data, o.backbone, layer="all", precision=o.precision))

    started = time.perf_counter()
    problem = open_problem(data, labels, o.task, o.groups, o.seed, output)
    within_limits(problem, o.max_bytes)  # before anything is measured
    about, sequences = problem.about[problem.last], problem.sequences
    params: dict[str, object] = {"source": problem.source, "tasks": ", ".join(task.name for task in problem.tasks)}
    params |= {"groups": problem.groups, "keep": o.keep, "weigh": o.weigh, "seed": o.seed}
    params |= {"max_bytes": o.max_bytes, "max_time": o.max_time}
    title = f"{Path(problem.source).stem} keep {o.keep:g}"
    with start_run("recommend", title, params=params, tags=lineage(about)) as run:
        log.info("Measuring the time of each layer ...")
        costs, words = measure_costs(list(problem.layers), about, sequences)
        fitted = Fitted(problem)
        pipelines = within_limits(problem, o.max_bytes, o.max_time, costs)
        outcomes = search_pipelines(fitted, pipelines, costs, o.metric, seed=o.seed)
        result = _confirmed(o, fitted, costs, outcomes, [*notes, words], started)

        folder = run_folder(output / "recommend", run.id)
        report = recommendation_report(result)
        files = report.save(folder / "recommendation")
        place, pipeline = folder / "codes", result.chosen.pipeline
        encoder = fitted.encoder(pipeline)
        encoder.provenance["asked"] = {"recommended": str(pipeline), "keep": o.keep}
        shares = zip(result.tasks, result.metrics, result.confirmed.retained, strict=True)
        retained = {name: {"metric": metric, **asdict(share)} for name, metric, share in shares}
        saved = save(encoder, place / ENCODER, metrics={"retained": retained}, data=encoder.provenance)
        recommended = folder / "recommended.yaml"
        recommended.write_text(configuration(result, place / ENCODER, about))
        if about.get("format") == "store" and about.get("pooling") != "residue":
            path = split_source(problem.source)[0]
            write_codes(Store.open(path if pipeline.layer is None else f"{path}:{pipeline.layer}"), place, encoder)

        _log(run, result, [*files, recommended, *sorted(saved.iterdir())])
        run.note(report.markdown())
        run.log_text(yaml.safe_dump(asdict(o)), "config.yaml")
        set_latest(folder)
    report.show()
    log.info("Recommendation: %s", folder / "recommendation.md")
    return result


def _confirmed(
    o: RecommendOptions, fitted: Fitted, costs: Costs, outcomes: Sequence[Outcome], notes: list[str], started: float
) -> Recommendation:
    """Choose on the validation groups, then look once at the confirmation groups."""
    problem = fitted.problem
    chosen, reached = cheapest(outcomes, o.keep, o.weigh)

    # The one look at the confirmation groups.
    evaluator = Evaluator(fitted, CONFIRM, o.metric)
    confirmed, full = (evaluator.outcome(one, costs) for one in (chosen.pipeline, full_pipeline(problem)))
    searched = o.alignment and problem.sequences is not None and problem.tasks[0].target.kind == "retrieval"
    if searched and mmseqs_binary() is None:
        notes.append(NO_MMSEQS)

    splits = [problem.split == split for split in (FIT, VALIDATE, CONFIRM)]
    enough = "confirmed" if confirmed.at_least >= o.keep else "not confirmed"
    return Recommendation(
        source=problem.source,
        tasks=tuple(task.name for task in problem.tasks),
        metrics=tuple(one.metric for one in evaluator.trials),
        keep=o.keep,
        weigh=o.weigh,
        verdict=enough if reached else "nothing retains it",
        chosen=chosen,
        confirmed=confirmed,
        full=full,
        front=tuple(pareto_front(outcomes)),
        outcomes=tuple(outcomes),
        costs=tuple(costs.values()),
        baselines=tuple(evaluator.baselines(o.alignment)),
        proteins=tuple(int(rows.sum()) for rows in splits),
        groups=tuple(len(np.unique(problem.group[rows])) for rows in splits),
        grouping=problem.groups,
        noise=problem.noise_source,
        seconds=time.perf_counter() - started,
        notes=(*problem.notes, *notes),
    )


def _log(run: Run, result: Recommendation, files: Sequence[Path]) -> None:
    """The parent says what was chosen; the cheapest of the front that retain enough, then the nearest, are children."""
    confirmed = result.confirmed
    run.log_params({"choice": str(result.chosen.pipeline), "verdict": result.verdict})
    answer = f"{confirmed.bytes} bytes retain {confirmed.worst:.3f}"  # as much as the list has room for
    run.set_tags({"mlflow.runName": answer})  # the list of runs then answers the question
    run.log_metrics({**_figures(confirmed), "pipelines": len(result.outcomes), "seconds": result.seconds})
    for file in files:
        run.log_artifact(file)
    for outcome in sorted(result.front, key=lambda one: max(result.keep - one.worst, 0.0))[:CHILDREN]:
        name = str(outcome.pipeline)
        params = {"choice": name, **asdict(outcome.pipeline)}
        with start_run("recommend", name, params=params, tags={}, parent=run) as child:
            named = zip(result.tasks, outcome.retained, strict=True)
            tasks = {metric_name(f"retained {task}"): share.value for task, share in named}
            child.log_metrics({**_figures(outcome), **(tasks if len(tasks) > 1 else {})})


def _figures(outcome: Outcome) -> dict[str, float]:
    figures = {"retained": outcome.worst, "retained_low": outcome.at_least, "bytes": outcome.bytes}
    return figures if outcome.time is None else {**figures, "time": outcome.time}
