"""Distil one teacher as an MLflow run, which keeps the student and its report."""

import copy
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from distil_rank.artefact import MANIFEST
from distil_rank.commands.train_teacher import TRAINING, check_rank_fits, make_teacher, open_data
from distil_rank.compression.own_layer import load_head
from distil_rank.compression.saved import load, read_manifest, save
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.labelled import open_to_predict
from distil_rank.evaluation.results import OURS, Result, TeacherResult
from distil_rank.evaluation.trust import calibrate, measure_student
from distil_rank.lowrank.low_rank import tensor_digest
from distil_rank.lowrank.predictor import Predictor
from distil_rank.measure.metrics import lost
from distil_rank.options.training import DataOptions, DistilOptions, StudentOptions
from distil_rank.report.tables import comparison_report, predictor_report
from distil_rank.report.writer import link, run_folder
from distil_rank.tracking.run import Run, start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import RunLogger, log_predictor, log_student, register_student
from distil_rank.training.experiment import RANK, run_experiment
from distil_rank.training.head import smallest_student

log = logging.getLogger(__name__)

SHARE = 0.999  # of the predictions of a teacher from labels, by default
SERVED = """from mlflow.models import set_model

from distil_rank.commands.predict import predict_sequences
from distil_rank.tracking.training import ServedPredictor

set_model(ServedPredictor(predict_sequences))
"""  # MLflow runs this file to load the model: nothing is pickled


def distil(options: DistilOptions) -> Result | Path:
    """Distil one teacher and report what is retained; of one that was trained from labels make a predictor."""
    if (Path(options.teacher.kind) / MANIFEST).is_file():
        return distil_predictor(options)
    result = distil_teacher(open_data(options.data), options)
    comparison_report(result).show()
    return result


def distil_teacher(data: EmbeddingDataModule, options: DistilOptions, parent: Run | None = None) -> Result:
    """One teacher, its students and their report, as one MLflow run, which may be part of another.

    The data are set up already.
    """
    started = time.perf_counter()
    options = replace(options, rank=options.rank or RANK)
    assert options.rank is not None
    check_rank_fits(data, options.rank, options.teacher)
    head = None if options.head is None else load_head(options.head)
    teacher = make_teacher(data, options.teacher, options.trainer, options.output, reuse=True)
    about = data.description()
    params: dict[str, Any] = {"teacher": teacher.name, "backbone": about.backbone, "rank_requested": options.rank}
    params |= {"seeds": list(options.seeds), "head": options.head}
    params |= {"data": data.hparams, "distil": asdict(options.distil)}
    title = f"{teacher.name} r{options.rank} {options.distil.warm_start} {about.dim}-d {Path(about.source).stem}"
    tags = {**lineage(asdict(about)), "teacher_run": teacher.run_id}
    experiment = parent.experiment if parent else "distil"
    with start_run(experiment, title, params=params, tags=tags, parent=parent) as run:
        for split in about.rows:
            name = f"{Path(about.source).stem} {split}"  # MLflow takes two of one name and digest for the same
            run.log_dataset(about.dim, name=name, digest=about.digest, context=split, source=about.source)
        checkpoints = Path(options.output) / "checkpoints" / f"{teacher.name}-r{options.rank}"
        outcome, student = run_experiment(
            teacher.name, teacher.layer, teacher.check, data, options, head, RunLogger(run), checkpoints
        )
        outcome = replace(outcome, run_id=run.id)
        result = Result(data=about, teachers=[outcome], seconds=time.perf_counter() - started)
        folder = run_folder(Path(options.output) / "distil" / f"{teacher.name}-r{outcome.rank}", run.id)
        save_report(result, options, folder / "summary", "report.png", run)

        digest = tensor_digest(teacher.layer.weight, teacher.layer.bias)
        student.provenance["teacher_sha256"] = digest
        held_out = {"held_out_r2": asdict(outcome.row(OURS).metrics["r2"])}
        save(student, folder / "student", metrics=held_out, data=asdict(about))
        saved = link(folder.parent / "latest", folder) / "student"
        log.info("Student: %s (distil_rank.load reads it; `export` turns it into ONNX and others).", saved)

        metrics = final_metrics(outcome)
        run.log_params({"rank": outcome.rank})
        run.log_metrics(metrics)
        uri = log_student(run, student, data.rows("test").numpy()[:4], metrics={"r2": metrics["r2"]})
        lineage_key = f"{teacher.name} {digest[:16]}"  # layers of one name can differ
        kind = {"rank": outcome.rank, "teacher": lineage_key, "data": data.digest}
        register_student(run, uri, {"r2": metrics["r2"], **kind})
    return result


def distil_predictor(o: DistilOptions) -> Path:
    """Distil a teacher from labels at the lowest rank that retains its predictions; returns the predictor's folder."""
    kind, source = o.teacher.kind, Path(o.teacher.kind)
    if o.data != DataOptions() or o.distil != StudentOptions() or o.head or o.ckpt_path:
        raise InputError(
            f"Expected --rank, --trainer and --seeds alone for {kind}, which knows its data and head, but "
            "got options of --data, --distil, --head or --ckpt_path; leave them out."
        )
    facts, teacher = read_manifest(kind)["data"], load(kind)
    if not isinstance(teacher, Predictor) or not isinstance(teacher.layer, torch.nn.Linear) or "task" not in facts:
        raise InputError(f"Expected a teacher that was trained from labels in {kind} but it holds a student.")
    proteins, split = open_to_predict(**facts["task"])
    data = EmbeddingDataModule.of(proteins.embeddings, split, proteins.target.y)
    if data.digest != facts["digest"]:
        raise InputError(
            f"Expected vectors, labels and groups as {kind} was trained on but {data.source} has others now; "
            "train it again."
        )
    y, groups = proteins.target.y, proteins.groups.number
    assert y is not None
    name, about, full = source.name, proteins.embeddings.provenance, min(teacher.layer.weight.shape)
    rank, share = (o.rank, SHARE) if isinstance(o.rank, int) else (None, o.rank or SHARE)
    if isinstance(share, str) or (rank or 1) > full:
        raise InputError(f"Expected --rank as a share below 1, or up to {full}, the layer's own, but got {o.rank}.")
    params: dict[str, Any] = {"teacher": name, "backbone": about.get("backbone", "unknown"), "task": teacher.kind}
    params |= {"rank_requested": rank or share, "source": facts["task"]["source"]}
    tags = {**lineage({**about, "digest": data.digest}), "teacher_run": facts["run"]}
    with start_run("distil", f"{name} predictor", params=params, tags=tags) as run:
        layer, curve = smallest_student(teacher, data, rank, share, o.trainer, o.seeds[0], RunLogger(run))
        predictor = copy.deepcopy(teacher)
        predictor.layer = layer
        calibrate(predictor, data.rows("val"), y[split.val], groups[split.val])
        result = measure_student(teacher, predictor, proteins, share, curve)
        folder = run_folder(Path(o.output) / "distil" / f"{name}-r{result.rank}", run.id)
        files = {path.name: path.read_bytes() for path in source.glob(TRAINING)}
        figures = result.figures()
        place = save(predictor, folder / "predictor", metrics=figures, data={"run": run.id}, files=files)
        report = predictor_report(result)
        run.keep(o, report.save(folder / "predictor_report"), report.markdown())
        run.log_params({"rank": result.rank, "verdict": result.verdict})
        run.log_metrics(figures)
        if proteins.embeddings.sequences is not None and about.get("backbone"):
            example = [proteins.embeddings.sequences[row] for row in split.test[:2]]
            log_predictor(run, place, SERVED, example, figures)
        latest = link(Path(o.output) / "predictors" / name, place)
    report.show()
    log.info("Predictor: %s (make predict MODEL=%s FASTA=new.fasta).", place, latest)
    return place


def save_report(result: Result, options: object, stem: Path, picture: str, run: Run) -> None:
    """Write JSON, Markdown and picture, and keep all three with the run."""
    report = comparison_report(result)
    run.keep(options, report.save(stem, picture), report.markdown())
    log.info("Report: %s.md, and %s beside it", stem, picture)


def final_metrics(result: TeacherResult) -> dict[str, float]:
    """What MLflow shows of one distilled layer, on test rows; no prefix: charts of curves then come first."""
    ours = result.row(OURS)
    metrics = {name: estimate.value for name, estimate in ours.metrics.items()}
    metrics |= lost(metrics)
    metrics |= {f"svd_{name}": estimate.value for name, estimate in result.row("svd").metrics.items()}
    metrics |= {"predicted_r2": result.predicted_r2, "parameter_ratio": result.parameters["ratio"]}
    metrics["share_of_optimum"] = ours.share_of_optimum
    if (speed_up := result.speed_up()) is not None:
        metrics["speed_up"] = speed_up
    return metrics
