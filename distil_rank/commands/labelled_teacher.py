"""A teacher from labels: trained, beside a linear probe and what needs no training, as one MLflow run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from distil_rank.artefact import read_folder, write_folder
from distil_rank.compression.own_layer import linear_from_state, read_state_dict
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.files import LABELLED, find_source
from distil_rank.data.mmseqs import best_hits, mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import Evaluation, evaluate
from distil_rank.evaluation.labelled import LabelledData, open_to_predict
from distil_rank.evaluation.probes import CHOSEN_BY, decide, fit_linear, task_statistics
from distil_rank.evaluation.representations import NO_MMSEQS, Representation, Role, composition
from distil_rank.lowrank.low_rank import tensor_digest
from distil_rank.lowrank.predictor import ACTIVATIONS
from distil_rank.measure.calibration import fit_temperature
from distil_rank.measure.statistics import clearly_above, resample_counts
from distil_rank.options.evaluation import LabelOptions
from distil_rank.options.training import LabelledTeacherOptions
from distil_rank.report.tables import prediction_report
from distil_rank.report.writer import Report
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import RunLogger
from distil_rank.training.head import train_head

log = logging.getLogger(__name__)

TEACHER_FORMAT, WEIGHTS = "distil-rank teacher", "model.safetensors"
TRAINED, LINEAR, NEAREST, BEST_HIT = "trained head", "linear probe", "nearest neighbour", "MMseqs2 best hit"
Kept = Literal["trained", "linear"]


@dataclass(frozen=True)
class PredictionTask:
    """Proteins to learn from, in three splits; what can be opened again from its settings."""

    settings: Mapping[str, Any]
    proteins: LabelledData
    data: EmbeddingDataModule  # batches are pairs of vectors and labels
    y: np.ndarray

    @property
    def test(self) -> np.ndarray:
        """Rows that nothing is fitted or chosen on."""
        return self.data.split_rows.test

    @property
    def digest(self) -> str:
        """Of vectors, splits and labels."""
        return f"{self.data.digest}-{tensor_digest(self.data.labels)[:16]}"

    @property
    def unlabelled(self) -> EmbeddingDataModule:
        """The same vectors and splits, whose batches are vectors alone."""
        return EmbeddingDataModule.of(self.data.embeddings, self.data.split_rows)


def open_task(settings: Mapping[str, Any]) -> PredictionTask:
    """Read the vectors and labels of some settings, and split them."""
    s = settings
    fractions, labels = (s["val_fraction"], s["test_fraction"]), LabelOptions(**s["labels"])
    proteins, split = open_to_predict(s["source"], labels, s["task"], s["groups"], fractions, s["seed"])
    y = proteins.target.y
    assert y is not None
    values = torch.from_numpy(y.astype(np.float32) if proteins.target.kind == "regression" else y)
    return PredictionTask(s, proteins, EmbeddingDataModule.of(proteins.embeddings, split, values), y)


def train_labelled_teacher(o: LabelledTeacherOptions) -> Evaluation:
    """Train a head, keep it where it clearly beats the linear probe, and report both on untouched groups."""
    settings: dict[str, Any] = {
        "source": find_source(o.data.source, LABELLED),
        "labels": asdict(o.labels),
        "task": o.task,
    }
    settings |= {"groups": o.groups, "seed": o.data.seed}
    settings |= {"val_fraction": o.head.val_fraction, "test_fraction": o.head.test_fraction}
    task = open_task(settings)
    proteins, data, target = task.proteins, task.data, task.proteins.target
    name = o.head.name or Path(str(o.labels.source)).name.partition(".")[0]
    place = Path(o.output) / "teachers" / name
    about, kind = proteins.embeddings.provenance, target.kind
    log.info("Teacher %s, %s of %d classes: %s", name, kind, len(target.classes), proteins.groups.description)
    params: dict[str, Any] = {"teacher": name, "backbone": about.get("backbone", "unknown"), "task": kind, **settings}
    with start_run("teacher", f"{name} {kind}", params=params, tags=lineage({**about, "digest": data.digest})) as run:
        split, x = data.split_rows, np.asarray(proteins.embeddings.x)
        probe = fit_linear(target, x, split.train, [(split.train, split.val)])
        layer = nn.Linear(x.shape[1], len(probe.bias)).requires_grad_(False)
        layer.load_state_dict({"weight": torch.from_numpy(probe.weight), "bias": torch.from_numpy(probe.bias)})
        if kind != "regression":  # ridge's scores are no logits
            logits = torch.from_numpy(x[split.val] @ probe.weight.T + probe.bias)
            scale = fit_temperature(logits, torch.from_numpy(task.y[split.val]), kind)
            layer.load_state_dict({name: value / scale for name, value in layer.state_dict().items()})
        models: dict[str, tuple[nn.Linear, nn.Sequential]] = {LINEAR: (layer, nn.Sequential())}
        notes = [*proteins.notes, f"Linear probe: {probe.name}."]
        if o.head.keep != "linear":
            outputs = max(len(target.classes), 1)
            module, search = train_head(data, kind, outputs, o.head, o.data.seed, RunLogger(run))
            models[TRAINED] = module.folded()
            notes.append(f"Search for the head, limit {o.head.seconds:g} s: {search}.")
        for one, (layer, _) in models.items():
            if not layer.weight.isfinite().all():
                raise InputError(f"Expected vectors that a {one} can be fitted to but its weights are NaN; scale them.")
        chosen = list(models)[-1]
        if o.head.keep == "auto":
            chosen, words = _choose(models, task)
            notes.append(words)
        representations = [
            predicted_by(one, outputs_of(model, data.rows("test")), kind, "reference" if one == LINEAR else "matrix")
            for one, model in models.items()
        ]
        representations += _baselines(task, o.head.alignment, notes)
        evaluation = evaluate(target, proteins.groups, representations, proteins.labels, notes)
        scores = {entry.name: asdict(entry.scores[evaluation.headline]) for entry in evaluation.entries}
        kept: Kept = "trained" if chosen == TRAINED else "linear"
        facts = {"kept": kept, "run_id": run.id, "metrics": {evaluation.headline: scores}}
        _save(place, models[chosen], o.head.activation, task, facts)
        report: Report = prediction_report(evaluation, f"Next: make distil TEACHER={place}")
        for file in report.save(place / "evaluation"):
            run.log_artifact(file)
        run.log_params({"kept": kept, "metric": evaluation.headline})
        own = evaluation.entry(chosen).scores
        run.log_metrics({key.replace(" ", "_"): value.value for key, value in own.items()})
        run.log_artifact(place / WEIGHTS)
        run.log_text(yaml.safe_dump(asdict(o)), "config.yaml")
        run.note(report.markdown())
    report.show()
    return evaluation


def _save(
    place: Path,
    model: tuple[nn.Linear, nn.Sequential],
    activation: str,
    task: PredictionTask,
    facts: Mapping[str, Any],
) -> None:
    """Write a teacher, with the settings that open its task again."""
    layer, head = model
    tensors = {f"layer.{key}": value.contiguous() for key, value in layer.state_dict().items()}
    if len(head):
        tensors |= {f"out.{key}": value.contiguous() for key, value in head[1].state_dict().items()}
    manifest = {"format": TEACHER_FORMAT, **facts, "settings": task.settings, "digest": task.digest}
    manifest |= {"activation": activation if len(head) else None}
    write_folder(place, manifest, {WEIGHTS: safetensors.torch.save(tensors)})


def _choose(models: Mapping[str, tuple[nn.Linear, nn.Sequential]], task: PredictionTask) -> tuple[str, str]:
    """The trained head only where it is clearly better on the validation groups; and the words for it."""
    rows, target = task.data.split_rows.val, task.proteins.target
    group = np.unique(task.proteins.groups.number[rows], return_inverse=True)[1]
    metric, statistics = CHOSEN_BY[target.kind], []
    for model in models.values():
        predicted = decide(target.kind, outputs_of(model, task.data.rows("val")).numpy())
        statistics.append(task_statistics(target, predicted, task.y[rows], group)[metric])
    linear, trained = statistics
    better = clearly_above(trained, linear, resample_counts(int(group.max()) + 1))
    verdict = "clearly better: it is the teacher" if better else "not clearly better: THE PROBE IS THE TEACHER"
    words = f"On the validation groups the trained head has {trained.value:.3f} {metric}"
    return list(models)[int(better)], f"{words}, the linear probe {linear.value:.3f}: training is {verdict}."


@torch.no_grad()
def outputs_of(model: tuple[nn.Module, nn.Module], x: Tensor) -> Tensor:
    """Logits or values of a layer and what stands behind it, `(N, K)`."""
    layer, head = model
    return head(layer(x))


def predicted_by(name: str, outputs: Tensor, kind: Any, role: Role) -> Representation:
    """A row of the table: the predictions of one model for the test rows."""
    return Representation(name, role, None, lambda fit: decide(kind, outputs.double().numpy()))


def _baselines(task: PredictionTask, aligned: bool, notes: list[str]) -> list[Representation]:
    """What needs no training: the nearest protein by vector or alignment; and composition."""
    fit = task.proteins.groups.fit
    x, y, sequences = (
        torch.from_numpy(np.array(task.proteins.embeddings.x)),
        task.y,
        task.proteins.embeddings.sequences,
    )
    mean = x[torch.from_numpy(fit)].mean(0)
    unit = F.normalize(x - mean)
    nearest = (unit[torch.from_numpy(~fit)] @ unit[torch.from_numpy(fit)].T).argmax(1).numpy()
    rows = [Representation(NEAREST, "baseline", None, lambda _: y[fit][nearest])]
    if sequences is None:
        notes.append("No sequences in the data: not compared with composition and MMseqs2.")
        return rows
    rows.append(composition(sequences))
    if aligned and mmseqs_binary() is None:
        notes.append(NO_MMSEQS)
    elif aligned:
        queries, targets = ([sequences[row] for row in np.flatnonzero(side)] for side in (~fit, fit))
        hit, _ = best_hits(queries, targets)
        if task.proteins.target.kind == "regression":
            default: Any = y[fit].mean()
        else:
            default = np.zeros_like(y[0]) if y.ndim == 2 else np.bincount(y[fit]).argmax()
        if missing := int((hit < 0).sum()):
            notes.append(
                f"MMseqs2 finds no training protein for {missing:,} of {len(hit):,}: the usual answer for them"
            )
        answers = y[fit][hit]
        answers[hit < 0] = default
        rows.append(Representation(BEST_HIT, "baseline", None, lambda _: answers))
    return rows


@dataclass(frozen=True)
class LabelledTeacher:
    """A saved teacher, with the task that it was trained for."""

    name: str
    layer: nn.Linear
    head: nn.Sequential
    activation: str | None
    task: PredictionTask
    run_id: str
    metrics: Mapping[str, Any]


def is_labelled_teacher(path: str) -> bool:
    """Whether this is the folder of a teacher from labels, as far as its manifest says."""
    try:
        return json.loads((Path(path) / "manifest.json").read_text()).get("format") == TEACHER_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def load_labelled_teacher(path: str) -> LabelledTeacher:
    """Read a teacher and its data again.

    Raises:
        InputError: the folder was changed, or the data are no longer those that it was trained on.
    """
    manifest, files = read_folder(path, TEACHER_FORMAT)
    try:
        state, activation = read_state_dict(files[WEIGHTS]), manifest["activation"]
        layer, head = linear_from_state(state, "layer", path), nn.Sequential()
        if activation is not None:
            head = nn.Sequential(ACTIVATIONS[activation](), linear_from_state(state, "out", path))
        settings, digest = manifest["settings"], manifest["digest"]
        run_id, metrics = str(manifest["run_id"]), dict(manifest["metrics"])
        task = open_task(settings)
    except (LookupError, TypeError) as error:
        raise InputError(f"Expected a teacher in {path} but its manifest lacks {error}; train it again.") from error
    if task.digest != digest:
        raise InputError(
            f"Expected vectors, labels and groups as {path} was trained on but {settings['source']} has others now; "
            "train it again."
        )
    return LabelledTeacher(
        Path(path).name, layer.requires_grad_(False), head.requires_grad_(False), activation, task, run_id, metrics
    )
