"""What one process does for a store on its device: plan it under the lock, compute shards, write them.

The batches of a shard follow from its sequences alone, so that a killed run's shards end in the same bytes.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from distil_rank.embedding.backbone import ESM2Backbone, load_backbone
from distil_rank.embedding.embedder import Embedded, Embedder
from distil_rank.embedding.gpu import GpuEncoder, this_gpu
from distil_rank.embedding.int8.quantisation import CalibrationEncoder
from distil_rank.embedding.layers import parse_layers
from distil_rank.embedding.model import Backbone, Encoder
from distil_rank.embedding.planning import SHARD_BYTES, Shard
from distil_rank.embedding.precision import CALIBRATION, HEAD, choose, int8_encoder, store_calibration
from distil_rank.embedding.sequences import CleaningReport, iter_records, uncompressed_name
from distil_rank.embedding.storage import is_remote
from distil_rank.embedding.store import CODES, EMBEDDINGS, layers_of
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.options.embed import EmbedOptions

logger = logging.getLogger(__name__)

STORES = Path("embeddings")  # where stores are created by default
MAX_TOKENS = 2048  # in a batch on a CPU: fits its caches
GPU_TOKENS = 2**17  # on a GPU: more make it no faster
TOKEN_BYTES = 64  # what a layer has at once on a GPU, for each dimension of a token
BATCHES = 4  # of a GPU, of the shards that are computed together
REPAID = 6e10  # residues x layers x dimensions from which ten seconds of compiling are repaid: 1.4 M residues at 650M


class _Batch(NamedTuple):
    """Sequences of one shard that go through the model together; an empty one says that the shard is complete."""

    shard: Shard
    rows: list[int]
    texts: list[str]
    residues: int  # that the progress bar counts


class Extraction:
    """What one process does of a request, on its device.

    Args:
        options: What to embed, and how.
        device: Where to compute.
        encoder: Writes codes in place of the vectors.
        as_stored: See `precision.choose`.
    """

    def __init__(
        self,
        options: EmbedOptions,
        device: torch.device,
        encoder: CodeEncoder | None = None,
        as_stored: bool = False,
    ):
        self.options, self.encoder, self.as_stored = options, encoder, as_stored
        self.device = this_gpu() if device.type == "cuda" and device.index is None else device
        store = default_store(options.fasta) if options.store is None else options.store
        self.writer = StoreWriter(store, EMBEDDINGS if encoder is None else CODES)
        self._compared: Encoder | None = None  # the encoder that `plan` made for its comparison
        self.how: dict[str, str] = {}  # notes for users: how bf16 follows fp32, and with which kernels a GPU computed

    @cached_property
    def backbone(self) -> Backbone:
        """The requested model; for `auto` the existing store's, if there is one."""
        manifest = self.writer.manifest
        if self.options.backbone != "auto" or not manifest:
            return load_backbone(self.options.backbone)
        if manifest["fallback"]:
            logger.warning("%s (as when the store %s was made)", manifest["fallback"], self.writer.path)
        return load_backbone(manifest["backbone"])

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder with the store's settings."""
        manifest = self.writer.manifest
        layers = layers_of(manifest)
        encoder, precision = self._compared, manifest["precision"]
        if precision == "int8" and encoder is None:  # after a restart, and in other processes
            calibration = store_calibration(self.writer, self.device)
            assert isinstance(self.backbone, ESM2Backbone)  # no other is stored in int8
            encoder = int8_encoder(CalibrationEncoder(self.backbone.remapped(), layers[-1]), calibration)
        pooling, window = manifest["pooling"], manifest["max_length"]
        embedder = Embedder(self.backbone, pooling, precision, self.device, layers, window, self.max_tokens, encoder)
        if isinstance(embedder.encoder, GpuEncoder):  # by all that the store has, so that a killed run goes on alike
            work = sum(shard["residues"] for shard in manifest["shards"]) * layers[-1] * self.backbone.dim
            if work >= REPAID:
                embedder.encoder.compile()
            where = torch.cuda.get_device_name(self.device)
            logger.info("computing in %s on %s, with %s", precision, where, embedder.encoder.kernels)
            self.how["kernels"] = embedder.encoder.kernels
        return embedder

    @property
    def max_tokens(self) -> int:
        """Tokens in a batch."""
        if self.options.max_tokens is not None:
            return self.options.max_tokens
        if self.device.type == "cpu":
            return MAX_TOKENS
        manifest, memory = self.writer.manifest, torch.cuda.get_device_properties(self.device).total_memory
        copied = len(manifest.get("layers", [0])) if manifest["pooling"] == "residue" else 0
        return tokens_that_fit(memory, self.backbone.dim, copied)

    def pending(self, devices: int = 1) -> list[Shard]:
        """What is to be computed. On a GPU shards are joined, so that their sequences fill its batches.

        Of several devices each gets some of those; 0 are workers that take one shard at a time. Shards of residues are
        large as they are.
        """
        shards = self.writer.pending()
        if self.device.type == "cpu" or not devices or self.writer.manifest["pooling"] == "residue":
            return shards
        share = sum(shard.residues for shard in shards) // (BATCHES * devices)
        return self.writer.pending(BATCHES * self.max_tokens if devices == 1 else min(BATCHES * self.max_tokens, share))

    def plan(self) -> tuple[int, CleaningReport]:
        """Adds new proteins, decides on the precision and writes the shards to compute; the caller holds the lock."""
        options, writer = self.options, self.writer
        writer.check_folder()
        report = CleaningReport(str(options.fasta))
        proteins = iter_records(options.fasta, report)
        head = list(islice(proteins, HEAD))  # reports an unreadable file before a model is fetched

        existing, backbone = writer.manifest, self.backbone
        layers = parse_layers(options.layer, backbone.num_layers, backbone.name)
        wanted, stored = (",".join(map(str, some)) for some in (layers, layers_of(existing) if existing else layers))
        if wanted != stored:
            raise InputError(
                f"Expected layers {stored}, which the store {writer.path} was made with, but got {wanted}; "
                f"use --layer {stored}, or {writer.another(f'layers-{wanted}')}."
            )
        if options.pooling == "bos" and not backbone.tokens.bos:
            raise InputError(f"Expected --pooling mean or residue with {backbone.name}, which has no BOS, but got bos.")
        sequences = [protein.sequence for protein in head]
        choice = choose(options, writer, self.device, backbone, sequences, layers, self.as_stored)
        self._compared = choice.encoder
        settings: dict[str, Any] = {
            "weights_sha256": backbone.sha256,
            "dim": backbone.dim,
            **({"layer": layers[0]} if len(layers) == 1 else {"layers": layers}),
            "pooling": options.pooling,
            "precision": choice.precision,
            **({} if choice.calibration is None else {"calibration_sha256": choice.calibration.sha256}),
            "long": options.long,
            "max_length": min(options.max_length, backbone.limit or options.max_length),
        }
        if self.encoder is not None:
            self.encoder.check_origin(settings, f"this request to embed with {backbone.name}")
            settings |= {"dim": self.encoder.code_width, "code": self.encoder.entry}
        if choice.calibration is not None and not existing:
            writer.storage.write(CALIBRATION, choice.calibration.content())
        description = {"backbone": backbone.name, "fallback": backbone.fallback, **choice.notes}
        added = writer.plan(chain(head, proteins), settings, description, report)
        if choice.bf16 is not None:
            self.how["bf16"] = choice.bf16
        logger.info("%s: %s; %s new to %s", report.source, report, f"{added:,}", writer.path)
        if report.counts["nucleotides"]:
            logger.warning("%s sequences look like DNA or RNA, not protein", f"{report.counts['nucleotides']:,}")
        return added, report

    def worker(self, cores: int, gpus: int) -> Callable[[], Callable[[Shard], tuple[int, int]]]:
        """What a worker of a cluster calls to compute shards; store and backbone must mean the same everywhere."""
        backbone = Path(self.options.backbone)
        name = str(backbone.absolute()) if backbone.exists() else self.options.backbone
        store = self.writer.path if is_remote(self.writer.path) else Path(self.writer.path).absolute()
        options, encoder = replace(self.options, store=store, backbone=name), self.encoder

        def make() -> Callable[[Shard], tuple[int, int]]:
            if not gpus:
                torch.set_num_threads(cores)
            extraction = Extraction(options, torch.device("cuda" if gpus else "cpu"), encoder)
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
            writing: Future[Any] = pool.submit(int)  # nothing yet
            for batch, result in self.embedder.stream((batch, batch.texts) for batch in self._batches(shards)):
                writing.result()
                writing = pool.submit(self._write, batch, result)
                computed += len(batch.rows)
                residues += sum(map(len, batch.texts))
                bar.update(batch.residues)
            writing.result()
        return computed, residues

    def _batches(self, shards: list[Shard]) -> Iterator[_Batch]:
        """The batches to compute of each shard, and an empty one, for what earlier runs have computed."""
        cut = self.writer.manifest["max_length"] if self.options.long == "truncate" else None
        for shard in shards:
            rest = shard.residues
            if not self.writer.is_sealed(shard):
                texts = {row: text[:cut] for row, text in self.writer.sequences(shard).items()}
                rows, ready = list(texts), self.writer.done(shard)
                for batch in self.embedder.batches([len(text) for text in texts.values()]):
                    missing = [rows[i] for i in batch if rows[i] not in ready]
                    if missing:
                        residues = sum(len(texts[row]) for row in missing)
                        yield _Batch(shard, missing, [texts[row] for row in missing], residues)
                        rest -= residues
            yield _Batch(shard, [], [], rest)

    def _write(self, batch: _Batch, result: Embedded) -> None:
        if not batch.rows:
            self.writer.seal(batch.shard)
            return
        vectors = result.layers.cpu().numpy()
        owner = np.repeat(batch.rows, result.counts)
        invalid = owner[~np.isfinite(vectors).all(axis=(0, 2))]
        if len(invalid):
            raise InputError(
                f"Expected finite vectors but {self.writer.ids(batch.shard, invalid[:1])[0]} has NaN or inf; "
                f"check the weights {self.backbone.name}, or use another store with --precision fp32."
            )
        if self.encoder is not None:
            vectors = self.encoder.encode(torch.from_numpy(vectors[0])).numpy()
        self.writer.write_part(batch.shard, batch.rows, result.counts, vectors)


def tokens_that_fit(memory: int, dim: int, copied: int = 0) -> int:
    """Tokens in a batch by a GPU's memory in bytes: a power of two, the same whatever else is on the card.

    Half of the memory is left for weights and others. Of residues so many layers are copied to the host, if any.

    >>> tokens_that_fit(80 * 2**30, 1280), tokens_that_fit(8 * 2**30, 1280), tokens_that_fit(80 * 2**30, 1280, copied=1)
    (131072, 32768, 65536)
    """
    tokens = min(memory // (2 * TOKEN_BYTES * dim), GPU_TOKENS)
    if copied:
        tokens = min(tokens, 2 * SHARD_BYTES // (4 * dim * copied))
    return 1 << max(tokens, 1).bit_length() - 1


def default_store(fasta: str | Path) -> Path:
    """The store of a file that is embedded without naming one.

    >>> default_store("data/sample.fasta.gz").as_posix(), default_store("my.proteins.csv").as_posix()
    ('embeddings/sample', 'embeddings/my.proteins')
    """
    return STORES / (Path(uncompressed_name(fasta)).stem.lstrip(".") or "proteins")
