"""Code maps: fitted, judged, saved and put to work on a store, as one MLflow run."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distil_rank.codes.augment import Augmentation
from distil_rank.codes.evaluate import code_candidate, copy_task
from distil_rank.codes.fit import REGULARISATION, Fit, Metric, fit_metric
from distil_rank.codes.sources import NoiseSource, Proteins, copies_of, noise_of, open_proteins
from distil_rank.codes.store import (
    MAP,
    CodeStore,
    load_encoder,
    manifest_of,
    own_encoder,
    write_codes,
    write_encoder,
)
from distil_rank.codes.train import STEPS, train_encoder
from distil_rank.commands.lineage import lineage_of_vectors
from distil_rank.compression.artefact import save
from distil_rank.embedding.ray_cluster import Cluster, workers_on
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import CODES, Store
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import Evaluation
from distil_rank.evaluation.evaluate import evaluate as evaluate_task
from distil_rank.evaluation.labelled import labelled_source
from distil_rank.evaluation.representations import full_vector, variance_student
from distil_rank.evaluation.task import Kind
from distil_rank.lowrank.encoder import CodeEncoder, CodeType
from distil_rank.options.evaluation import LabelOptions
from distil_rank.report import evaluation as report
from distil_rank.report.run_folder import publish, run_folder
from distil_rank.tracking.logger import RunLogger
from distil_rank.tracking.run import Run, start_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodeResult:
    """What `code` made.

    Attributes:
        encoder: folder of the code map.
        store: folder of the codes; None where the data are no store.
        evaluation: how well the codes do; None where the map was there already.
    """

    encoder: Location
    store: Location | None
    evaluation: Evaluation | None


def code(
    data: str = "auto",
    metric: Metric = "invariant",
    rank: int = 64,
    dtype: CodeType = "bit",
    bytes: int | None = None,
    codes: str = "codes",
    encoder: str | None = None,
    noise: NoiseSource = "copies",
    augmentation: Augmentation = Augmentation(),  # noqa: B008 - frozen
    labels: LabelOptions = LabelOptions(),  # noqa: B008 - frozen
    task: Kind | Literal["auto"] = "auto",
    groups: str | None = None,
    fit_fraction: float = 0.5,
    regularisation: float = REGULARISATION,
    power: float = 1.0,
    train: int = STEPS,
    seed: int = 0,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    ray_cores: int | None = None,
    output: str = "results",
    config: str = "",
) -> CodeResult:
    """Fit a code map, evaluate it, and encode a store of embeddings with it.

    Args:
        data: The vectors: a store, or any file that distil reads (judged and fitted to, but not encoded); auto is the
            labelled sample.
        metric: variance, whitened, or invariant against the noise.
        rank: Numbers in a code before they are quantised.
        dtype: float32, int8, bit (signs, eight to a byte) or pq (a product quantiser's centroids).
        bytes: Of a pq code; by default one for eight numbers of the rank.
        codes: Folder of the store of codes; encoding goes on where it stopped.
        encoder: Folder of a code map that is there, such as `recommend` leaves; nothing is fitted or judged then.
        noise: What should not matter: the differences of perturbed copies, within labels or within clusters.
        augmentation: How copies are perturbed.
        labels: Where labels come from; without any, proteins are to be found by their perturbed copies.
        task: retrieval, classification, multilabel or regression; auto decides by the labels.
        groups: What is kept on one side; see evaluate.
        fit_fraction: Share of the proteins to fit on.
        regularisation: Of the noise covariance, in units of its mean eigenvalue.
        power: Of the whitening, 0 to 1.
        train: Steps of training towards the neighbours of the full-rank code, kept only where it clearly helps; 0 for
            the closed form alone. Codes of the variance metric are not trained.
        seed: Of all draws.
        engine: What encodes the store: this process, or ray, whose workers may come and go.
        ray_address: HOST:PORT of a Ray cluster; by default one is started on this machine.
        ray_cores: CPU cores of each of Ray's workers; by default all of this machine's.
        output: Folder for results.
        config: The resolved configuration, kept with the run.
    """
    if rank < 1:
        raise InputError(f"Expected --rank of at least 1 but got {rank}.")
    StoreWriter(codes, CODES).check_folder()  # before anything is embedded or written
    workers = workers_on(ray_address, ray_cores) if engine == "ray" else None
    if encoder is not None:
        return _encode_with(load_encoder(encoder), data, labels, codes, workers)
    asked: dict[str, Any] = {"train": train, "metric": metric, "rank": rank, "dtype": dtype}
    asked |= {"bytes": bytes, "seed": seed}
    asked |= {"regularisation": regularisation, "fit_fraction": fit_fraction, "groups": groups}
    asked |= {"noise": noise, **asdict(augmentation)} if metric == "invariant" else {}
    asked |= {"power": power} if metric == "whitened" else {}
    asked |= {f"labels_{key}": value for key, value in asdict(labels).items() if value is not None}
    existing = _existing(codes, asked)
    if existing is not None:
        log.info("Going on with the code map in %s, which was fitted with the same options.", codes)
        source = Store.open(labelled_source(data, labels))
        return CodeResult(f"{codes}/{MAP}", write_codes(source, codes, existing, workers).path, None)
    proteins = open_proteins(data, labels, task, groups, fit_fraction, seed)
    return _made(proteins, asked, augmentation, codes, workers, Path(output), config)


def _made(
    proteins: Proteins,
    asked: dict[str, Any],
    augmentation: Augmentation,
    codes: str,
    workers: Cluster | None,
    output: Path,
    config: str,
) -> CodeResult:
    """A new code map and its codes, as one MLflow run; `asked` are the options that the map depends on."""
    metric, rank, dtype, bytes, seed = (asked[key] for key in ("metric", "rank", "dtype", "bytes", "seed"))
    name = f"{Path(proteins.source).stem}-{metric}-r{rank}-{dtype}{bytes or ''}"
    params = {**asked, "source": proteins.source, "groups": proteins.groups.description}
    with start_run("code", name, params=params, tags=lineage_of_vectors(proteins.embeddings.provenance)) as run:
        copies = output / "copies"
        fitted = _fit(proteins, asked, augmentation, copies)
        made = _trained(proteins, fitted, fitted.encoder(rank, dtype, bytes, seed), asked["train"], seed, run)
        made.provenance["asked"] = asked
        done = _judge(proteins, made, rank, augmentation, copies, seed)
        place = output / "code" / name
        folder = run_folder(place, run.id)
        _log(run, done, made, report.save(done, folder), config)
        for file in sorted(save(made, folder / MAP, **_about(made, done)).iterdir()):
            run.log_artifact(file)
        publish(folder, place)
        store = _encode(proteins, made, done, codes, workers)
    log.info("Code map: %s (distil_rank.load reads it).", place / MAP)
    return CodeResult(place / MAP, None if store is None else store.path, done)


def _encode_with(
    encoder: CodeEncoder, data: str, labels: LabelOptions, codes: str, workers: Cluster | None
) -> CodeResult:
    """Encode a store with a code map that is there.

    Raises:
        InputError: a map of other vectors, or codes of another map in the folder.
    """
    source, before = Store.open(labelled_source(data, labels)), own_encoder(codes)
    if before is None:
        encoder.check_origin(manifest_of(source), str(source.path))
        write_encoder(encoder, codes, data=encoder.provenance)
    elif before.digest != encoder.digest:
        raise InputError(f"Expected codes of this code map in {codes} but they are of another; name another folder.")
    store = write_codes(source, codes, encoder, workers)
    log.info("Codes: %s, %s proteins of %s bytes", store.path, f"{len(store):,}", encoder.bytes_per_protein)
    return CodeResult(f"{codes}/{MAP}", store.path, None)


def _existing(codes: str, asked: dict[str, Any]) -> CodeEncoder | None:
    """The code map of a store of codes that is there.

    Raises:
        InputError: it was fitted with other options.
    """
    found = own_encoder(codes)
    if found is None:
        return None
    before = found.provenance.get("asked", {})
    if before != asked:
        key = next((key for key in asked if before.get(key) != asked[key]), next(iter(before.keys() - asked), "none"))
        raise InputError(
            f"Expected {key} {before.get(key)!r}, which the codes in {codes} were made with, but got "
            f"{asked.get(key)!r}; name another folder with --codes."
        )
    return found


def _fit(proteins: Proteins, asked: dict[str, Any], augmentation: Augmentation, copies: Path) -> Fit:
    """Directions on the fit side."""
    covariance, words = None, None
    if asked["metric"] == "invariant":
        covariance, words = noise_of(proteins, asked["noise"], augmentation, copies)
        log.info("Noise: %s", words)
    about = {**proteins.origin, "noise": words}
    x, fit = proteins.embeddings.x, proteins.groups.fit
    power = asked.get("power", 1.0)
    return fit_metric(x, fit, asked["metric"], covariance, asked["regularisation"], power, asked["seed"], about)


def _trained(proteins: Proteins, fitted: Fit, encoder: CodeEncoder, steps: int, seed: int, run: Run) -> CodeEncoder:
    """The code map after training, or as it was where training does not clearly help."""
    if not steps or fitted.metric == "variance":
        return encoder
    fit = proteins.groups.fit
    teacher = fitted.encoder(len(fitted.mean))
    x, groups = proteins.embeddings.x[fit], proteins.groups.number[fit]
    done = train_encoder(encoder, teacher, x, groups, steps, seed, logger=RunLogger(run))
    if done.steps:
        log.info("Training: %s", done)
        found = {"neighbours_start": done.start, "neighbours_trained": done.trained}
        run.log_metrics({**found, "training_retained": done.retained})
    done.encoder.provenance["trained_steps"] = done.steps if done.retained else 0
    return done.encoder


def _judge(
    proteins: Proteins, encoder: CodeEncoder, rank: int, augmentation: Augmentation, copies: Path, seed: int
) -> Evaluation:
    """The full vector, the student of the same rank, and the codes, on the judged side."""
    x, groups, target, notes = proteins.embeddings.x, proteins.groups, proteins.target, list(proteins.notes)
    if target is None:
        found = copies_of(proteins, True, augmentation, copies)
        x, target, groups = copy_task(x, groups, found)
        notes.append("No labels: a protein and its perturbed copy are to find each other among the judged proteins.")
    name = f"codes, {encoder.provenance['metric']}, rank {encoder.rank}, {encoder.dtype}"
    candidates = [full_vector(x), variance_student(x, rank), code_candidate(name, encoder, x)]
    return evaluate_task(target, groups, candidates, proteins.labels, None, notes, seed=seed)


def _about(encoder: CodeEncoder, done: Evaluation) -> dict[str, Any]:
    """What is saved beside the map."""
    entry = done.entries[-1]
    metrics = {metric: asdict(interval) for metric, interval in entry.scores.items()}
    retained = {metric: asdict(interval) for metric, interval in entry.retained.items()}
    return {"metrics": {**metrics, "retained": retained}, "data": encoder.provenance}


def _encode(
    proteins: Proteins, encoder: CodeEncoder, done: Evaluation, codes: str, workers: Cluster | None
) -> CodeStore | None:
    if proteins.embeddings.provenance.get("format") != "store":
        log.warning("No codes were written: %s is no store of embeddings (make one with embed).", proteins.source)
        return None
    write_encoder(encoder, codes, **_about(encoder, done))
    store = write_codes(Store.open(proteins.source), codes, encoder, workers)
    log.info("Codes: %s, %s proteins of %s bytes", store.path, f"{len(store):,}", encoder.bytes_per_protein)
    return store


def _log(run: Run, done: Evaluation, encoder: CodeEncoder, files: list[Path], config: str) -> None:
    entry, full = done.entries[-1], done.entries[0]
    metrics = {"score": entry.scores[done.headline].value, "full": full.scores[done.headline].value}
    if done.headline in entry.retained:
        retained = entry.retained[done.headline]
        metrics |= {"retained": retained.value, "retained_low": retained.low, "retained_high": retained.high}
    run.log_params({"metric_judged": done.headline, "encoder": encoder.digest})
    run.log_metrics({**metrics, "bytes": encoder.bytes_per_protein})
    run.log_text(config, "config.yaml")
    for file in files:
        run.log_artifact(file)
    run.note(report.markdown(done))
