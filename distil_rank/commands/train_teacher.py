"""The dense layer to be distilled: generated, trained or read from a file, checked, saved and reused."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from distil_rank.compression.own_layer import load_linear
from distil_rank.compression.saved import save
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.files import LABELLED, find_source
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import Evaluation, evaluate
from distil_rank.evaluation.labelled import open_to_predict
from distil_rank.evaluation.probes import decide, fit_linear
from distil_rank.evaluation.representations import best_hit, nearest_neighbour, sequence_baselines
from distil_rank.evaluation.results import TeacherCheck
from distil_rank.evaluation.trust import calibrate, predictions
from distil_rank.lowrank.predictor import Predictor
from distil_rank.lowrank.solvers import choose_rank
from distil_rank.measure.statistics import clearly_better
from distil_rank.options.training import BUILT_IN, DataOptions, LabelledTeacherOptions, TeacherOptions
from distil_rank.origin import vector_origin
from distil_rank.report.tables import evaluation_report
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import RunLogger
from distil_rank.training.callbacks import Progress
from distil_rank.training.experiment import trainer_options
from distil_rank.training.head import train_head
from distil_rank.training.teacher import TeacherModule, check_teacher, random_teacher, spectral_teacher

log = logging.getLogger(__name__)

TRAINED, LINEAR = "trained head", "linear probe"
TRAINING = "training.fasta"  # in the folder of a predictor: what new proteins are compared with


@dataclass(frozen=True)
class Teacher:
    """A dense layer, its check, its file and the MLflow run that made it."""

    name: str
    layer: nn.Linear
    check: TeacherCheck
    path: Path
    run_id: str


def train_teacher(options: LabelledTeacherOptions) -> Teacher | Evaluation:
    """Make the dense layer that is to be distilled, from labels or without, check that it is worth it, and save it."""
    if options.labels.source is not None:
        return train_from_labels(options)
    teacher = make_teacher(open_data(options.data), options.teacher, options.trainer, options.output)
    print(f"Teacher: {teacher.path}")
    return teacher


def train_from_labels(o: LabelledTeacherOptions) -> Evaluation:
    """Train a head, keep it where it clearly beats the linear probe, and report both on untouched groups."""
    task: dict[str, Any] = {"source": find_source(o.data.source, LABELLED), "labels": asdict(o.labels)}
    task |= {"kind": o.task, "groups": o.groups, "seed": o.data.seed}
    proteins, split = open_to_predict(**task)
    target, vectors, notes, group = proteins.target, proteins.embeddings, list(proteins.notes), proteins.groups.number
    y, about, kind, sequences = target.y, vectors.provenance, target.kind, vectors.sequences
    assert y is not None
    data = EmbeddingDataModule.of(vectors, split, y)
    place = Path(o.output) / "teachers" / (o.head.name or Path(str(o.labels.source)).name.partition(".")[0])
    log.info("Teacher %s, %s of %d classes: %s", place.name, kind, len(target.classes), proteins.groups.description)
    params = {"teacher": place.name, "backbone": about.get("backbone", "unknown"), **task, "task": kind}
    tags = lineage({**about, "digest": data.digest})
    with start_run("teacher", f"{place.name} {kind}", params=params, tags=tags) as run:
        linear, words = fit_linear(target, vectors.x, y, split.train, [(split.train, split.val)])
        models, notes = {LINEAR: Predictor.linear(*linear, kind, target.classes)}, [*notes, f"Linear probe: {words}."]
        if o.head.keep != "linear":
            module, words = train_head(data, kind, max(len(target.classes), 1), o.head, o.data.seed, RunLogger(run))
            models[TRAINED] = module.predictor(target.classes)
            notes.append(words)
        for one, model in models.items():
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                raise InputError(f"Expected vectors that a {one} can be fitted to but its weights are NaN; scale them.")
        x, kept = data.rows("val"), list(models)[-1]
        if o.head.keep == "auto":
            decided = [decide(kind, model(x).double().numpy()) - y[split.val] for model in models.values()]
            off = [(one**2 if kind == "regression" else one != 0).reshape(len(x), -1).mean(1) for one in decided]
            gain = clearly_better(off[0], off[1], group[split.val])
            kept = TRAINED if gain.low > 0 else LINEAR
            words = (
                "clearly fewer: it is the teacher" if gain.low > 0 else "not clearly fewer: THE PROBE IS THE TEACHER"
            )
            shares = [f"{one.mean():.3f}" for one in off]
            notes.append(
                f"Errors on the validation groups: linear probe {shares[0]}, trained head {shares[1]}, {words}."
            )
        rows = [
            predictions(one, model, data.rows("test"), "matrix" if one == TRAINED else "reference")
            for one, model in models.items()
        ]
        baselines, missing = sequence_baselines(sequences, partial(best_hit, y=y) if o.head.alignment else None)
        rows += [nearest_neighbour(vectors.x, y), *baselines]
        evaluation = evaluate(target, proteins.groups, rows, proteins.labels, [*notes, *missing])

        teacher = models[kept]
        teacher.mean, teacher.spread = data.moments.mean.float(), data.moments.std.float()
        teacher.provenance = {**vector_origin(about), "source": about.get("source")}
        calibrate(teacher, x, y[split.val], group[split.val])
        fasta = "".join(f">{vectors.ids[row]}\n{sequences[row]}\n" for row in split.train) if sequences else ""
        scores = {key.replace(" ", "_"): one.value for key, one in evaluation.entry(kept).scores.items()}
        facts = {"task": task, "digest": data.digest, "run": run.id, "kept": kept}
        save(teacher, place, metrics=scores, data=facts, files={TRAINING: fasta.encode()} if fasta else {})
        report = evaluation_report(evaluation, f"Next: make distil TEACHER={place}")
        report.save(place / "evaluation")
        run.log_params({"kept": kept, "metric": evaluation.headline})
        run.log_metrics(scores)
        run.keep(o, [place], report.markdown())
    report.show()
    return evaluation


def open_data(options: DataOptions) -> EmbeddingDataModule:
    """The data module of these options, ready to be read."""
    data = EmbeddingDataModule(**asdict(options))
    data.prepare_data()
    data.setup()
    return data


def make_teacher(
    data: EmbeddingDataModule, options: TeacherOptions, trainer: Mapping[str, Any], output: str, reuse: bool = False
) -> Teacher:
    """Train, generate or read the layer, as one MLflow run.

    Args:
        data: set up already.
        options: which layer.
        trainer: options of Lightning's Trainer.
        output: folder for results.
        reuse: take the one that an earlier command made with these very options on these very data, if it did.

    Raises:
        InputError: the layer's width is not the data's, or all of its weights are zero.
    """
    kind = options.kind
    name = kind if kind in BUILT_IN else _name_of(kind)
    settings: dict[str, Any] = {"teacher": kind, "data": data.digest, "seed": options.seed}
    if kind == "denoising":
        settings |= {key: getattr(options, key) for key in ("noise", "noise_scale", "lr", "steps")}
        settings |= {key: data.hparams[key] for key in ("batch_size", "replacement")}
    path = Path(output) / "teachers" / f"{name}.safetensors"
    if reuse and kind in BUILT_IN and (saved := _saved_teacher(path, settings)):
        return saved
    about = data.description()
    params = {**settings, "backbone": about.backbone, "source": about.source}
    title = f"{name} {about.dim}-d {Path(about.source).stem}"
    with start_run("teacher", title, params=params, tags=lineage(asdict(about))) as run:
        if kind == "denoising":
            module = TeacherModule(None, options.noise, options.noise_scale, options.lr)
            merged = trainer_options({**trainer, "max_steps": options.steps})
            progress = Progress("training the teacher")
            seed_everything(options.seed, verbose=False)
            fit = Trainer(**merged, logger=RunLogger(run), enable_checkpointing=False, callbacks=[progress])
            fit.fit(module, datamodule=data)
            layer = module.layer.cpu()
            if not layer.weight.isfinite().all():
                raise InputError(
                    f"Expected a teacher that can be trained on {data.source} but its weights became NaN or infinite; "
                    "give vectors of a smaller scale."
                )
            relative = options.noise_scale == "relative"
            check = check_teacher(layer, data.moments, data.rows("test"), options.noise, relative)
        else:
            layer = untrained_teacher(kind, data.dim, options.seed)
            check = check_teacher(layer, data.moments)
        figures = {key: value for key, value in asdict(check).items() if isinstance(value, float)}
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in layer.state_dict().items()}
        metadata = {"settings": json.dumps(settings), "run_id": run.id, "check": json.dumps(asdict(check))}
        save_file(tensors, path, metadata)
        run.log_metrics(figures)
        if check.warning:
            run.set_tags({"warning": check.warning})
        words = f"**{name}** teacher, {layer.out_features} × {layer.in_features}. Checked: `{figures}`"
        run.keep({"teacher": asdict(options), "data": dict(data.hparams)}, [path], words)
    log.info("Teacher %s: %s (effective rank %.0f).", name, path, check.effective_rank)
    return Teacher(name, layer, check, path, run.id)


def untrained_teacher(kind: str, dim: int, seed: int = 42) -> nn.Linear:
    """A layer that needs no training: random, of a given spectrum, or out of a file, for inputs of this width.

    Raises:
        InputError: a layer of another width, or without any weight.
    """
    if kind in BUILT_IN:
        return random_teacher(dim, seed=seed) if kind == "random" else spectral_teacher(dim, seed=seed)
    layer = load_linear(kind)
    if layer.in_features != dim:
        raise InputError(
            f"Expected a layer for the data's {dim} numbers but {kind} takes {layer.in_features}; embed with the model "
            "that the layer belongs to."
        )
    if not layer.weight.any():
        raise InputError(f"Expected a layer that computes something but the weights of {kind} are all zero.")
    return layer


def largest_rank(data: EmbeddingDataModule, teacher: TeacherOptions) -> int:
    """Of a student of the layer that these options make on these data."""
    return data.dim if teacher.kind in BUILT_IN else min(untrained_teacher(teacher.kind, data.dim).weight.shape)


def check_rank_fits(data: EmbeddingDataModule, rank: int | float | str | None, teacher: TeacherOptions) -> None:
    """Raise `InputError` for a rank that no teacher of these options has, before one is trained."""
    assert rank is not None  # a command's default is in its place by now
    choose_rank(torch.ones(largest_rank(data, teacher)), rank)


def _name_of(layer: str) -> str:
    """The name of a layer in a file: the file's name, and the layer's within it.

    >>> _name_of("models/head.safetensors:classifier.dense"), _name_of("head.pt")
    ('head-classifier.dense', 'head')
    """
    file, _, key = layer.rpartition(":")
    return f"{Path(file).stem}-{key}" if file else Path(layer).stem


def _saved_teacher(path: Path, settings: dict[str, Any]) -> Teacher | None:
    """The teacher in a file, if it was made with these very settings on these very data."""
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError), safe_open(path, "pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["settings"]) == settings:
            log.info("Using the teacher in %s.", path)
            check = TeacherCheck(**json.loads(metadata["check"]))
            return Teacher(settings["teacher"], load_linear(str(path)), check, path, metadata["run_id"])
    return None
