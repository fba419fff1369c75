"""Several distillations as children of one run: the three teachers of the original, or (`sweep`) several ranks."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from distil_rank.commands.distil import distil_teacher, final_metrics, save_report
from distil_rank.commands.train_teacher import check_rank_fits, open_data
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.results import OURS, Result
from distil_rank.options.training import BenchmarkOptions, DistilOptions, SweepOptions
from distil_rank.report import pictures
from distil_rank.report.tables import comparison_report
from distil_rank.report.writer import publish, run_folder
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage

log = logging.getLogger(__name__)


def benchmark(options: BenchmarkOptions) -> Result:
    """The three teachers of the original, one table."""
    o = options
    children = [
        DistilOptions(o.data, replace(o.teacher, kind=kind), o.trainer, o.output, o.distil, o.rank, o.seeds)
        for kind in ("random", "denoising", "spectral")
    ]
    return distil_several("benchmark", o, children, open_data(o.data))


def distil_several(
    name: str, options: BenchmarkOptions | SweepOptions, children: Sequence[DistilOptions], data: EmbeddingDataModule
) -> Result:
    """Distil `children` on the same data, which are set up already, as children of one run, with one report.

    The name is that of the command: `benchmark` or `sweep`.
    """
    started, output = time.perf_counter(), Path(options.output)
    for child in children:
        check_rank_fits(data, child.rank, child.teacher)
    about = data.description()
    teachers = " ".join(dict.fromkeys(child.teacher.kind for child in children))
    params = {"backbone": about.backbone, "teacher": teachers}
    title = f"{name} {about.dim}-d {Path(about.source).stem}"
    experiment = "sweep" if name == "sweep" else "distil"
    with start_run(experiment, title, params=params, tags=lineage(asdict(about))) as parent:
        results = []
        for number, child in enumerate(children, 1):
            log.info("%s: %d of %d", name, number, len(children))
            results += distil_teacher(data, child, parent).teachers
        result = Result(data=about, teachers=results, seconds=time.perf_counter() - started)
        best = max(results, key=lambda teacher: teacher.row(OURS).metrics["r2"].value)
        parent.log_params({"best": f"{best.teacher} r{best.rank}", "rank": best.rank})
        parent.log_metrics({"children": len(results), **final_metrics(best)})
        folder = run_folder(output / name, parent.id)
        stem = "distil_rank" if name == "benchmark" else f"distil_rank_{name}"
        save_report(result, options, folder / f"{stem}_summary", f"{stem}_final_report.png", parent)
        if name == "sweep":
            parent.log_artifact(pictures.sweep(result, folder / "distil_rank_sweep.png"))
            for one in results:
                ours = one.row(OURS).metrics
                curve = {f"rank/{key}": ours[key].value for key in ("r2", "knn_overlap")}
                parent.log_metrics(curve, one.rank)
        publish(folder, output)
    comparison_report(result).show()
    return result
