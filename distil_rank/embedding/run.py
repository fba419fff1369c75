"""From a file of proteins to a store of their embeddings; an interrupted run resumes when it is started again.

One process plans under the store's lock; then one device, several under Lightning's Fabric, or the workers of a Ray
cluster compute whole shards, and the first process records them. The next run computes what a dead one has left.
"""

from __future__ import annotations

import logging
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from tqdm import tqdm

from distil_rank.embedding.backbone import Backbone, load_backbone
from distil_rank.embedding.cluster import compute_elastically, workers_on
from distil_rank.embedding.embedder import Embedded, Embedder
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.int8.calibration import CalibrationEncoder
from distil_rank.embedding.layers import LayerCost, State, layer_costs, parse_layers, split_source
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.precision import (
    CALIBRATION,
    HEAD,
    MIN_BF16_COSINE,
    choose,
    int8_encoder,
    store_calibration,
)
from distil_rank.embedding.sequences import CleaningReport, Protein, iter_records, uncompressed_name
from distil_rank.embedding.storage import Location, absolute
from distil_rank.embedding.store import CODES, EMBEDDINGS, Store, layers_of, read_provenance
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.embed import Accelerator, EmbedOptions

logger = logging.getLogger(__name__)

STORES = Path("embeddings")  # where stores are created by default
OPTIONS = ("pooling", "layer", "precision", "long", "max_length")  # that vectors depend on
MAX_NAMED = 20  # skipped proteins in the warning; the summary lists all
PACKAGES = ("distil-rank", "torch", "fair-esm", "pyarrow")  # whose versions are recorded
MAX_TOKENS = {"cpu": 2048, "cuda": 32768}  # in a batch: fits a CPU's caches, keeps a GPU busy


@dataclass(frozen=True)
class Request(EmbedOptions):
    """What to embed, and how, with what other commands hand over."""

    store: str | Path = ""
    encoder: CodeEncoder | None = None  # writes codes in place of the vectors
    like: Location | None = None  # store of the same backbone whose int8 calibration and comparison to take over


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
    precision_note: str | None  # how closely int8 followed fp32, or why it is not used though asked for
    pooling: str
    dim: int
    layers: str
    layer_cost: str | None  # what stopping behind each layer costs; None where nothing was computed
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
    **options: Any,
) -> EmbedSummary:
    """Embeds the proteins of a file that the store lacks.

    Arguments are those of `EmbedOptions`, and `encoder` and `like` of `Request`; by default into embeddings/NAME.

    Raises:
        InputError: an option, the input, the store or the backbone cannot be used.
    """
    request = Request(fasta, store, backbone, pooling, layer, **options)  # type: ignore[arg-type]
    request.check()
    device = _device(request)
    request = replace(request, store=default_store(fasta) if store is None else store)
    cluster = fabric = None
    if request.engine == "ray":
        cluster = workers_on(request.ray_address, request.ray_cores, int(device.type == "cuda"))
    elif request.devices > 1 or request.num_nodes > 1:
        fabric = _launched(request)
        device = fabric.device
    leads = fabric is None or fabric.is_global_zero
    broadcast = (lambda value: value) if fabric is None else fabric.broadcast
    wait_for = (lambda what: None) if fabric is None else fabric.barrier

    extraction = Extraction(request, device)
    writer = extraction.writer
    added, report, problem = 0, CleaningReport(str(fasta)), None
    with ExitStack() as lock:
        if leads:
            try:
                lock.enter_context(writer.lock())
                added, report = extraction.plan()
            except InputError as error:
                problem = error
        problem = broadcast(problem)  # or the other ranks would wait forever
        if problem is not None:
            raise problem
        shards = writer.pending()
        start = time.perf_counter()
        if cluster is not None:
            counts = compute_elastically(shards, extraction.worker(cluster.cores, cluster.gpus), cluster, "embed")
        elif fabric is not None:
            mine = balanced(shards, fabric.world_size)[fabric.global_rank]
            extraction.compute(mine, progress=leads)
            wait_for("all shards")
            counts = [(shard.rows[1] - shard.rows[0], shard.residues) for shard in shards]
        else:
            counts = [extraction.compute(shards)]
        computed, residues = sum(rows for rows, _ in counts), sum(residues for _, residues in counts)
        seconds = time.perf_counter() - start
        costs = [] if cluster is not None or not computed else extraction.costs(computed, residues, seconds)
        if leads:
            writer.finish()
        if leads and computed:
            figures = {"computed": computed, "residues": residues, "seconds": round(seconds, 3)}
            writer.record_extraction(**environment(device), **figures, layer_costs=[asdict(cost) for cost in costs])
        wait_for("finished")
        opened = Store.open(writer.path, writer.content)  # before the lock is released
        wait_for("opened")

    return _summary(opened, added, report, computed, residues, seconds, costs)


def _device(request: Request) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if request.accelerator == "cuda" and not has_cuda:
        raise InputError("Expected a CUDA device but torch reports none; use --accelerator cpu.")
    kind: Accelerator = "cuda" if has_cuda and request.accelerator != "cpu" else "cpu"
    replace(request, accelerator=kind).check()  # a CPU has as many devices as cores
    return torch.device(kind)


def _launched(request: Request) -> Any:
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


def _summary(
    store: Store,
    added: int,
    report: CleaningReport,
    computed: int,
    residues: int,
    seconds: float,
    costs: Sequence[LayerCost],
) -> EmbedSummary:
    manifest, skipped = store.manifest, store.skipped
    if skipped:
        logger.warning(
            "%s skipped for lack of memory: %s%s; try again with --retry_skipped on a device with more memory",
            *(f"{len(skipped):,}", ", ".join(skipped[:MAX_NAMED]), ", ..." if len(skipped) > MAX_NAMED else ""),
        )
    return EmbedSummary(
        store=str(store.path),
        proteins=len(store),
        added=added,
        computed=computed,
        residues=residues,
        seconds=seconds,
        skipped=len(skipped),
        skipped_ids=", ".join(skipped) or None,
        long=pc.sum(pc.not_equal(store.proteins["notes"], "")).as_py(),
        cleaning=str(report),
        backbone=manifest["backbone"],
        precision=manifest["precision"],
        precision_note=manifest.get("precision_note"),
        pooling=manifest["pooling"],
        dim=manifest["dim"],
        layers=", ".join(map(str, store.layers or [manifest["layer"]])),
        layer_cost="; ".join(map(str, costs)) or None,
        fallback=manifest["fallback"],
        digest=store.digest,
    )


def balanced(shards: list[Shard], ranks: int) -> list[list[Shard]]:
    """Gives each rank shards of about the same number of residues: greedily, largest first, to the least loaded.

    >>> shards = [Shard(str(work), (0, 1), ("", 0, 1), work, "") for work in (5, 4, 3, 3, 3)]
    >>> [[shard.residues for shard in part] for part in balanced(shards, 2)]
    [[5, 3], [4, 3, 3]]
    """
    parts: list[list[Shard]] = [[] for _ in range(ranks)]
    for shard in sorted(shards, key=lambda shard: -shard.residues):
        min(parts, key=lambda part: sum(other.residues for other in part)).append(shard)
    return parts


class _Batch(NamedTuple):
    """Sequences of one shard that go through the model together."""

    shard: Shard
    rows: list[int]
    texts: list[str]
    residues: int  # that the progress bar counts: with those computed by an earlier run
    last: bool  # whether the shard is complete after it


class Extraction:
    """What one process does of a request, on its device."""

    def __init__(self, request: Request, device: torch.device):
        self.request, self.device = request, device
        self.writer = StoreWriter(request.store, EMBEDDINGS if request.encoder is None else CODES)
        self._int8: FusedEncoder | None = None  # the encoder that `plan` made for its comparison

    @cached_property
    def backbone(self) -> Backbone:
        """The requested model; for `auto` the existing store's, if there is one."""
        manifest = self.writer.manifest
        if self.request.backbone != "auto" or not manifest:
            return load_backbone(self.request.backbone)
        if manifest["fallback"]:
            logger.warning("%s (as when the store %s was made)", manifest["fallback"], self.writer.path)
        return load_backbone(manifest["backbone"])

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder with the store's settings."""
        return self._embedder(self.writer.manifest["precision"])

    def plan(self) -> tuple[int, CleaningReport]:
        """Adds new proteins, decides on the precision and writes the shards to compute; the caller holds the lock."""
        request, writer = self.request, self.writer
        writer.check_folder()
        report = CleaningReport(str(request.fasta))
        proteins = self._proteins(report)
        head = list(islice(proteins, HEAD))  # reports an unreadable file before a model is fetched

        existing, backbone = writer.manifest, self.backbone
        layers = parse_layers(request.layer, backbone.num_layers, backbone.name)
        wanted = ",".join(map(str, layers))
        stored = ",".join(map(str, layers_of(existing))) or str(existing.get("layer"))
        if existing and wanted != stored:
            raise InputError(
                f"Expected layers {stored}, which the store {writer.path} was made with, but got {wanted}; "
                f"use --layer {stored}, or choose another store."
            )
        sequences = [protein.sequence for protein in head]
        choice = choose(request, writer, self.device, backbone, sequences, layers[-1].layer, request.like)
        self._int8 = choice.encoder
        entries = [layer.entry for layer in layers]
        settings: dict[str, Any] = {
            "weights_sha256": backbone.sha256,
            "dim": backbone.dim,
            **({"layer": entries[0]} if len(entries) == 1 else {"layers": entries}),
            "pooling": request.pooling,
            "precision": choice.precision,
            **({} if choice.calibration is None else {"calibration_sha256": choice.calibration.sha256}),
            "long": request.long,
            "max_length": request.max_length,
        }
        if request.encoder is not None:
            request.encoder.check_origin(settings, f"this request to embed with {backbone.name}")
            settings |= {"dim": request.encoder.code_width, "code": request.encoder.entry}
        if choice.calibration is not None and not existing:
            writer.storage.write(CALIBRATION, choice.calibration.content())
        description = {"backbone": backbone.name, "fallback": backbone.fallback, **choice.notes}
        added = writer.plan(chain(head, proteins), settings, description, report)
        logger.info("%s: %s; %s new to %s", report.source, report, f"{added:,}", writer.path)
        if report.counts["nucleotides"]:
            logger.warning("%s sequences look like DNA or RNA, not protein", f"{report.counts['nucleotides']:,}")

        untouched = len(writer.pending()) == len(writer.manifest["shards"]) > 0
        compared = "bf16_cosine" in read_provenance(writer.storage)
        if request.precision != "bf16" and choice.precision == "bf16" and untouched and not compared:
            self._compare_bf16()
        if request.retry_skipped and (retried := writer.retry_skipped()):
            logger.info("retrying %s sequences that did not fit into memory", f"{retried:,}")
        return added, report

    def _proteins(self, report: CleaningReport) -> Iterator[Protein]:
        limit = self.request.max_length
        for protein in iter_records(self.request.fasta, report):
            if self.request.long == "error" and len(protein.sequence) > limit:
                raise InputError(
                    f"Expected at most {limit} residues in {report.source} but {protein.id} has "
                    f"{len(protein.sequence)}; use --long window or --long truncate."
                )
            yield protein

    def _compare_bf16(self) -> None:
        """Computes the first batch in fp32 and bf16; sets the store to fp32 if they disagree."""
        texts = list(self._texts(self.writer.pending()[0]).values())
        both = []
        for precision in ("fp32", "bf16"):
            embedder = self._embedder(precision)
            first = embedder.batches([len(text) for text in texts])[0]
            both.append(embedder.embed([texts[i] for i in first]).per_sequence())
        cosines = [
            F.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()
            for a, b in zip(*both, strict=True)
            if len(a) and len(a) == len(b)
        ]
        worst = float(np.min(cosines, initial=1.0))  # which is NaN where any of them is
        if not worst >= MIN_BF16_COSINE:  # NaN too
            logger.warning("bf16 reaches a cosine of only %.4f to fp32 on the first batch: going on in fp32", worst)
            self.writer.update(precision="fp32")
        else:
            logger.info("computing in bf16: cosine to fp32 of at least %.5f on the first batch", worst)
        self.writer.record(bf16_cosine=worst)

    def _embedder(self, precision: str) -> Embedder:
        manifest = self.writer.manifest
        layers = layers_of(manifest) or [State.parse(manifest["layer"])]
        encoder = self._int8 if precision == "int8" else None
        if precision == "int8" and encoder is None:  # after a restart, and in other processes
            calibration = store_calibration(self.writer, self.device)
            encoder = int8_encoder(CalibrationEncoder(self.backbone.streamed, layers[-1].layer), calibration)
        tokens = self.request.max_tokens or MAX_TOKENS[self.device.type]
        pooling, window = manifest["pooling"], manifest["max_length"]
        return Embedder(self.backbone, pooling, precision, self.device, layers, window, tokens, encoder)

    def _texts(self, shard: Shard) -> dict[int, str]:
        """The sequences, truncated if requested, by row."""
        cut = self.request.max_length if self.request.long == "truncate" else None
        return {row: text[:cut] for row, text in self.writer.sequences(shard).items()}

    def worker(self, cores: int, gpus: int) -> Callable[[], Callable[[Shard], tuple[int, int]]]:
        """What a worker of a cluster calls to compute shards; store and backbone must mean the same everywhere."""
        backbone = Path(self.request.backbone)
        name = str(backbone.absolute()) if backbone.exists() else self.request.backbone
        request = replace(self.request, store=absolute(self.request.store), backbone=name)

        def make() -> Callable[[Shard], tuple[int, int]]:
            if not gpus:
                torch.set_num_threads(cores)
            extraction = Extraction(request, torch.device("cuda" if gpus else "cpu"))
            return lambda shard: extraction.compute([shard], progress=False)

        return make

    def compute(self, shards: list[Shard], progress: bool = True) -> tuple[int, int]:
        """Computes what is missing of some shards; a thread writes each batch while the next is computed.

        Returns the number of distinct sequences computed, and of their residues.
        """
        computed = residues = 0
        total = sum(shard.residues for shard in shards)
        hidden = None if progress else True  # None: hidden unless standard error is a terminal
        with (
            tqdm(total=total, desc="embed", unit="residue", unit_scale=True, disable=hidden) as bar,
            ThreadPoolExecutor(max_workers=1) as pool,
        ):
            writing: Future[None] | None = None
            for batch, result in self.embedder.stream(self._batches(shards)):
                if writing is not None:
                    writing.result()
                writing = pool.submit(self._write, batch, result)
                computed += len(batch.rows)
                residues += sum(map(len, batch.texts))
                bar.update(batch.residues)
            if writing is not None:
                writing.result()
        return computed, residues

    def _batches(self, shards: list[Shard]) -> Iterator[_Batch]:
        """The batches to compute of each shard; its last one is empty and tells that the shard can be sealed."""
        for shard in shards:
            if self.writer.is_sealed(shard):
                yield _Batch(shard, [], [], shard.residues, last=False)
                continue
            texts, ready = self._texts(shard), self.writer.done(shard)
            rows = list(texts)
            for batch in self.embedder.batches([len(text) for text in texts.values()]):
                missing = [rows[i] for i in batch if rows[i] not in ready]
                residues = sum(len(texts[rows[i]]) for i in batch)
                yield _Batch(shard, missing, [texts[row] for row in missing], residues, last=False)
            yield _Batch(shard, [], [], 0, last=True)

    def _write(self, batch: _Batch, result: Embedded) -> None:
        if batch.rows:
            vectors = result.layers.cpu().numpy()  # waits for the device
            owner = np.repeat(batch.rows, result.counts)
            invalid = owner[~np.isfinite(vectors).all(axis=(0, 2))]
            if len(invalid):
                raise InputError(
                    f"Expected finite vectors but {self.writer.ids(batch.shard, invalid[:1])[0]} has NaN or inf; "
                    f"check the weights {self.backbone.name}, or use another store with --precision fp32."
                )
            if self.request.encoder is not None:
                vectors = self.request.encoder.encode(torch.from_numpy(vectors[0])).numpy()
            self.writer.write_part(batch.shard, batch.rows, result.counts, vectors)
        if batch.last:
            self.writer.seal(batch.shard)

    def costs(self, computed: int, residues: int, seconds: float) -> list[LayerCost]:
        """What stopping behind each layer costs, as measured while computing."""
        clock, threads = self.embedder.encoder.clock, self.embedder.parallel_batches
        return layer_costs(clock, self.backbone.num_layers, seconds, computed, residues, threads)


def options_like(manifest: Mapping[str, Any], store: Location | None) -> dict[str, Any]:
    """Options of `embed` for vectors like those of a manifest; in int8 its store, or STORE:LAYER, is needed."""
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


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine up to this process's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of what the vectors are computed with, and the machine."""
    cuda = device.type == "cuda"
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": memory_of(device),
        },
    }
