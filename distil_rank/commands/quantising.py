"""A backbone in int8, as an MLflow run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from distil_rank.embedding.quantise import QuantisedBackbone, quantise
from distil_rank.embedding.saved_int8 import MANIFEST
from distil_rank.runs.tracking import start_run


def quantise_backbone(options: dict[str, Any]) -> QuantisedBackbone:
    """Save a backbone in int8; the run keeps its manifest and how closely it follows fp32.

    Args:
        options: of `distil_rank.embedding.quantise.quantise`.
    """
    with start_run("quantise", f"{options['backbone']} int8", params=options, tags={}) as run:
        done = quantise(**options)
        figures = {key: value for key, value in asdict(done.gate).items() if value is not None}
        run.log_metrics({**figures, "gigabytes": done.gigabytes})
        run.set_tags({"calibration_sha256": done.calibration_sha256})
        run.log_artifact(Path(done.folder) / MANIFEST)
        run.note("\n".join(f"- {key}: {value}" for key, value in done.facts().items()))
    return done
