"""Encoders: fitted, evaluated, saved and put to work on a store, as one MLflow run."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distil_rank.codes.fit import copies_of, copy_task, fit_metric, noise_of, open_proteins, origin_of
from distil_rank.codes.store import ENCODER, load_encoder, manifest_of, own_encoder, write_codes, write_encoder
from distil_rank.codes.train import train_encoder
from distil_rank.compression.saved import save
from distil_rank.data.files import LABELLED, find_source
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import CODES, Store
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.labelled import UNLABELLED, LabelledData
from distil_rank.evaluation.representations import full_vector, module_output, principal_components
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.codes import CodeOptions
from distil_rank.report.tables import evaluation_report
from distil_rank.report.writer import publish, run_folder, show_facts
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import RunLogger

log = logging.getLogger(__name__)

# what an encoder's numbers depend on
DECIDING = ("metric", "rank", "dtype", "train", "seed", "regularisation", "fit_fraction", "groups")


def code(options: CodeOptions) -> None:
    """Fit an encoder, evaluate it, and encode a store of embeddings with it.

    An encoder that `--encoder` names, or that an interrupted run left in the store of codes, is not fitted again.
    """
    StoreWriter(options.codes, CODES).check_folder()  # before anything is embedded or written
    deciding = {name: getattr(options, name) for name in DECIDING}
    deciding |= {f"labels_{name}": value for name, value in asdict(options.labels).items()}
    deciding |= {"noise": options.noise, **asdict(options.augmentation)} if options.metric == "invariant" else {}

    place: Location = f"{options.codes}/{ENCODER}"
    source = find_source(options.data, LABELLED)
    encoder = own_encoder(options.codes)
    if options.encoder is not None:
        encoder = load_encoder(options.encoder)
        encoder.check_origin(manifest_of(Store.open(source)), source)
        write_encoder(encoder, options.codes, data=encoder.provenance)
    elif encoder is not None:
        before = encoder.provenance.get("asked", {})
        for name, value in deciding.items():
            if before.get(name) != value:
                raise InputError(
                    f"Expected {name} {before.get(name)!r}, which the codes in {options.codes} were made with, but got "
                    f"{value!r}; name another folder with --codes."
                )
        log.info("Going on with the encoder in %s, which was fitted with the same options.", options.codes)
    else:
        proteins = open_proteins(replace(options, data=source))
        encoder, place, metrics = _fitted(options, deciding, proteins)
        if proteins.embeddings.provenance.get("format") != "store":
            log.warning("No codes were written: %s is no store of embeddings (make one with embed).", source)
            return
        write_encoder(encoder, options.codes, metrics=metrics, data=encoder.provenance)

    store = write_codes(Store.open(source), options.codes, encoder)
    log.info("Codes: %s, %s proteins of %s bytes", store.path, f"{len(store):,}", encoder.bytes_per_protein)
    show_facts("Codes", {"encoder": place, "store": store.path})


def _fitted(
    options: CodeOptions, deciding: dict[str, Any], proteins: LabelledData
) -> tuple[CodeEncoder, Path, dict[str, Any]]:
    """A new encoder, where it is saved, and what is saved beside it of how well it does, as one MLflow run."""
    name = f"{Path(proteins.source).stem}-{options.metric}-r{options.rank}-{options.dtype}"
    place, copies = Path(options.output) / "code" / name, Path(options.output) / "copies"
    x, groups, about = proteins.embeddings.x, proteins.groups, proteins.embeddings.provenance
    params = {**deciding, "source": proteins.source, "groups": groups.description}
    with start_run("code", name, params=params, tags=lineage(about)) as run:
        noise, words = None, None
        if options.metric == "invariant":
            noise, words = noise_of(proteins, options.noise, options.augmentation, copies)
            log.info("Noise: %s", words)
        origin = {**origin_of(about), "noise": words}
        fit = fit_metric(x, groups.fit, options.metric, noise, options.regularisation, options.seed, origin)
        encoder = fit.encoder(options.rank, options.dtype)
        if options.train and options.metric != "variance":
            rows, numbers, teacher = x[groups.fit], groups.number[groups.fit], fit.encoder(x.shape[1])
            encoder = train_encoder(encoder, teacher, rows, numbers, options.train, options.seed, RunLogger(run))
            if training := encoder.provenance.get("training"):
                figures = {"neighbours_start": training["start"], "neighbours_trained": training["trained"]}
                run.log_metrics({**figures, "training_retained": training["retained"]})
        encoder.provenance["asked"] = deciding

        target, notes = proteins.target, list(proteins.notes)
        if proteins.labels == UNLABELLED:
            x, target, groups = copy_task(x, groups, copies_of(proteins, False, options.augmentation, copies))
            notes.append(
                "No labels: a protein and its augmented copy are to find each other among the evaluated proteins."
            )
        title = f"codes, {options.metric}, rank {options.rank}, {options.dtype}"
        codes = module_output(title, encoder.eval(), x)
        representations = [full_vector(x), principal_components(x, options.rank), codes]
        evaluation = evaluate(target, groups, representations, proteins.labels, notes, seed=options.seed)

        folder = run_folder(place, run.id)
        report = evaluation_report(evaluation)
        headline, entry = evaluation.headline, evaluation.entries[-1]
        intervals: dict[str, Any] = {name: asdict(interval) for name, interval in entry.scores.items()}
        intervals["retained"] = {name: asdict(interval) for name, interval in entry.retained.items()}
        saved = save(encoder, folder / ENCODER, metrics=intervals, data=encoder.provenance)
        metrics = {"score": entry.scores[headline].value, "full": evaluation.entries[0].scores[headline].value}
        if share := entry.retained.get(headline):
            metrics |= {"retained": share.value, "retained_low": share.low, "retained_high": share.high}
        run.log_params({"headline": headline, "encoder": encoder.digest})
        run.log_metrics({**metrics, "bytes": encoder.bytes_per_protein})
        run.keep(options, [*report.save(folder / "evaluation"), *sorted(saved.iterdir())], report.markdown())
        publish(folder, place)
    log.info("Encoder: %s (distil_rank.load reads it).", place / ENCODER)
    report.show()
    return encoder, place / ENCODER, intervals
