"""Sequences to vectors, as an MLflow run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distil_rank.embedding.embed import EmbedSummary, default_store, embed
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.runs.tracking import process_rank, start_run


def extract(options: dict[str, Any]) -> EmbedSummary:
    """Extract embeddings as an MLflow run; the store's provenance names the run, so that later runs can refer to it.

    Args:
        options: of `distil_rank.embedding.embed.embed`.
    """
    options = {**options, "store": options.get("store") or default_store(options["fasta"])}
    name = f"{options['backbone']} {options['pooling']} {Path(options['fasta']).name}"
    params = {f"{key}_requested" if key in ("backbone", "precision") else key: value for key, value in options.items()}
    with start_run("embed", name, params=params, tags={}, system_metrics=True) as run:
        done = embed(**options)
        summary = asdict(done)
        counts = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        run.log_metrics({**counts, "residues_per_second": done.residues / done.seconds if done.seconds else 0.0})
        run.log_params({key: summary[key] for key in ("backbone", "precision")})
        tags = {key: summary[key] for key in ("digest", "cleaning", "backbone", "fallback") if summary[key]}
        run.set_tags(tags)
        run.note("\n".join(f"- {key}: {value}" for key, value in summary.items()))
        if done.computed and process_rank() == 0:  # only rank 0's run is kept
            writer = StoreWriter(done.store)
            with suppress(InputError), writer.lock():  # locked: another process is already extending the store
                writer.record_run(run.id)
    return done
