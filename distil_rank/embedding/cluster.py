"""Shards computed by the workers of a Ray cluster, which come and go: one worker a device, one shard at a time.

One worker more than there is room for is always asked for, so that machines that join the cluster are used without
being told. When a worker dies, its shard goes back to the front of the queue; what was finished of it stays.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from distil_rank.embedding.planning import Shard
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0  # for a cluster's address to accept a connection; Ray itself would wait for minutes
OBJECT_STORE_BYTES = 128 * 2**20  # of a cluster started here; vectors go straight into the store, not through Ray
DEATHS = 3  # of workers on the same shard, after which the shard is taken to be the cause
WAIT_SECONDS = 60.0  # for the first worker, before a line says what is missing


@dataclass(frozen=True)
class Cluster:
    """Where workers run, and what each takes."""

    address: str | None = None  # HOST:PORT; None starts a cluster on this machine for as long as it is needed
    cores: int = 1
    gpus: int = 0  # or 1


def workers_on(address: str | None, cores: int | None = None, gpus: int = 0) -> Cluster:
    """What to ask a cluster for, by default one core beside a GPU, otherwise all; `InputError` if there is none."""
    if find_spec("ray") is None:
        raise InputError("Expected Ray for --engine ray but it is missing; pip install 'distil-rank[ray]'.")
    if address is not None:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"Expected a Ray cluster at {address} but nothing answers ({getattr(error, 'strerror', 0) or error}); "
                "start one with ray start --head, and name it as HOST:PORT."
            ) from error
    return Cluster(address, cores or (1 if gpus else os.cpu_count() or 1), gpus)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here ends with the context, and sends no usage statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no GPU is hidden from a worker that takes none
    import ray  # noqa: PLC0415  (optional: the ray extra)

    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"Expected a Ray cluster at {address or 'this machine'} but got: {reason}") from error
    try:
        if main:  # Ray has put its own in place of the handler, which hides every exception but Ctrl-C's
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield ray
    finally:
        ray.shutdown()
        if main:
            signal.signal(signal.SIGTERM, handler)


class _Worker:
    """One process on one device."""

    def start(self, make: Callable[[], Callable[[Shard], Any]]) -> str:
        """Loads what computing takes; returns the machine's name. No constructor, so that errors come back."""
        self._compute = make()
        return platform.node()

    def compute(self, shard: Shard) -> Any:
        return self._compute(shard)


def compute_elastically(
    shards: Sequence[Shard], make: Callable[[], Callable[[Shard], Any]], cluster: Cluster, progress: str
) -> list[Any]:
    """Computes shards on all devices of a cluster, whichever are there at the time; results are in no order.

    `make` is called in each worker, and returns what computes a shard; `progress` is what the bar calls the work.

    Raises:
        InputError: raised by a worker, or several died on the same shard.
    """
    if not shards:
        return []
    results: list[Any] = []
    waiting = deque(sorted(shards, key=lambda shard: -shard.residues))
    deaths: Counter[str] = Counter()
    busy: dict[Any, tuple[Any, Shard | None]] = {}  # by what is awaited: the worker, None while it starts
    total = sum(shard.residues for shard in shards)
    with (
        _connected(cluster.address) as ray,
        tqdm(total=total, desc=progress, unit="residue", unit_scale=True, disable=None) as bar,
    ):
        remote = ray.remote(num_cpus=cluster.cores, num_gpus=cluster.gpus, max_restarts=0)(_Worker)
        made = ray.put(make)
        while len(results) < len(shards):
            starting = [awaited for awaited, (_, shard) in busy.items() if shard is None]
            if waiting and not starting:
                worker = remote.remote()
                busy[worker.start.remote(made)] = worker, None
            ready, _ = ray.wait(list(busy), timeout=WAIT_SECONDS)
            if not ready:
                level = logging.WARNING if len(starting) == len(busy) else logging.DEBUG
                logger.log(level, "no device of the cluster is free: waiting (Ray: %s)", ray.cluster_resources())
                continue
            worker, shard = busy.pop(ready[0])
            doing = "starting" if shard is None else f"computing {shard.file}"
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:  # raised in the worker
                raise InputError(str(error.cause)) if isinstance(error.cause, InputError) else error from error
            except ray.exceptions.RayError as error:  # the worker is no more
                deaths[doing] += 1
                if deaths[doing] >= DEATHS:
                    raise InputError(
                        f"Expected workers to live but {DEATHS} died {doing}, for lack of memory perhaps: "
                        f"{' '.join(str(error).split())[:300]}; lower --max_tokens, or give each more memory, and run "
                        "the same command again."
                    ) from error
                logger.warning("a worker died %s: once more", doing)
                waiting.extendleft([] if shard is None else [shard])
                continue
            if shard is None:
                logger.info("a worker joined on %s", result)
            else:
                results.append(result)
                bar.update(shard.residues)
            if waiting:
                shard = waiting.popleft()
                busy[worker.compute.remote(shard)] = worker, shard
            else:
                ray.kill(worker)
    return results
