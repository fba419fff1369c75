"""Several devices or nodes fill one store, through Lightning's `Trainer`.

Rank 0 plans while the others wait; then each rank computes whole shards of about the same work, and rank 0 records them
in the manifest. The next run computes the shards of a rank that died.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from distil_rank.embedding.extraction import Extraction, Filled, Request
from distil_rank.embedding.sequences import CleaningReport
from distil_rank.embedding.shards import Shard
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


class _Extractor(LightningModule):
    """Plans in `setup`, computes this rank's shards in `predict_step`, finishes in `teardown`.

    Args:
        request: What to embed, and how.

    Attributes:
        added: The number of added proteins (known to rank 0).
        report: What cleaning changed (known to rank 0).
        shards: The shards to compute, of all ranks.
        seconds: From the first batch until the last rank is done.
        store: The filled store, opened before the lock is released.
    """

    shards: list[Shard]
    seconds: float
    store: Store

    def __init__(self, request: Request):
        super().__init__()
        self.request = request
        self.added = 0
        self.report = CleaningReport(str(request.fasta))
        self._lock = ExitStack()

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        self.extraction = Extraction(self.request, strategy.root_device)
        problem = None
        if self.trainer.is_global_zero:
            try:
                self._lock.enter_context(self.extraction.writer.lock())
                self.added, self.report = self.extraction.plan()
            except InputError as error:
                problem = str(error)
        problem = strategy.broadcast(problem)  # or the other ranks would wait forever
        if problem is not None:
            self._lock.close()
            raise InputError(problem)
        self.shards = self.extraction.writer.pending()

    @property
    def computed(self) -> int:
        """Distinct sequences that all ranks computed."""
        return sum(shard.rows[1] - shard.rows[0] for shard in self.shards)

    @property
    def residues(self) -> int:
        """Their residues."""
        return sum(shard.residues for shard in self.shards)

    def predict_dataloader(self) -> Any:
        return DataLoader(range(1), batch_size=None)  # type: ignore[arg-type]  # a single step

    def predict_step(self, _: Any) -> None:
        self._start = time.perf_counter()
        parts = balanced(self.shards, self.trainer.world_size)
        self.extraction.compute(parts[self.trainer.global_rank], progress=self.trainer.is_global_zero)

    def teardown(self, stage: str) -> None:
        self.trainer.strategy.barrier("all shards")
        self.seconds = time.perf_counter() - self._start
        if self.trainer.is_global_zero:
            self.extraction.finish(self.computed, self.residues, self.seconds)
        self.trainer.strategy.barrier("finished")
        self.store = Store.open(self.request.store, self.extraction.writer.content)
        self.trainer.strategy.barrier("opened")
        self._lock.close()


def extract_on_devices(request: Request, accelerator: str, devices: int, num_nodes: int, strategy: str) -> Filled:
    """Fills the store with `devices` processes on each of `num_nodes` nodes, as Lightning launches them.

    Raises:
        InputError: Lightning has no such devices or strategy, or the request cannot be met.
    """
    try:
        trainer = Trainer(
            accelerator="gpu" if accelerator == "cuda" else accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,  # incompatible with nested tensors, which attention on a GPU uses
            enable_progress_bar=False,  # `Extraction.compute` shows one that counts residues
            use_distributed_sampler=False,  # `balanced` distributes shards by work
        )
    except (ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Expected devices and a strategy that Lightning knows but got: {reason}") from error
    done = _Extractor(request)
    trainer.predict(done, return_predictions=False)
    costs = done.extraction.costs(done.computed, done.residues, done.seconds)
    return Filled(done.store, done.added, done.report, done.computed, done.residues, done.seconds, costs)
