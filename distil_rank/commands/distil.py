"""Distil one teacher as an MLflow run, which keeps the student and its report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from distil_rank.commands.lineage import lineage
from distil_rank.commands.train_teacher import Teacher, check_rank_request, train_teacher
from distil_rank.compression.artefact import save
from distil_rank.compression.own_layer import load_head
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.description import DataDescription
from distil_rank.evaluation.results import OURS, Result, TeacherResult, save_json
from distil_rank.lowrank.digests import tensor_digest
from distil_rank.report import figures, report
from distil_rank.report.run_folder import run_folder, set_latest
from distil_rank.tracking.logger import RunLogger
from distil_rank.tracking.registry import log_student, promote_champion
from distil_rank.tracking.run import Run, start_run
from distil_rank.training.experiment import Experiment, run_experiment
from distil_rank.training.seeds import TrainingOptions, WarmStart

log = logging.getLogger(__name__)


def distil(
    data: EmbeddingDataModule,
    teacher: dict[str, Any] | None = None,
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    rank: int | float | str = 64,
    warm_start: WarmStart = "closed_form",
    shrinkage: float | Literal["auto"] = 0.0,
    head: str | None = None,
    seeds: Sequence[int] = (42,),
    ckpt_path: str | None = None,
    output: str = "results",
    config: str = "",
    parent: Run | None = None,
    experiment: str = "distil",
) -> Result:
    """Distil one teacher and report what survived.

    Args:
        data: The embeddings.
        teacher: Options of `train_teacher`; it is trained first unless that was done already.
        distil: Options of `DistilModule`.
        trainer: Options of Lightning's Trainer.
        rank: An integer, a share of the teacher's output variance to keep (0.95), or `auto`.
        warm_start: Where training begins: the exact optimum of the squared error, or the SVD of the weight.
        shrinkage: Of the input covariance, for fewer rows than dimensions: 0 to 1, or `auto`.
        head: What stands behind the layer, to be matched at its end: steps like `tanh,head.safetensors:out_proj`.
        seeds: Of the trained students; the first one is kept.
        ckpt_path: Resume from this Lightning checkpoint.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
        parent: The run that this one is part of.
        experiment: MLflow experiment.
    """
    data.prepare_data()
    data.setup()
    check_rank_request(data, rank, teacher)
    dense = train_teacher(data, **(teacher or {}), output=output, config=config, reuse=True)
    about = data.description()
    params = {
        "teacher": dense.name,
        "backbone": about.backbone,
        "rank_requested": rank,
        "warm_start": warm_start,
        "shrinkage": shrinkage,
        "seeds": list(seeds),
        "head": head,
        "data": data.hparams,
        "distil": distil or {},
    }
    title = f"{dense.name} r{rank} {warm_start} {about.dim}-d {Path(about.source).stem}"
    tags = {**lineage(about), "teacher_run": dense.run_id}
    started = time.perf_counter()
    with start_run(experiment, title, params=params, tags=tags, parent=parent) as run:
        _log_data(run, about)
        options = TrainingOptions(
            warm_start,
            seeds,
            {**(distil or {}), **({} if head is None else {"head": load_head(head)})},
            trainer or {},
            checkpoints=Path(output) / "checkpoints" / f"{dense.name}-r{rank}",
            ckpt_path=ckpt_path,
            logger=RunLogger(run),
        )
        outcome = run_experiment(dense.name, dense.layer, dense.check, data, rank, shrinkage, options)
        teachers = [replace(outcome.result, run_id=run.id)]
        result = Result(data=about, teachers=teachers, seconds=time.perf_counter() - started)
        folder = run_folder(Path(output) / "distil" / f"{dense.name}-r{outcome.result.rank}", run.id)
        save_report(result, folder / "summary.json", folder / "report.png", run)
        _save_student(outcome, dense, about, warm_start, folder)
        log_outcome(run, data, dense, outcome, config)
    return result


def _log_data(run: Run, about: DataDescription) -> None:
    """The three sides of the data as datasets of the run."""
    for part in ("train", "val", "test"):
        shape = (getattr(about.rows, part), about.dim)
        name = f"{Path(about.source).stem} {part}"  # MLflow takes two of one name and digest for the same
        run.log_dataset(shape, name=name, digest=about.digest, context=part, source=about.source)


def _save_student(
    outcome: Experiment, dense: Teacher, about: DataDescription, warm_start: WarmStart, folder: Path
) -> None:
    """Save the student as an artefact in the folder of its run, which becomes the latest."""
    outcome.student.provenance |= {
        "teacher_sha256": tensor_digest(dense.layer.weight, dense.layer.bias),
        "warm_start": warm_start,
        "trained_steps": outcome.fit.steps if outcome.fit.training_helped else 0,
    }
    held_out = {"held_out_r2": asdict(outcome.result.row(OURS).metrics["r2"])}
    save(outcome.student, folder / "student", metrics=held_out, data=asdict(about))
    student = set_latest(folder) / "student"
    log.info("Student: %s (distil_rank.load reads it; `export` turns it into ONNX and others).", student)


def save_report(result: Result, json_path: Path, png_path: Path, run: Run) -> None:
    """Write JSON, Markdown and figure, and keep all three with the run."""
    save_json(result, json_path)
    text = report.markdown(result)
    markdown_path = json_path.with_suffix(".md")
    markdown_path.write_text(text)
    figures.final_report(result, png_path)
    for path in (json_path, markdown_path, png_path):
        run.log_artifact(path)
    run.note(text)
    log.info("Report: %s and %s", json_path, png_path)


def log_outcome(run: Run, data: EmbeddingDataModule, teacher: Teacher, outcome: Experiment, config: str) -> None:
    """Log final figures, the configuration and the student itself."""
    result = outcome.result
    metrics = final_metrics(result)
    run.log_params({"rank": result.rank})
    run.log_metrics(metrics)
    run.log_text(config, "config.yaml")
    uri = log_student(run, outcome.student, data.rows("test").numpy()[:4], metrics={"r2": metrics["test/r2"]})
    promote_champion(run, uri, r2=metrics["test/r2"], rank=result.rank, teacher=_digest(teacher), data=data.digest)


def final_metrics(result: TeacherResult) -> dict[str, float]:
    """What MLflow's run list shows of one distilled layer."""
    ours = result.row(OURS)
    metrics = {f"test/{name}": estimate.value for name, estimate in ours.metrics.items()}
    metrics |= {f"test_svd/{name}": estimate.value for name, estimate in result.row("svd").metrics.items()}
    metrics |= {
        "predicted_r2": result.predicted_r2,
        "parameter_ratio": result.parameters.ratio,
        "share_of_optimum": ours.share_of_optimum,
    }
    if (speed_up := result.speed_up()) is not None:
        metrics["speed_up"] = speed_up
    if ours.function_retained is not None:
        metrics["test/function_retained"] = ours.function_retained.retained.value
    return metrics


def _digest(teacher: Teacher) -> str:
    """A name that differs for different layers of the same name."""
    return f"{teacher.name} {tensor_digest(teacher.layer.weight, teacher.layer.bias)[:16]}"
