"""A layer of a saved model compressed, as an MLflow run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from distil_rank.commands.lineage import lineage
from distil_rank.compression.artefact import load, read_manifest
from distil_rank.compression.deploy import compress_file
from distil_rank.compression.report import Report
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.tracking.registry import log_student
from distil_rank.tracking.run import start_run

log = logging.getLogger(__name__)


def compress(data: EmbeddingDataModule, options: dict[str, Any], config: str = "") -> Report:
    """Compress one layer of a saved model as an MLflow run, which keeps the folder and the student.

    Args:
        data: The layer's inputs.
        options: Of `distil_rank.compression.deploy.compress_file`.
        config: The resolved configuration, kept with the run.
    """
    data.prepare_data()
    data.setup()
    about = data.description()
    name = " ".join(filter(None, [Path(options["model"]).stem, options["layer"]]))
    requested = {
        "rank_requested": options["rank"],
        **{key: options[key] for key in ("head", "tune", "outputs", "int8")},
    }
    with start_run(
        "distil",
        f"{name} r{options['rank']} {Path(about.source).stem}",
        params={"teacher": name, "backbone": about.backbone, "source": about.source, **requested},
        tags=lineage(about),
    ) as run:
        compressed, folder = compress_file(data, **options)
        row = compressed.layers[0]
        student = load(folder)
        r2 = read_manifest(folder)["metrics"]["held_out_r2"]["value"]
        run.log_params({"rank": row.rank})
        assert row.predicted_r2 and row.dense_us and row.student_us, "`compress_file` refuses a layer that stays dense"
        figures = {"predicted_r2": row.predicted_r2, "speed_up": row.dense_us / row.student_us}
        run.log_metrics({"test/r2": r2, "parameter_ratio": row.dense_parameters / row.parameters, **figures})
        run.log_text(config, "config.yaml")
        run.note(str(compressed))
        for path in sorted(folder.iterdir()):
            run.log_artifact(path)
        log_student(run, student, data.rows("test").numpy()[:4], metrics={"r2": r2})
    log.info("Saved: %s (distil_rank.load reads it; `export` turns it into ONNX and others).", folder)
    return compressed
