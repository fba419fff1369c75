"""The cheapest pipeline that retains a function, as one MLflow run with a child for each pipeline on the front."""

import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from distil_rank.codes.store import ENCODER, write_codes
from distil_rank.commands.embed import embed
from distil_rank.commands.evaluate import metric_name
from distil_rank.compression.saved import save
from distil_rank.data.files import LABELLED, OWN_LABELS, find_source, sample
from distil_rank.embedding.extraction import default_store
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.store import Store
from distil_rank.options.embed import EmbedOptions
from distil_rank.options.evaluation import RecommendOptions
from distil_rank.recommendation.pipelines import Fitted, layer_costs
from distil_rank.recommendation.problem import CONFIRM, VALIDATE, Problem, open_problem, subset_of
from distil_rank.recommendation.search import Evaluator, Outcome, Recommendation, search_and_confirm, within_limits
from distil_rank.report.tables import configuration, recommendation_report
from distil_rank.report.writer import link, run_folder
from distil_rank.tracking.run import Run, start_run
from distil_rank.tracking.run_store import lineage

log = logging.getLogger(__name__)

CHILDREN = 20  # runs below one, as many as a page of runs shows


def recommend(options: RecommendOptions) -> Recommendation:
    """Recommend the cheapest pipeline that retains a function."""
    o, output = options, Path(options.output)
    data, labels, fasta, notes = o.data, o.labels, o.fasta, list[str]()
    if data == "auto" and fasta is None:
        data = find_source(data, LABELLED)
        if data == sample(LABELLED) and labels.source is None:  # of which one layer ships
            data, fasta, labels = "auto", f"{data}.fasta.gz", replace(labels, source=f"{data}/{OWN_LABELS}")
    if fasta is not None:
        named = [Path(one).name for one in (o.backbone, o.precision) if one != "auto"]  # vectors differ with these
        data = "-".join([f"{default_store(fasta)}-layers", *named]) if data == "auto" else data
        fasta, note = subset_of(fasta, labels, o.proteins, o.seed, output)
        notes += [note] if note else []
        embed(EmbedOptions(fasta, data, o.backbone, layer="all", precision=o.precision))

    started = time.perf_counter()
    problem = open_problem(data, labels, o.task, o.groups, o.seed, output)
    costs, words = layer_costs(problem)
    pipelines = within_limits(problem, o.max_bytes, o.max_time, costs)
    fitted = Fitted(problem)
    validation = Evaluator(fitted, VALIDATE, o.metric, seed=o.seed)
    confirmation = Evaluator(fitted, CONFIRM, o.metric, seed=o.seed)
    about = problem.about[problem.last]
    params: dict[str, object] = {"source": problem.source, "tasks": ", ".join(task.name for task in problem.tasks)}
    params |= {"groups": problem.groups, "keep": o.keep, "weigh": o.weigh, "seed": o.seed}
    params |= {"max_bytes": o.max_bytes, "max_time": o.max_time}
    title = f"{Path(problem.source).stem} keep {o.keep:g}"
    with start_run("recommend", title, params=params, tags=lineage(about)) as run:
        result = search_and_confirm(validation, confirmation, pipelines, costs, o.keep, o.weigh, o.alignment)
        pipeline, latest = result.answer.chosen.pipeline, output / "recommend" / "latest"
        result = replace(
            result,
            notes=(*result.notes, *notes, words),
            seconds=time.perf_counter() - started,
            next=_next_command(latest, problem, pipeline.layer),
            predictor=_predictor_command(o, problem, pipeline.layer),
        )
        folder = run_folder(latest.parent, run.id)
        report = recommendation_report(result)
        files = report.save(folder / "recommendation")
        place, encoder = folder / "codes", fitted.encoder(pipeline)
        encoder.provenance["asked"] = {"recommended": str(pipeline), "keep": o.keep}
        shares = zip(result.tasks, result.metrics, result.answer.confirmed.retained, strict=True)
        retained = {name: {"metric": metric, **asdict(share)} for name, metric, share in shares}
        saved = save(encoder, place / ENCODER, metrics={"retained": retained}, data=encoder.provenance)
        recommended = folder / "recommended.yaml"
        recommended.write_text(configuration(result, place / ENCODER, about))
        if about.get("format") == "store" and about.get("pooling") != "residue":
            path = split_source(problem.source)[0]
            write_codes(Store.open(path if pipeline.layer is None else f"{path}:{pipeline.layer}"), place, encoder)

        _log(run, result)
        run.keep(o, [*files, recommended, *sorted(saved.iterdir())], report.markdown())
        link(latest, folder)
    report.show()
    log.info("Recommendation: %s", folder / "recommendation.md")
    return result


def _next_command(latest: Path, problem: Problem, layer: str | None) -> str:
    """New proteins through the answer; or, where the backbone is unknown, the vectors that are there."""
    if problem.about[problem.last].get("backbone") is None:
        source = problem.source if len(problem.layers) == 1 else f"{problem.source}:{layer}"
        return f"make code DATA={source} ENCODER={latest / 'codes' / ENCODER} CODES=my_codes"
    program = sys.argv[0] if Path(sys.argv[0]).name == "distil-rank" else "distil-rank"  # as it was typed
    return f"{program} embed --config {latest / 'recommended.yaml'} --fasta new.fasta --store new_codes"


def _predictor_command(o: RecommendOptions, problem: Problem, layer: str | None) -> str | None:
    """For classes or numbers: what trains a predictor of them on the chosen layer, by the same groups."""
    if problem.searched:
        return None
    path, _ = split_source(problem.source)
    own = Path(path) / OWN_LABELS
    labels = o.labels.source or str(own if own.is_file() else problem.source)
    several = len(problem.layers) > 1 and layer is not None
    groups = "" if o.groups is None else f" GROUPS={o.groups}"
    source = f"{path}:{layer}" if several else problem.source
    column = "" if o.labels.column is None else f' ARGS="--labels.column {o.labels.column}"'
    return f"make train-teacher LABELS={labels.partition(',')[0]} DATA={source}{groups}{column}"


def _log(run: Run, result: Recommendation) -> None:
    """The parent says what was chosen; the cheapest of the front that retain enough, then the nearest, are children."""
    answer = result.answer
    confirmed, pipeline = answer.confirmed, answer.chosen.pipeline
    run.log_params({"choice": str(pipeline), "verdict": answer.verdict})
    run.log_params({name: str(one.chosen.pipeline) for name, one in result.answers.items()})
    words = f"{confirmed.bytes} bytes retain {confirmed.worst:.3f}"  # as much as the list has room for
    run.set_tags({"mlflow.runName": words})  # the list of runs then answers the question
    run.log_metrics({**_figures(confirmed), "pipelines": len(result.outcomes), "seconds": result.seconds})
    for outcome in sorted(result.front, key=lambda one: max(result.keep - one.worst, 0.0))[:CHILDREN]:
        name = str(outcome.pipeline)
        params = {"choice": name, **asdict(outcome.pipeline)}
        with start_run("recommend", name, params=params, tags={}, parent=run) as child:
            named = zip(result.tasks, outcome.retained, strict=True)
            tasks = {metric_name(f"retained {task}"): share.value for task, share in named}
            child.log_metrics({**_figures(outcome), **(tasks if len(tasks) > 1 else {})})


def _figures(outcome: Outcome) -> dict[str, float]:
    figures = {"retained": outcome.worst, "retained_low": outcome.at_least, "bytes": outcome.bytes}
    figures["score"] = outcome.scores[0]
    return figures if outcome.time is None else {**figures, "time": outcome.time}
