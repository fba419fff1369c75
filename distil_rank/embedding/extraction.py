"""What one process does to fill a store: plan the missing shards and compute some of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from distil_rank.embedding.backbone import Backbone, load_backbone
from distil_rank.embedding.embedder import Embedded, Embedder
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.int8.calibration import CalibrationEncoder
from distil_rank.embedding.layers import LayerCost, State, layer_costs, parse_layers
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.precision import (
    CALIBRATION,
    HEAD,
    MIN_BF16_COSINE,
    choose,
    int8_encoder,
    store_calibration,
)
from distil_rank.embedding.provenance import environment, memory_of, read_provenance
from distil_rank.embedding.sequences import CleaningReport, Protein, iter_records
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import CODES, EMBEDDINGS, Store, layers_of
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.embed import EmbedOptions

logger = logging.getLogger(__name__)

MAX_TOKENS = {"cpu": 2048, "cuda": 32768}  # in a batch: fits a CPU's caches, keeps a GPU busy


@dataclass(frozen=True)
class Request(EmbedOptions):
    """What to embed, and how, with what other commands hand over.

    Attributes:
        store: By now it has a name.
        encoder: Writes codes in place of the vectors.
        like: Store of the same backbone whose int8 calibration, and comparison with fp32, to take over.
    """

    store: str | Path = ""
    encoder: CodeEncoder | None = None
    like: Location | None = None


@dataclass(frozen=True)
class Filled:
    """A store that was filled, and what it took.

    Attributes:
        store: Opened before its lock was released.
        added: New proteins.
        report: What cleaning changed.
        computed: Distinct sequences that were computed.
        residues: Their residues.
        seconds: Time for computing them.
        costs: Of stopping behind each layer; nothing where this process computed nothing.
    """

    store: Store
    added: int
    report: CleaningReport
    computed: int
    residues: int
    seconds: float
    costs: Sequence[LayerCost] = ()


class _Batch(NamedTuple):
    """Sequences of one shard that go through the model together."""

    shard: Shard
    rows: list[int]
    texts: list[str]
    residues: int  # that the progress bar counts: with those computed by an earlier run
    last: bool  # whether the shard is complete after it


class Extraction:
    """A request on one device.

    Args:
        request: What to embed, and how.
        device: Where to compute.
    """

    def __init__(self, request: Request, device: torch.device):
        self.request = request
        self.device = device
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

    def plan(self) -> tuple[int, CleaningReport]:
        """Adds the new proteins, decides on the precision and writes the shards to compute into the manifest.

        The caller holds the store's lock.

        Returns:
            The number of added proteins, and what cleaning changed.
        """
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
        retried = writer.retry_skipped(memory_of(self.device), request.retry_skipped)
        if retried:
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
        """With the store's settings; int8 is what `plan` has made, or made again from the store's calibration."""
        manifest = self.writer.manifest
        layers = layers_of(manifest) or [State.parse(manifest["layer"])]
        encoder = None
        if precision == "int8":
            encoder = self._int8
            if encoder is None:  # after a restart, and in other processes
                calibration = store_calibration(self.writer, self.device)
                encoder = int8_encoder(CalibrationEncoder(self.backbone.streamed, layers[-1].layer), calibration)
        return Embedder(
            self.backbone,
            manifest["pooling"],
            precision,
            self.device,
            layers,
            manifest["max_length"],
            self.request.max_tokens or MAX_TOKENS[self.device.type],
            encoder,
        )

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder with the store's settings."""
        return self._embedder(self.writer.manifest["precision"])

    def _texts(self, shard: Shard) -> dict[int, str]:
        """The sequences, truncated if requested, by row."""
        cut = self.request.max_length if self.request.long == "truncate" else None
        return {row: text[:cut] for row, text in self.writer.sequences(shard).items()}

    def compute(self, shards: list[Shard], progress: bool = True) -> tuple[int, int]:
        """Computes what is missing of some shards; a thread writes each batch while the next is computed.

        Args:
            shards: The shards to complete.
            progress: Whether to show a progress bar, if on a terminal.

        Returns:
            Number of distinct sequences computed, and of their residues.
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
        """Writes one batch; `cpu()` waits for the device."""
        if batch.rows:
            vectors = result.layers.cpu().numpy()
            owner = np.repeat(batch.rows, result.counts)
            invalid = owner[~np.isfinite(vectors).all(axis=(0, 2))]
            if len(invalid):
                raise InputError(
                    f"Expected finite vectors but {self.writer.ids(batch.shard, invalid[:1])[0]} has NaN or inf; "
                    f"check the weights {self.backbone.name}, or use another store with --precision fp32."
                )
            if self.request.encoder is not None:
                vectors = self.request.encoder.encode(torch.from_numpy(vectors[0])).numpy()
            self.writer.write_part(batch.shard, batch.rows, result.counts, vectors, memory_of(self.device))
        if batch.last:
            self.writer.seal(batch.shard)

    def finish(self, computed: int, residues: int, seconds: float) -> None:
        """Records complete shards in the manifest and, where something was computed, the run in the provenance.

        The caller holds the store's lock.
        """
        self.writer.finish()
        if computed:
            counts = {"computed": computed, "residues": residues, "seconds": round(seconds, 3)}
            costs = [asdict(cost) for cost in self.costs(computed, residues, seconds)]
            self.writer.record_extraction(**environment(self.device), **counts, layer_costs=costs)

    def costs(self, computed: int, residues: int, seconds: float) -> list[LayerCost]:
        """What stopping behind each layer costs, measured in this run; nothing where it computed nothing."""
        if not computed:
            return []
        clock, threads = self.embedder.encoder.clock, self.embedder.parallel_batches
        return layer_costs(clock, self.backbone.num_layers, seconds, computed, residues, threads)
