"""Several devices or nodes fill one store, as Lightning's Fabric launches them.

Rank 0 plans while the others wait; then each rank computes whole shards of about the same work, and rank 0 records them
in the manifest. The next run computes the shards of a rank that died.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from distil_rank.embedding.extraction import Extraction, Filled, Request
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.sequences import CleaningReport
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError


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


def extract_on_devices(request: Request, accelerator: str, devices: int, num_nodes: int, strategy: str) -> Filled:
    """Fills the store with `devices` processes on each of `num_nodes` nodes.

    Only rank 0's summary knows the number of added proteins and what cleaning changed.

    Raises:
        InputError: Lightning has no such devices or strategy, or the request cannot be met.
    """
    accelerator = "gpu" if accelerator == "cuda" else accelerator
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    except (ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Expected devices and a strategy that Lightning knows but got: {reason}") from error
    fabric.launch()
    extraction = Extraction(request, fabric.device)
    added, report, problem = 0, CleaningReport(str(request.fasta)), None
    with ExitStack() as lock:
        if fabric.is_global_zero:
            try:
                lock.enter_context(extraction.writer.lock())
                added, report = extraction.plan()
            except InputError as error:
                problem = str(error)
        problem = fabric.broadcast(problem)  # or the other ranks would wait forever
        if problem is not None:
            raise InputError(problem)
        shards = extraction.writer.pending()
        start = time.perf_counter()
        parts = balanced(shards, fabric.world_size)
        extraction.compute(parts[fabric.global_rank], progress=fabric.is_global_zero)
        fabric.barrier("all shards")
        seconds = time.perf_counter() - start
        computed = sum(shard.rows[1] - shard.rows[0] for shard in shards)
        residues = sum(shard.residues for shard in shards)
        if fabric.is_global_zero:
            extraction.finish(computed, residues, seconds)
        fabric.barrier("finished")
        store = Store.read(extraction.writer.storage, extraction.writer.content)
        fabric.barrier("opened")
    costs = extraction.costs(computed, residues, seconds)
    return Filled(store, added, report, computed, residues, seconds, costs)
