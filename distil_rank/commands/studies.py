"""Studies of several distillations as children of one run: three teachers, or several ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_rank.commands.distil import distil, final_metrics, save_report
from distil_rank.commands.lineage import lineage
from distil_rank.commands.train_teacher import check_rank_request, kind_of, largest_rank
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.results import OURS, Result, TeacherResult
from distil_rank.report import figures
from distil_rank.report.run_folder import publish, run_folder
from distil_rank.tracking.run import Run, points, start_run

log = logging.getLogger(__name__)

RANKS = (8, 16, 32, 64, 128)  # of a sweep


def benchmark(
    data: EmbeddingDataModule,
    teacher: dict[str, Any] | None = None,
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    rank: int | float | str = 64,
    seeds: Sequence[int] = (42, 43, 44, 45, 46),
    output: str = "results",
    config: str = "",
) -> Result:
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
    return _study(
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
    ranks: Sequence[int | float] | None = None,
    seeds: Sequence[int] = (42,),
    output: str = "results",
    config: str = "",
) -> Result:
    """One teacher at several ranks: a parent run with a child for each.

    Args:
        data: The embeddings.
        teacher: Options of `train_teacher`.
        distil: Options of `DistilModule`.
        trainer: Options of Lightning's Trainer.
        ranks: To try; 8, 16, 32, 64 and 128 by default, as far as the layer is wide enough.
        seeds: Of the trained rows.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
    """
    if ranks is not None and not len(ranks):
        raise InputError("Expected ranks to try but --ranks has none.")
    data.prepare_data()
    data.setup()
    if ranks is None:
        ranks = [rank for rank in RANKS if rank <= largest_rank(data, teacher)]
    return _study(
        "sweep",
        [{"teacher": teacher, "rank": rank} for rank in ranks],
        data,
        {"distil": distil, "trainer": trainer, "seeds": seeds, "output": output, "config": config},
    )


def log_best(parent: Run, teachers: Sequence[TeacherResult]) -> None:
    """Log the figures of the child with the highest held-out R², and how many children there are."""
    best = max(teachers, key=lambda teacher: teacher.row(OURS).metrics["r2"].value)
    parent.log_params({"best": f"{best.teacher} r{best.rank}", "rank": best.rank})
    parent.log_metrics({"children": len(teachers), **final_metrics(best)})


def _study(name: str, children: list[dict[str, Any]], data: EmbeddingDataModule, common: dict[str, Any]) -> Result:
    """Several distillations as children of one run, and one report over all of them."""
    data.prepare_data()
    data.setup()
    for child in children:
        check_rank_request(data, child["rank"], child["teacher"])
    about = data.description()
    experiment = "sweep" if name == "sweep" else "distil"
    output = Path(common["output"])
    started = time.perf_counter()
    with start_run(
        experiment,
        f"{name} {about.dim}-d {Path(about.source).stem}",
        params={
            "backbone": about.backbone,
            "teacher": " ".join(dict.fromkeys(kind_of(child["teacher"]) for child in children)),
        },
        tags=lineage(about),
    ) as parent:
        teachers = []
        for number, child in enumerate(children, 1):
            log.info("%s: %d of %d", name, number, len(children))
            teachers += distil(data, **child, **common, parent=parent, experiment=experiment).teachers
        result = Result(data=about, teachers=teachers, seconds=time.perf_counter() - started)
        folder = run_folder(output / name, parent.id)
        stem = "distil_rank" if name == "benchmark" else f"distil_rank_{name}"
        log_best(parent, teachers)
        save_report(result, folder / f"{stem}_summary.json", folder / f"{stem}_final_report.png", parent)
        if name == "sweep":
            parent.log_artifact(figures.sweep(result, folder / "distil_rank_sweep.png"))
            curves = []
            for teacher in teachers:
                ours = teacher.row(OURS).metrics
                curves += points({f"rank/{key}": ours[key].value for key in ("r2", "knn_overlap")}, teacher.rank)
            parent.log_points(curves)
        publish(folder, output)
    return result
