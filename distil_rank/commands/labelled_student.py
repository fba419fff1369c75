"""The student of a teacher from labels, as a predictor: distilled through its head, calibrated, confirmed, saved."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from distil_rank.commands.labelled_teacher import LabelledTeacher, load_labelled_teacher, outputs_of, predicted_by
from distil_rank.compression.saved import save
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.probes import decide
from distil_rank.evaluation.trust import STUDENT, PredictorResult, calibrate, measure_trust
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.lowrank.predictor import Predictor
from distil_rank.measure.statistics import estimate, mean, resample_counts
from distil_rank.options.training import DataOptions, DistilOptions, StudentOptions
from distil_rank.report.tables import predictor_report
from distil_rank.report.writer import link, run_folder
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import RunLogger, log_predictor
from distil_rank.training.head import agreement, smallest_student, spread

log = logging.getLogger(__name__)

TEACHER = "teacher"
SHARE = 0.999  # of the predictions, by default
TRAINING = "training.fasta"  # in the folder of a predictor: what new proteins are compared with
SERVED = """from mlflow.models import set_model

from distil_rank.commands.predict import predict_sequences
from distil_rank.tracking.training import ServedPredictor

set_model(ServedPredictor(predict_sequences))
"""  # MLflow runs this file to load the model: nothing is pickled


def distil_predictor(o: DistilOptions) -> Path:
    """Distil a teacher from labels at the lowest rank that retains its predictions; returns the predictor's folder."""
    if o.data != DataOptions() or o.distil != StudentOptions() or o.head or o.ckpt_path:
        raise InputError(
            f"Expected --rank, --trainer and --seeds alone for {o.teacher.kind}, which knows its data and head, but "
            "got options of --data, --distil, --head or --ckpt_path; leave them out."
        )
    teacher = load_labelled_teacher(o.teacher.kind)
    fixed = o.rank if isinstance(o.rank, int) else None
    share = o.rank if isinstance(o.rank, float) else SHARE
    task, target, data = teacher.task, teacher.task.proteins.target, teacher.task.unlabelled
    if fixed is not None and fixed > min(teacher.layer.weight.shape):
        raise InputError(f"Expected --rank up to {min(teacher.layer.weight.shape)}, the layer's own, but got {fixed}.")
    about = task.proteins.embeddings.provenance
    params: dict[str, Any] = {
        "teacher": teacher.name,
        "backbone": about.get("backbone", "unknown"),
        "task": target.kind,
    }
    params |= {"rank_requested": o.rank or SHARE, "source": task.settings["source"]}
    tags = {**lineage({**about, "digest": task.data.digest}), "teacher_run": teacher.run_id}
    with start_run("distil", f"{teacher.name} predictor", params=params, tags=tags) as run:
        student, curve = smallest_student(
            teacher.layer, teacher.head, target.kind, data, fixed, share, o.trainer, o.seeds[0], RunLogger(run)
        )
        predictor = assemble(teacher, student)
        result = measure_predictor(teacher, predictor, share)
        result.curve.extend(asdict(point) for point in curve)
        folder = run_folder(Path(o.output) / "distil" / f"{teacher.name}-r{student.rank}", run.id)
        report = predictor_report(result)
        metrics: dict[str, Any] = {"evaluation": asdict(result.evaluation), "trust": asdict(result.trust)}
        metrics |= {"retained": asdict(result.retained), "probability_error": result.probability_error}
        proteins = task.proteins.embeddings
        files: dict[str, bytes] = {}
        if proteins.sequences is not None:
            known = task.data.split_rows.train.tolist()
            records = [f">{proteins.ids[row]}\n{proteins.sequences[row]}\n" for row in known]
            files[TRAINING] = "".join(records).encode()
        place = save(
            predictor, folder / "predictor", metrics=metrics, data={**predictor.provenance, "run": run.id}, files=files
        )
        for file in report.save(folder / "predictor_report"):
            run.log_artifact(file)
        run.log_params({"rank": student.rank, "verdict": result.verdict})
        run.log_metrics(result.figures())
        run.log_text(yaml.safe_dump(asdict(o)), "config.yaml")
        run.note(report.markdown())
        example = [] if proteins.sequences is None else [proteins.sequences[row] for row in task.test[:2]]
        if example and about.get("backbone"):
            log_predictor(run, place, SERVED, example, metrics=result.figures())
        latest = link(Path(o.output) / "predictors" / teacher.name, place)
    report.show()
    log.info("Predictor: %s (make predict MODEL=%s FASTA=new.fasta).", place, latest)
    return place


def assemble(teacher: LabelledTeacher, student: LowRankLinear) -> Predictor:
    """A student with the teacher's head, calibrated on the validation proteins."""
    task, target = teacher.task, teacher.task.proteins.target
    predictor = Predictor(student, target.kind, target.classes, teacher.activation)
    if teacher.activation is not None:
        predictor.head[1].load_state_dict(teacher.head[1].state_dict())
    predictor.mean, predictor.spread = task.data.moments.mean.float(), spread(task.data)
    facts = dict(task.proteins.embeddings.provenance)
    keys = ("backbone", "weights_sha256", "layer", "pooling", "precision", "long", "max_length", "source", "fallback")
    predictor.provenance = {key: facts[key] for key in keys if isinstance(facts.get(key), str | int)}
    predictor.provenance |= {"labels": task.proteins.labels, "groups": task.proteins.groups.description}
    rows = task.data.split_rows.val
    calibrate(predictor.eval(), task.data.rows("val"), task.y[rows], task.proteins.groups.number[rows])
    return predictor


def measure_predictor(teacher: LabelledTeacher, predictor: Predictor, share: float = SHARE) -> PredictorResult:
    """Scores, predictions retained and calibration on the test groups, which nothing was fitted or chosen on."""
    task, target = teacher.task, teacher.task.proteins.target
    kind, groups, x = target.kind, task.proteins.groups, task.data.rows("test")
    theirs = outputs_of((teacher.layer, teacher.head), x)
    with torch.no_grad():
        ours = predictor(x) * predictor.temperature
    number = np.unique(groups.number[task.test], return_inverse=True)[1]
    same = mean(agreement(kind, ours, theirs).numpy(), number)
    error = None
    if kind != "regression":
        t = predictor.temperature
        error = float((predictor.probabilities(ours / t) - predictor.probabilities(theirs / t)).abs().mean())
    rows = [predicted_by(TEACHER, theirs, kind, "reference"), predicted_by(STUDENT, ours, kind, "student")]
    evaluation = evaluate(target, groups, rows, task.proteins.labels, task.proteins.notes)
    layer = teacher.layer
    rank, shape = int(predictor.layer.rank), (layer.in_features, layer.out_features)  # type: ignore[arg-type]
    trust = measure_trust(predictor, x, target.subset(task.test), number)
    y, predicted = task.y[task.test], decide(kind, ours.double().numpy())
    confusion = np.zeros((len(target.classes),) * 2, dtype=int)
    if kind == "classification":
        np.add.at(confusion, (y, predicted), 1)
    return PredictorResult(
        teacher=teacher.name,
        kind=kind,
        classes=target.classes,
        rank=rank,
        parameters=(parameter_count(*shape), parameter_count(*shape, rank)),
        share=share,
        retained=estimate(same, resample_counts(len(same.sums))),
        probability_error=error,
        evaluation=evaluation,
        trust=trust,
        confusion=confusion.tolist(),
        values=[y.tolist(), predicted.tolist()] if kind == "regression" else [],
        curve=[],
    )
