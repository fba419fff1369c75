"""The commands, end to end: data, teacher, students, evaluation, report, all in one MLflow run each."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer, seed_everything
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from distil_rank.compression.compress import Report
from distil_rank.compression.own_layer import load_linear, load_tail
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.deployment.artefact import load, read_manifest
from distil_rank.deployment.deploy import compress_file
from distil_rank.embedding.embed import EmbedSummary
from distil_rank.embedding.embed import embed as extract
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.lowrank.moments import Moments
from distil_rank.reporting import figures, report
from distil_rank.runs.registry import log_student, promote_champion
from distil_rank.runs.run_logger import RunLogger
from distil_rank.runs.tracking import Run, start_run
from distil_rank.training.callbacks import LogLosses, Progress
from distil_rank.training.experiment import QUIET, Experiment, WarmStart, run_experiment
from distil_rank.training.teacher import TeacherCheck, TeacherModule, check_teacher, random_teacher, spectral_teacher

log = logging.getLogger(__name__)

MADE_UP = ("denoising", "random", "spectral")
METHOD_NOTE = (
    "Intervals are 95 % percentile intervals of a paired bootstrap over held-out proteins (2000 resamples, the same "
    "for every method). R² and centred cosine are taken about the teacher's mean output on the training rows. kNN@10: "
    "share of the ten nearest neighbours (Euclidean) among the held-out rows that stay. 'optimum' is R² over the "
    "closed form's; ≈ marks a tie with it: the interval of the paired difference holds zero."
)


@dataclass(frozen=True)
class Teacher:
    """A dense layer and where it comes from."""

    name: str
    layer: nn.Linear
    check: TeacherCheck
    path: Path
    run_id: str


def embed(options: dict[str, Any]) -> EmbedSummary:
    """Extract embeddings as an MLflow run; the store remembers the run, so that later ones can name it.

    Args:
        options: of `distil_rank.embedding.embed.embed`.
    """
    name = f"{options['backbone']} {options['pooling']} {Path(options['fasta']).name}"
    asked = {f"{key}_requested" if key in ("backbone", "precision") else key: value for key, value in options.items()}
    with start_run("embed", name, params=asked, tags={}, system_metrics=True) as run:
        done = extract(**options)
        facts = asdict(done)
        counts = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        run.log_metrics({**counts, "residues_per_second": done.residues / done.seconds if done.seconds else 0.0})
        run.log_params({key: facts[key] for key in ("backbone", "precision")})
        tags = {key: facts[key] for key in ("digest", "cleaning", "backbone", "fallback") if facts[key]}
        run.set_tags(tags)
        run.note("\n".join(f"- {key}: {value}" for key, value in facts.items()))
        if done.computed:
            StoreWriter(done.store).update(embedding_run=run.id)
    return done


def train_teacher(
    data: EmbeddingDataModule,
    kind: str = "denoising",
    noise: float = 0.3,
    noise_scale: Literal["absolute", "relative"] = "absolute",
    lr: float = 1e-3,
    steps: int = 500,
    seed: int = 42,
    trainer: dict[str, Any] | None = None,
    output: str = "results",
    config: str = "",
) -> Teacher:
    """Make the dense layer that is to be distilled, and check that it is worth it.

    Args:
        data: The embeddings.
        kind: `denoising` trains a linear denoiser; `random` and `spectral` are made, not trained; anything else is a
            layer of your own, `<file>:<key>`.
        noise: Standard deviation of the denoiser's noise.
        noise_scale: Whether that is `absolute`, or `relative` to each dimension's standard deviation.
        lr: Learning rate of the denoiser.
        steps: Optimiser steps of the denoiser.
        seed: Of the initialisation and the noise.
        trainer: Options of Lightning's Trainer.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
    """
    data.prepare_data()
    data.setup()
    settings: dict[str, Any] = {"teacher": kind, "data": data.digest(), "seed": seed}
    if kind == "denoising":
        settings |= {"noise": noise, "noise_scale": noise_scale, "lr": lr, "steps": steps}
        settings |= {name: data.hparams[name] for name in ("batch_size", "replacement")}
    name = kind if kind in MADE_UP else Path(kind.rpartition(":")[0] or kind).stem
    about = data.description()
    with start_run(
        "teacher",
        f"{name} {about['dim']}-d {Path(about['source']).stem}",
        params={**settings, "backbone": about["backbone"], "source": about["source"]},
        tags=_lineage(about),
    ) as run:
        moments = Moments.of(data.stream("train"))
        if kind == "random":
            layer = random_teacher(data.dim, seed=seed)
        elif kind == "spectral":
            layer = spectral_teacher(data.dim, seed=seed)
        elif kind == "denoising":
            seed_everything(seed, verbose=False)
            std = moments.covariance.diagonal().clamp_min(0).sqrt()
            module = TeacherModule(data.dim, noise, noise_scale, lr, std)
            options = {**QUIET, **(trainer or {}), "max_steps": steps, "enable_checkpointing": False}
            Trainer(**options, logger=RunLogger(run), callbacks=[LogLosses(), Progress("training the teacher")]).fit(
                module, data
            )
            layer = module.layer.cpu()
        else:
            layer = load_linear(kind)
        held_out = data.rows("test") if kind == "denoising" else None
        check = check_teacher(layer, moments, held_out, noise, relative=noise_scale == "relative")
        figures_of = {key: value for key, value in check.as_dict().items() if isinstance(value, float)}
        run.log_metrics(figures_of)
        if check.warning:
            run.set_tags({"warning": check.warning})
        path = Path(output) / "teachers" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in layer.state_dict().items()}
        save_file(
            tensors, path, {"settings": json.dumps(settings), "run_id": run.id, "check": json.dumps(check.as_dict())}
        )
        run.log_artifact(path)
        run.log_text(config, "config.yaml")
        run.note(f"**{name}** teacher, {layer.out_features} × {layer.in_features}. Checked: `{figures_of}`")
    log.info("Teacher %s: %s (effective rank %.0f).", name, path, check.effective_rank)
    return Teacher(name, layer, check, path, run.id)


def find_teacher(data: EmbeddingDataModule, options: dict[str, Any], output: str) -> Teacher:
    """The teacher that an earlier `train-teacher` made with these very options on these very data, or a new one."""
    data.prepare_data()
    data.setup()
    kind = options.get("kind", "denoising")
    path = Path(output) / "teachers" / f"{kind}.safetensors"
    if kind in MADE_UP and path.exists():
        with suppress(SafetensorError, KeyError, json.JSONDecodeError), safe_open(path, "pt") as file:
            known = file.metadata()
            settings = json.loads(known["settings"])
            wanted = {**options, "teacher": kind, "data": data.digest()}
            if all(settings[key] == wanted.get(key, settings[key]) for key in settings):
                log.info("Using the teacher in %s.", path)
                return Teacher(
                    kind, load_linear(str(path)), TeacherCheck(**json.loads(known["check"])), path, known["run_id"]
                )
    return train_teacher(data, **options, output=output)


def distil(
    data: EmbeddingDataModule,
    teacher: dict[str, Any] | None = None,
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    rank: int | float | str = 64,
    warm_start: WarmStart = "closed_form",
    shrinkage: float | Literal["auto"] = 0.0,
    tail: str | None = None,
    seeds: Sequence[int] = (42,),
    ckpt_path: str | None = None,
    output: str = "results",
    config: str = "",
    parent: Run | None = None,
    experiment: str = "distil",
) -> dict[str, Any]:
    """Distil one teacher and report what survived.

    Args:
        data: The embeddings.
        teacher: Options of `train_teacher`; it is trained first unless that was done already.
        distil: Options of `DistilModule`.
        trainer: Options of Lightning's Trainer.
        rank: An integer, a share of the teacher's output variance to keep (0.95), or `auto`.
        warm_start: Where training begins: the exact optimum of the squared error, or the SVD of the weight.
        shrinkage: Of the input covariance, for fewer rows than dimensions: 0 to 1, or `auto`.
        tail: What stands behind the layer, to be matched at its end: steps like `tanh,head.safetensors:out_proj`.
        seeds: Of the trained students; the first one is kept.
        ckpt_path: Resume from this Lightning checkpoint.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
        parent: The run that this one is part of.
        experiment: MLflow experiment.
    """
    found = find_teacher(data, teacher or {}, output)
    about = data.description()
    title = f"{found.name} r{rank} {warm_start} {about['dim']}-d {Path(about['source']).stem}"
    asked = {
        "rank_requested": rank,
        "warm_start": warm_start,
        "shrinkage": shrinkage,
        "seeds": list(seeds),
        "tail": tail,
    }
    started = time.perf_counter()
    with start_run(
        experiment,
        title,
        params={
            "teacher": found.name,
            "backbone": about["backbone"],
            **asked,
            "data": data.hparams,
            "distil": distil or {},
        },
        tags={**_lineage(about), "teacher_run": found.run_id},
        parent=parent,
    ) as run:
        for part in ("train", "val", "test"):
            shape = (about["rows"][part], about["dim"])
            name = f"{Path(about['source']).stem} {part}"  # MLflow takes two of one name and digest for the same
            run.log_dataset(shape, name=name, digest=about["digest"], context=part, source=about["source"])
        outcome = run_experiment(
            found.name,
            found.layer,
            found.check,
            data,
            rank,
            warm_start,
            shrinkage,
            seeds,
            {**(distil or {}), **({} if tail is None else {"tail": load_tail(tail)})},
            trainer,
            checkpoints=Path(output) / "checkpoints" / f"{found.name}-r{rank}",
            ckpt_path=ckpt_path,
            logger=RunLogger(run),
        )
        outcome.result["run_id"] = run.id
        content = new_report(about, [outcome.result], {"seconds": time.perf_counter() - started})
        folder = Path(output) / "distil" / f"{found.name}-r{outcome.result['rank']}"
        save_report(content, folder / "summary.json", folder / "report.png", run)
        log_outcome(run, data, outcome, config)
    return content


def new_report(about: dict[str, Any], teachers: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that `report` and `figures` work from."""
    return {"data": about, "teachers": teachers, "method_note": METHOD_NOTE, **extra}


def save_report(content: dict[str, Any], json_path: Path, png_path: Path, run: Run) -> None:
    """Write JSON, Markdown and picture, and keep all three with the run."""
    report.save_json(content, json_path)
    text = report.markdown(content)
    markdown_path = json_path.with_suffix(".md")
    markdown_path.write_text(text)
    figures.final_report(content, png_path)
    for path in (json_path, markdown_path, png_path):
        run.log_artifact(path)
    run.note(text)
    log.info("Report: %s and %s", json_path, png_path)


def log_outcome(run: Run, data: EmbeddingDataModule, outcome: Experiment, config: str) -> None:
    """Final figures, configuration and the student itself."""
    result = outcome.result
    ours = report.rung(result, "Distil-Rank")
    metrics = {f"test/{name}": estimate["value"] for name, estimate in ours["metrics"].items()}
    metrics |= {
        f"test_svd/{name}": estimate["value"] for name, estimate in report.rung(result, "svd")["metrics"].items()
    }
    metrics |= {
        "predicted_r2": result["predicted_r2"],
        "parameter_ratio": result["parameters"]["ratio"],
        "speed_up": next(row["ratio"] for row in result["latency"] if row["batch"] == 32),
        "share_of_optimum": ours["share_of_optimum"],
    }
    run.log_params({"rank": result["rank"]})
    run.log_metrics(metrics)
    run.log_text(config, "config.yaml")
    uri = log_student(run, outcome.student, data.rows("test").numpy()[:4], metrics={"r2": metrics["test/r2"]})
    teacher, digest = result["teacher"], data.digest()
    promote_champion(run, uri, r2=metrics["test/r2"], rank=result["rank"], teacher=teacher, data=digest)


def benchmark(
    data: EmbeddingDataModule,
    teacher: dict[str, Any] | None = None,
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    rank: int | float | str = 64,
    seeds: Sequence[int] = (42, 43, 44, 45, 46),
    output: str = "results",
    config: str = "",
) -> dict[str, Any]:
    """The three teachers of the original, one table.

    Args:
        data: The embeddings.
        teacher: Options of `train_teacher`, for the denoiser.
        distil: Options of `DistilModule`.
        trainer: Options of Lightning's Trainer.
        rank: An integer, a share of the teacher's output variance to keep, or `auto`.
        seeds: Of the trained rows.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
    """
    return _together(
        "benchmark",
        [{"teacher": {**(teacher or {}), "kind": kind}, "rank": rank} for kind in ("random", "denoising", "spectral")],
        data,
        {"distil": distil, "trainer": trainer, "seeds": seeds, "output": output, "config": config},
    )


def sweep(
    data: EmbeddingDataModule,
    teacher: dict[str, Any] | None = None,
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    ranks: Sequence[int | float] = (8, 16, 32, 64, 128),
    seeds: Sequence[int] = (42,),
    output: str = "results",
    config: str = "",
) -> dict[str, Any]:
    """One teacher at several ranks: a parent run with a child for each.

    Args:
        data: The embeddings.
        teacher: Options of `train_teacher`.
        distil: Options of `DistilModule`.
        trainer: Options of Lightning's Trainer.
        ranks: To try.
        seeds: Of the trained rows.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
    """
    return _together(
        "sweep",
        [{"teacher": teacher, "rank": rank} for rank in ranks],
        data,
        {"distil": distil, "trainer": trainer, "seeds": seeds, "output": output, "config": config},
    )


def compress(data: EmbeddingDataModule, options: dict[str, Any], config: str = "") -> Report:
    """Compress one layer of a saved model as an MLflow run, which keeps the folder and the student.

    Args:
        data: The layer's inputs.
        options: Of `distil_rank.deployment.deploy.compress_file`.
        config: The resolved configuration, kept with the run.
    """
    data.prepare_data()
    data.setup()
    about = data.description()
    name = " ".join(filter(None, [Path(options["model"]).stem, options["layer"]]))
    asked = {"rank_requested": options["rank"], **{key: options[key] for key in ("tail", "tune", "int8")}}
    with start_run(
        "distil",
        f"{name} r{options['rank']} {Path(about['source']).stem}",
        params={"teacher": name, "backbone": about["backbone"], "source": about["source"], **asked},
        tags=_lineage(about),
    ) as run:
        done, folder = compress_file(data, **options)
        row = done.layers[0]
        student = load(folder)
        r2 = read_manifest(folder)["metrics"]["held_out_r2"]["value"]
        run.log_params({"rank": row.rank})
        run.log_metrics(
            {
                "test/r2": r2,
                "predicted_r2": row.predicted_r2 or 0.0,
                "parameter_ratio": row.dense_parameters / row.parameters,
                "speed_up": (row.dense_us or 0.0) / (row.student_us or 1.0),
            }
        )
        run.log_text(config, "config.yaml")
        run.note(str(done))
        for path in sorted(folder.iterdir()):
            run.log_artifact(path)
        log_student(run, student, data.rows("test").numpy()[:4], metrics={"r2": r2})
    log.info("Saved: %s (distil_rank.load reads it; `export` turns it into ONNX and others).", folder)
    return done


def _together(
    name: str, children: list[dict[str, Any]], data: EmbeddingDataModule, common: dict[str, Any]
) -> dict[str, Any]:
    """Several distillations as children of one run, and one report over all of them."""
    data.prepare_data()
    data.setup()
    about = data.description()
    experiment = "sweep" if name == "sweep" else "distil"
    output = Path(common["output"])
    started = time.perf_counter()
    with start_run(
        experiment,
        f"{name} {about['dim']}-d {Path(about['source']).stem}",
        params={"backbone": about["backbone"], "teacher": " ".join(dict.fromkeys(_kind(child) for child in children))},
        tags=_lineage(about),
    ) as parent:
        results = []
        for number, child in enumerate(children, 1):
            log.info("%s: %d of %d", name, number, len(children))
            results += distil(data, **child, **common, parent=parent, experiment=experiment)["teachers"]
        content = new_report(about, results, {"seconds": time.perf_counter() - started})
        stem = "distil_rank" if name == "benchmark" else f"distil_rank_{name}"
        save_report(content, output / f"{stem}_summary.json", output / f"{stem}_final_report.png", parent)
        if name == "sweep":
            parent.log_artifact(figures.sweep(content, output / "distil_rank_sweep.png"))
            for result in results:
                ours = report.rung(result, "Distil-Rank")["metrics"]
                parent.log_metrics(
                    {f"rank/{key}": ours[key]["value"] for key in ("r2", "knn_overlap")}, step=result["rank"]
                )
    return content


def _kind(child: dict[str, Any]) -> str:
    return str((child["teacher"] or {}).get("kind", "denoising"))


def _lineage(about: dict[str, Any]) -> dict[str, str]:
    """Tags that tell a run what it stands on."""
    tags = {"data_digest": about["digest"], "backbone": about["backbone"], "split": about["split"]}
    if about.get("embedding_run"):
        tags["embedding_run"] = about["embedding_run"]
    if about["fallback"]:
        tags["fallback"] = about["fallback"]
    return tags
