"""Sequences to vectors, or to codes, as an MLflow run."""

from dataclasses import asdict
from pathlib import Path

from distil_rank.codes.store import load_encoder, own_encoder, write_encoder
from distil_rank.embedding import run as embedding
from distil_rank.embedding.extraction import default_store
from distil_rank.embedding.run import EmbedSummary
from distil_rank.embedding.store import CODES
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.options.embed import EmbedOptions
from distil_rank.report.writer import show_facts
from distil_rank.tracking.run import process_rank, start_run


def embed(options: EmbedOptions) -> EmbedSummary:
    """Embeds proteins as an MLflow run; the store's provenance names the run, so that later runs can refer to it.

    With `code`, backbone, layer and pooling are those that the encoder is for, and it goes into the store.

    Raises:
        InputError: see `distil_rank.embedding.run.embed`; or the encoder is for another layer or pooling.
    """
    settings = {**asdict(options), "store": options.store or default_store(options.fasta)}
    encoder = None
    folder = settings.pop("code")
    if folder is not None:
        encoder = own_encoder(folder) or load_encoder(folder)
        about = encoder.provenance
        for key, default in (("layer", None), ("pooling", "mean")):
            if settings[key] not in (default, about.get(key), str(about.get(key))):
                raise InputError(
                    f"Expected {key} {about.get(key)}, which the encoder {folder} is for, but got {settings[key]}; "
                    f"leave --{key} out."
                )
            settings[key] = default if about.get(key) is None else about[key]
        if options.backbone == "auto" and about.get("backbone"):
            settings["backbone"] = about["backbone"]
        StoreWriter(settings["store"], CODES).check_folder()  # before the encoder goes there
        write_encoder(encoder, settings["store"])

    name = f"{settings['backbone']} {settings['pooling']} {Path(options.fasta).name}"
    requested = {f"{key}_requested" if key in ("backbone", "precision") else key: settings[key] for key in settings}
    params = requested | {"encoder": None if encoder is None else encoder.digest}
    with start_run("embed", name, params=params, tags={}) as run:
        summary = embedding.embed(**settings, encoder=encoder, run=run.id)
        facts = asdict(summary)
        counts = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        run.log_metrics({**counts, "residues_per_second": summary.residues_per_second})
        run.log_params({key: facts[key] for key in ("backbone", "precision")})
        run.set_tags({key: facts[key] for key in ("digest", "cleaning", "backbone", "fallback") if facts[key]})
        run.note("\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if process_rank() == 0:
        show_facts("Embeddings", facts)
    return summary
