"""From a file of proteins to a store of their embeddings; an interrupted run resumes when it is started again.

One process plans under the store's lock; then one device, several under Lightning's Fabric, or the workers of a Ray
cluster compute whole shards, and the first process records them. The next run computes what a dead one has left.
"""

import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from distil_rank.embedding.cluster import check_answers, compute_elastically
from distil_rank.embedding.extraction import Extraction
from distil_rank.embedding.layers import layer_costs, split_source
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.sequences import CleaningReport
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import Store, layers_of
from distil_rank.errors import InputError, examples
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.embed import Accelerator, EmbedOptions

logger = logging.getLogger(__name__)

OPTIONS = ("pooling", "layer", "precision", "long", "max_length")  # that vectors depend on
PACKAGES = ("distil-rank", "torch", "fair-esm", "pyarrow")  # whose versions are recorded


@dataclass(frozen=True)
class EmbedSummary:
    """Result of one run of `embed`, as it is shown and logged."""

    store: str
    proteins: int  # with embeddings in the store now
    added: int  # by this run, as are those that follow
    computed: int  # distinct sequences
    residues: int  # of them
    seconds: float
    skipped: int  # without embeddings because they did not fit into memory
    skipped_ids: str | None
    long: int  # above `max_length`, computed in windows or truncated
    cleaning: str
    backbone: str
    precision: str
    precision_note: str | None  # how int8 or bf16 followed fp32, or why not used; with which kernels a GPU computed
    pooling: str
    dim: int
    layers: str
    fallback: str | None  # the warning, where the default backbone was not available
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
    *,
    encoder: CodeEncoder | None = None,
    as_stored: bool = False,
    run: str | None = None,
    **options: Any,
) -> EmbedSummary:
    """Embeds the proteins of a file that the store lacks.

    Arguments are those of `EmbedOptions`; by default into embeddings/NAME. With an encoder its codes are stored.
    `as_stored` says that other vectors decide on the precision (see `precision.choose`); `run` is the MLflow run, for
    the store's provenance.

    Raises:
        InputError: an option, the input, the store or the backbone cannot be used.
    """
    request = EmbedOptions(fasta, store, backbone, pooling, layer, **options)  # type: ignore[arg-type]
    request.check()
    device, fabric, elastic = _device(request), None, request.engine == "ray"
    if request.ray_address is not None:
        check_answers(request.ray_address)
    if request.devices > 1 or request.num_nodes > 1:
        fabric = _launched(request)
        device = fabric.device
    leads = fabric is None or fabric.is_global_zero
    broadcast = (lambda value: value) if fabric is None else fabric.broadcast
    wait_for = (lambda what: None) if fabric is None else fabric.barrier

    extraction = Extraction(request, device, encoder, as_stored)
    writer = extraction.writer
    added, report, problem = 0, CleaningReport(str(fasta)), None
    with ExitStack() as lock:
        if leads:
            try:
                lock.enter_context(writer.storage.lock())
                added, report = extraction.plan()
            except InputError as error:
                problem = error
        problem = broadcast(problem)  # or the other ranks would wait forever
        if problem is not None:
            raise problem
        devices = fabric.world_size if fabric is not None else 0 if elastic else 1
        shards = broadcast(extraction.pending(devices) if leads else [])
        start = time.perf_counter()
        computed, residues = _compute(extraction, shards, fabric)
        wait_for("all shards")
        seconds = time.perf_counter() - start
        if leads:
            writer.finish()
        if leads and computed:
            last, depth = layers_of(writer.manifest)[-1], extraction.backbone.num_layers
            costs = [] if elastic else layer_costs(last, depth, seconds, computed)  # of no one machine
            figures = {"computed": computed, "residues": residues, "seconds": round(seconds, 3), "run": run}
            writer.record_extraction(**environment(extraction.device), **figures, **extraction.how, layer_costs=costs)
        wait_for("finished")
        named = "".join(f":{layer}" for layer in writer.manifest.get("layers", [])[-1:])  # so that none is chosen
        opened = Store.open(f"{writer.path}{named}", writer.content)  # before the lock is released
        wait_for("opened")

    return _summary(opened, added, report, computed, residues, seconds, extraction.how)


def _compute(extraction: Extraction, shards: list[Shard], fabric: Any) -> tuple[int, int]:
    """Computes shards on all devices of a request; the number of distinct sequences, and of their residues."""
    request = extraction.options
    if request.engine == "ray":
        gpus = int(extraction.device.type == "cuda")
        cores = request.ray_cores or (1 if gpus else os.cpu_count() or 1)
        counts = compute_elastically(shards, extraction.worker(cores, gpus), request.ray_address, cores, gpus)
    elif fabric is not None:
        largest_first = sorted(shards, key=lambda shard: -shard.residues)  # so that every rank has about as much
        extraction.compute(largest_first[fabric.global_rank :: fabric.world_size], progress=fabric.is_global_zero)
        counts = [(shard.rows[1] - shard.rows[0], shard.residues) for shard in shards]
    else:
        counts = [extraction.compute(shards)]
    return sum(rows for rows, _ in counts), sum(residues for _, residues in counts)


def _summary(
    opened: Store,
    added: int,
    report: CleaningReport,
    computed: int,
    residues: int,
    seconds: float,
    how: Mapping[str, str],
) -> EmbedSummary:
    """What a run came to, with a warning where proteins did not fit into memory."""
    manifest, skipped = opened.manifest, opened.skipped
    notes = [note for note in (manifest.get("precision_note"), *how.values()) if note]
    if skipped:
        files = ", ".join(shard["file"] for shard in manifest["shards"] if shard["skipped"])
        logger.warning(
            "%s skipped for lack of memory: %s; to try them again, delete %s in %s and run the same command with more "
            "memory",
            *(f"{len(skipped):,}", examples(skipped), files, opened.path),
        )
    return EmbedSummary(
        store=str(opened.path),
        proteins=len(opened),
        added=added,
        computed=computed,
        residues=residues,
        seconds=seconds,
        skipped=len(skipped),
        skipped_ids=", ".join(skipped) or None,
        long=pc.sum(pc.not_equal(opened.proteins["notes"], "")).as_py(),
        cleaning=str(report),
        precision_note="; ".join(notes) or None,
        layers=", ".join(map(str, layers_of(manifest))),
        digest=opened.digest,
        **{key: manifest[key] for key in ("backbone", "precision", "pooling", "dim", "fallback")},
    )


def _device(request: EmbedOptions) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if request.accelerator == "cuda" and not has_cuda:
        raise InputError("Expected a CUDA device but torch reports none; use --accelerator cpu.")
    kind: Accelerator = "cuda" if has_cuda and request.accelerator != "cpu" else "cpu"
    replace(request, accelerator=kind).check()  # a CPU has as many devices as cores
    return torch.device(kind)


def _launched(request: EmbedOptions) -> Any:
    """Lightning's Fabric in each process."""
    from lightning.fabric import Fabric  # noqa: PLC0415  (one device needs no Lightning)
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    accelerator = "gpu" if request.accelerator == "cuda" else request.accelerator
    try:
        fabric = Fabric(
            accelerator=accelerator, strategy=request.strategy, devices=request.devices, num_nodes=request.num_nodes
        )
    except (ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Expected devices and a strategy that Lightning knows but got: {reason}") from error
    fabric.launch()
    return fabric


def options_like(manifest: Mapping[str, Any], store: Location | None) -> dict[str, Any]:
    """Options of `embed` for vectors like those of a manifest; in int8 its store, or STORE:LAYER, is needed."""
    options = {key: manifest[key] for key in OPTIONS if key in manifest}
    if options.get("precision") == "int8" and store is not None:
        options |= {"calibration": split_source(store)[0], "as_stored": True}
    return options


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of what the vectors are computed with, and the machine."""
    cuda = device.type == "cuda"
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *({"transformers"} & sys.modules.keys()))},
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
