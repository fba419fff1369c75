"""Sequences to vectors, as an MLflow run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distil_rank.codes.store import load_encoder, own_encoder, write_encoder
from distil_rank.embedding.run import EmbedSummary, default_store, embed
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import CODES, EMBEDDINGS
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.tracking.run import process_rank, start_run


def extract(options: dict[str, Any]) -> EmbedSummary:
    """Extract embeddings as an MLflow run; the store's provenance names the run, so that later runs can refer to it.

    Args:
        options: of `distil_rank.embedding.embed.embed`, and `code`, the folder of a code map or of a store of codes,
            for codes in place of vectors.
    """
    options = {**options, "store": options.get("store") or default_store(options["fasta"])}
    folder = options.pop("code", None)
    if folder is not None:
        options = _for_codes(options, folder)
    name = f"{options['backbone']} {options['pooling']} {Path(options['fasta']).name}"
    params = {f"{key}_requested" if key in ("backbone", "precision") else key: value for key, value in options.items()}
    params |= {"encoder": None if options.get("encoder") is None else options["encoder"].digest}
    with start_run("embed", name, params=params, tags={}, system_metrics=True) as run:
        done = embed(**options)
        summary = asdict(done)
        counts = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        run.log_metrics({**counts, "residues_per_second": done.residues_per_second})
        run.log_params({key: summary[key] for key in ("backbone", "precision")})
        tags = {key: summary[key] for key in ("digest", "cleaning", "backbone", "fallback") if summary[key]}
        run.set_tags(tags)
        run.note("\n".join(f"- {key}: {value}" for key, value in summary.items()))
        if done.computed and process_rank() == 0:  # only rank 0's run is kept
            writer = StoreWriter(done.store, EMBEDDINGS if folder is None else CODES)
            with suppress(InputError), writer.lock():  # locked: another process is already extending the store
                writer.record_run(run.id)
    return done


def _for_codes(options: dict[str, Any], folder: Location) -> dict[str, Any]:
    """The options for codes: backbone, layer and pooling are those of the code map, which goes into the store.

    Raises:
        InputError: there is no code map, or it is for another layer or pooling than asked for.
    """
    encoder = own_encoder(folder) or load_encoder(folder)
    about = encoder.provenance
    for key, default in (("layer", None), ("pooling", "mean")):
        if options[key] not in (default, about.get(key), str(about.get(key))):
            raise InputError(
                f"Expected {key} {about.get(key)}, which the code map {folder} is for, but got {options[key]}; leave "
                f"--{key} out."
            )
    fixed = {key: about[key] for key in ("layer", "pooling") if about.get(key) is not None}
    if options["backbone"] == "auto" and about.get("backbone"):
        fixed["backbone"] = about["backbone"]
    StoreWriter(options["store"], CODES).check_folder()  # before the map goes there
    there = own_encoder(options["store"])
    if there is None:
        write_encoder(encoder, options["store"], data=about)
    elif there.digest != encoder.digest:
        raise InputError(f"Expected another store than {options['store']}, whose codes are of another map.")
    return {**options, **fixed, "encoder": encoder}
