"""From a file of proteins to a store of their embeddings; an interrupted run resumes when it is started again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from distil_rank.embedding.cluster import extract_on_cluster, workers_on
from distil_rank.embedding.extraction import Extraction, Filled, Request
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.sequences import uncompressed_name
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.options.embed import Accelerator

logger = logging.getLogger(__name__)

STORES = Path("embeddings")  # where stores are created by default
OPTIONS = ("pooling", "layer", "precision", "long", "max_length")  # that vectors depend on
MAX_NAMED = 20  # skipped proteins in the warning; the summary lists all


@dataclass(frozen=True)
class EmbedSummary:
    """Result of one run of `embed`.

    Attributes:
        store: The folder.
        proteins: Proteins with embeddings in the store now.
        added: Proteins that this run added.
        computed: Distinct sequences that this run computed.
        residues: Their residues.
        seconds: Time for computing them.
        skipped: Proteins without embeddings because they did not fit into memory.
        skipped_ids: Their names; None where there are none.
        long: Proteins above `max_length`, computed in windows or truncated.
        cleaning: What cleaning changed in the input.
        backbone: Name of the model.
        precision: `fp32`, `bf16` or `int8`.
        precision_note: How closely int8 followed fp32, or why it is not used though asked for.
        pooling: `mean`, `bos` or `residue`.
        dim: Width of the vectors.
        layers: Whose hidden states the store holds.
        layer_cost: What stopping behind each layer costs, measured in this run; None where it computed nothing.
        fallback: The warning, where the default backbone was not available.
        digest: Of the store's content.
    """

    store: str
    proteins: int
    added: int
    computed: int
    residues: int
    seconds: float
    skipped: int
    skipped_ids: str | None
    long: int
    cleaning: str
    backbone: str
    precision: str
    precision_note: str | None
    pooling: str
    dim: int
    layers: str
    layer_cost: str | None
    fallback: str | None
    digest: str

    @property
    def residues_per_second(self) -> float:
        """Throughput of the model in this run; 0 where nothing was computed."""
        return self.residues / self.seconds if self.computed else 0.0


def embed(
    fasta: str | Path = "data/sample.fasta.gz",
    store: str | Path | None = None,
    backbone: str = "auto",
    pooling: str = "mean",
    layer: int | str | None = None,
    **options: Any,
) -> EmbedSummary:
    """Embeds the proteins of a file that the store lacks.

    Args:
        fasta: As all that follows, of `EmbedOptions`.
        store: Folder or address; embeddings/NAME by default.
        backbone: The model.
        pooling: mean, bos or residue.
        layer: One or several.
        **options: Others of `EmbedOptions`, and `encoder` and `like` of `Request`.

    Raises:
        InputError: an option, the input, the store or the backbone cannot be used.
    """
    request = Request(fasta, store, backbone, pooling, layer, **options)  # type: ignore[arg-type]
    request.check()
    has_cuda = torch.cuda.is_available()
    if request.accelerator == "cuda" and not has_cuda:
        raise InputError("Expected a CUDA device but torch reports none; use --accelerator cpu.")
    kind: Accelerator = "cuda" if has_cuda and request.accelerator != "cpu" else "cpu"
    replace(request, accelerator=kind).check()  # a CPU has as many devices as cores
    device = torch.device(kind)
    request = replace(request, store=default_store(fasta) if store is None else store)

    if request.engine == "ray":
        filled = extract_on_cluster(
            request, device, workers_on(request.ray_address, request.ray_cores, int(kind == "cuda"))
        )
    elif request.devices > 1 or request.num_nodes > 1:
        from distil_rank.embedding.multi_device import extract_on_devices  # noqa: PLC0415  (one device needs no Lightning)

        filled = extract_on_devices(request, request.accelerator, request.devices, request.num_nodes, request.strategy)
    else:
        extraction = Extraction(request, device)
        with extraction.writer.lock():
            added, report = extraction.plan()
            start = time.perf_counter()
            computed, residues = extraction.compute(extraction.writer.pending())
            seconds = time.perf_counter() - start
            extraction.finish(computed, residues, seconds)
            opened = Store.open(extraction.writer.path, extraction.writer.content)
            costs = extraction.costs(computed, residues, seconds)
        filled = Filled(opened, added, report, computed, residues, seconds, costs)

    manifest, skipped = filled.store.manifest, filled.store.skipped
    if skipped:
        logger.warning(
            "%s skipped for lack of memory: %s%s; try again with --retry-skipped, or on a device with more memory",
            *(f"{len(skipped):,}", ", ".join(skipped[:MAX_NAMED]), ", ..." if len(skipped) > MAX_NAMED else ""),
        )
    return EmbedSummary(
        store=str(filled.store.path),
        proteins=len(filled.store),
        added=filled.added,
        computed=filled.computed,
        residues=filled.residues,
        seconds=filled.seconds,
        skipped=len(skipped),
        skipped_ids=", ".join(skipped) or None,
        long=pc.sum(pc.not_equal(filled.store.proteins["notes"], "")).as_py(),
        cleaning=str(filled.report),
        backbone=manifest["backbone"],
        precision=manifest["precision"],
        precision_note=manifest.get("precision_note"),
        pooling=manifest["pooling"],
        dim=manifest["dim"],
        layers=", ".join(map(str, filled.store.layers or [manifest["layer"]])),
        layer_cost="; ".join(map(str, filled.costs)) or None,
        fallback=manifest["fallback"],
        digest=filled.store.digest,
    )


def options_like(manifest: Mapping[str, Any], store: Location | None) -> dict[str, Any]:
    """Options of `embed` for vectors like those of a store.

    Args:
        manifest: Of the store, of embeddings or of codes.
        store: Its folder, or STORE:LAYER; in int8 it is needed.
    """
    options = {key: manifest[key] for key in OPTIONS if key in manifest}
    if options.get("precision") == "int8" and store is not None:
        options["like"] = split_source(store)[0]
    return options


def default_store(fasta: str | Path) -> Path:
    """The store of a file that is embedded without naming one.

    >>> default_store("data/sample.fasta.gz").as_posix(), default_store("my.proteins.csv").as_posix()
    ('embeddings/sample', 'embeddings/my.proteins')
    """
    return STORES / (Path(uncompressed_name(fasta)).stem.lstrip(".") or "proteins")
