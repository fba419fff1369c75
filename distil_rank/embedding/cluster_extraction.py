"""The devices of a Ray cluster fill one store: this process plans and finishes, workers compute shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distil_rank.embedding.elastic import compute_elastically
from distil_rank.embedding.extraction import Extraction, Filled, Request
from distil_rank.embedding.location import absolute
from distil_rank.embedding.ray_cluster import Cluster
from distil_rank.embedding.shards import Shard
from distil_rank.embedding.store import Store


@dataclass(frozen=True)
class _Embedding:
    """Makes, in a worker, what computes a shard; returns distinct sequences and residues computed."""

    request: Request
    device: str
    cores: int

    def __call__(self) -> Callable[[Shard], tuple[int, int]]:
        if self.device == "cpu":
            torch.set_num_threads(self.cores)
        extraction = Extraction(self.request, torch.device(self.device))
        return lambda shard: extraction.compute([shard], progress=False)


def extract_on_cluster(request: Request, device: torch.device, cluster: Cluster) -> Filled:
    """Fills the store with whatever devices the cluster has while it lasts.

    Args:
        request: What to embed, and how. Store and backbone must mean the same on every machine.
        device: Of this process, for planning: the precision is decided on it.
        cluster: Where to compute.

    Raises:
        InputError: the cluster does not answer, its workers die, or the request cannot be met.
    """
    extraction = Extraction(request, device)
    writer = extraction.writer
    with writer.lock():
        added, report = extraction.plan()
        start = time.perf_counter()
        backbone = Path(request.backbone)
        everywhere = replace(
            request,
            store=absolute(request.store),
            backbone=str(backbone.absolute()) if backbone.exists() else request.backbone,
        )
        work = _Embedding(everywhere, "cuda" if cluster.gpus else "cpu", cluster.cores)
        done = compute_elastically(writer.pending(), work, cluster, "embed")
        computed, residues = (sum(counts) for counts in zip(*done, strict=True)) if done else (0, 0)
        seconds = time.perf_counter() - start
        extraction.finish(computed, residues, seconds)
        return Filled(Store.open(writer.path, writer.content), added, report, computed, residues, seconds)
