"""Shards computed by workers that come and go, through Ray: one worker a device, each with one shard at a time.

One worker more than there is room for is always asked for. Ray starts it as soon as a device is free, so that machines
that join the cluster are used without being told, and a cluster that scales itself sees what is wanted. When a worker
dies, or its machine leaves, its shard goes back to the front of the queue; what it had finished of it stays in the
store.
"""

from __future__ import annotations

import logging
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from distil_rank.embedding.ray_cluster import Cluster, connected
from distil_rank.embedding.shards import Shard
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

DEATHS = 3  # of workers on the same shard, after which the shard is taken to be the cause
WAIT_SECONDS = 60.0  # for the first worker, before a line says what is missing

Result = TypeVar("Result")
Compute = Callable[[Shard], Result]


class _Worker(Generic[Result]):
    """One process on one device."""

    def __init__(self, make: Callable[[], Compute[Result]]):
        self._make = make

    def start(self) -> str:
        """Loads what computing takes; returns the machine's name. Apart from `__init__` so that errors come back."""
        self._compute = self._make()
        return platform.node()

    def compute(self, shard: Shard) -> Result:
        return self._compute(shard)


class _Queue(Generic[Result]):
    """The shards that wait, and the workers with what each is doing."""

    def __init__(self, ray: Any, shards: Sequence[Shard], make: Callable[[], Compute[Result]], cluster: Cluster):
        self._ray = ray
        self.waiting = deque(sorted(shards, key=lambda shard: -shard.residues))
        self.deaths: Counter[str] = Counter()
        self.busy: dict[Any, tuple[Any, Shard | None]] = {}  # by what is awaited: the worker, None while it starts
        self._class: Any = ray.remote(num_cpus=cluster.cores, num_gpus=cluster.gpus, max_restarts=0)(_Worker)
        self._make = ray.put(make)

    def ask_for_worker(self) -> None:
        """Keeps one worker asked for while shards wait."""
        if self.waiting and all(shard is not None for _, shard in self.busy.values()):
            worker = self._class.remote(self._make)
            self.busy[worker.start.remote()] = (worker, None)

    def give_work(self, worker: Any) -> None:
        """Gives the next shard to a worker; lets the worker go where none waits."""
        if self.waiting:
            shard = self.waiting.popleft()
            self.busy[worker.compute.remote(shard)] = (worker, shard)
        else:
            self._ray.kill(worker)

    def cancel_start(self) -> None:
        """Takes back the worker that was asked for and has not started, where no shard waits for it."""
        for awaited, (worker, shard) in list(self.busy.items()):
            if shard is None and not self.waiting:
                del self.busy[awaited]
                self._ray.kill(worker)

    def lost(self, shard: Shard | None, error: Exception) -> None:
        """Puts the shard of a worker that died back."""
        name = "" if shard is None else shard.file
        self.deaths[name] += 1
        if self.deaths[name] >= DEATHS:
            doing = f"computing {name}" if name else "starting"
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"Expected workers to live but {DEATHS} died {doing}, for lack of memory perhaps: {reason}; lower "
                "--max_tokens, or give each more memory, and run the same command again."
            ) from error
        if shard is not None:
            logger.warning("a worker died: %s goes to another", shard.file)
            self.waiting.appendleft(shard)

    def results(self) -> Iterator[tuple[Shard, Result]]:
        """Each shard with its result, as they are finished.

        Raises:
            InputError: raised by a worker, or too many died.
        """
        while self.waiting or self.busy:
            self.ask_for_worker()
            done, _ = self._ray.wait(list(self.busy), num_returns=1, timeout=WAIT_SECONDS)
            if not done:
                self._report_waiting()
                continue
            worker, shard = self.busy.pop(done[0])
            try:
                found = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:  # raised in the worker
                raise InputError(str(error.cause)) if isinstance(error.cause, InputError) else error from error
            except self._ray.exceptions.RayError as error:  # the worker is no more
                self.lost(shard, error)
                continue
            if shard is None:
                logger.info("a worker joined on %s", found)
            else:
                yield shard, found
            self.give_work(worker)
            self.cancel_start()

    def _report_waiting(self) -> None:
        if all(shard is None for _, shard in self.busy.values()):
            logger.warning("no device of the cluster is free: waiting (Ray knows of %s)", self._ray.cluster_resources())


def compute_elastically(
    shards: Sequence[Shard], make: Callable[[], Compute[Result]], cluster: Cluster, progress: str
) -> list[Result]:
    """Computes shards on all devices of a cluster, whichever are there at the time.

    Args:
        shards: To compute, in any order.
        make: Called in each worker; returns what computes a shard. It and the results travel between processes.
        cluster: Where.
        progress: What the progress bar calls the work; it counts residues.

    Returns:
        The results, in the order in which they came.

    Raises:
        InputError: raised by a worker, or several died on the same shard.
    """
    found: list[Result] = []
    if not shards:
        return found
    total = sum(shard.residues for shard in shards)
    with (
        connected(cluster.address) as ray,
        tqdm(total=total, desc=progress, unit="residue", unit_scale=True, disable=None) as bar,
    ):
        for shard, result in _Queue(ray, shards, make, cluster).results():
            found.append(result)
            bar.update(shard.residues)
    return found
