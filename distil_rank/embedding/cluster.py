"""Shards computed by the workers of a Ray cluster, which come and go: one worker a device, one shard at a time.

Every shard is a task that waits for a device, so that machines that join the cluster are used without being told. When
a worker dies, its shard waits again; what was finished of it stays.
"""

import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from distil_rank.embedding.planning import Shard
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0  # for a cluster's address to accept a connection; Ray itself would wait for minutes
OBJECT_STORE_BYTES = 128 * 2**20  # of a cluster started here; vectors go straight into the store, not through Ray
DEATHS = 3  # of workers on the same shard, after which the shard is taken to be the cause
WAIT_SECONDS = 60.0  # for a shard, before a line says what the cluster has

Computer = Callable[[Shard], Any]
_computers: list[Computer] = []  # of this worker, once it has one: a model takes seconds to load


def check_answers(address: str) -> None:
    """Raises `InputError` where no cluster is at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"Expected a Ray cluster at {address} but nothing answers ({getattr(error, 'strerror', 0) or error}); "
            "start one with ray start --head, and name it as HOST:PORT."
        ) from error


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here ends with the context, and sends no usage statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no GPU is hidden from a worker that takes none
    import ray  # noqa: PLC0415  (optional: the ray extra)

    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"Expected a Ray cluster at {address or 'this machine'} but got: {reason}") from error
    try:
        with suppress(ValueError):  # Ray has put its own in the main thread, which hides all exceptions but Ctrl-C's
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield ray
    finally:
        ray.shutdown()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, handler)


def _compute(make: Callable[[], Computer], shard: Shard) -> Any:
    if not _computers:
        _computers.append(make())
    return _computers[0](shard)


def compute_elastically(
    shards: Sequence[Shard], make: Callable[[], Computer], address: str | None, cores: int, gpus: int = 0
) -> list[Any]:
    """Computes shards on all devices of a cluster, whichever are there at the time; results are in no order.

    Args:
        shards: What to compute.
        make: Called in each worker, returns what computes a shard.
        address: HOST:PORT; None starts a cluster on this machine for as long as it is needed.
        cores: That each worker takes.
        gpus: That each worker takes, 0 or 1.

    Raises:
        InputError: raised by a worker, or several died on the same shard.
    """
    if not shards:
        return []
    results: list[Any] = []
    deaths: Counter[str] = Counter()
    total = sum(shard.residues for shard in shards)
    with (
        _connected(address) as ray,
        tqdm(total=total, desc="embed", unit="residue", unit_scale=True, disable=None) as bar,
    ):
        options = {"num_cpus": cores, "num_gpus": gpus, "max_retries": 0, "max_calls": 0}
        task, made = ray.remote(**options)(_compute), ray.put(make)
        waiting = {task.remote(made, shard): shard for shard in sorted(shards, key=lambda shard: -shard.residues)}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=WAIT_SECONDS)
            if not ready:
                logger.info("waiting for %d shards; free in the cluster: %s", len(waiting), ray.available_resources())
                continue
            shard = waiting.pop(ready[0])
            try:
                results.append(ray.get(ready[0]))
                bar.update(shard.residues)
            except ray.exceptions.RayTaskError as error:  # raised in the worker
                raise InputError(str(error.cause)) if isinstance(error.cause, InputError) else error from error
            except ray.exceptions.RayError as error:  # the worker is no more
                deaths[shard.file] += 1
                if deaths[shard.file] >= DEATHS:
                    raise InputError(
                        f"Expected workers to live but {DEATHS} died computing {shard.file}, for lack of memory "
                        f"perhaps: {' '.join(str(error).split())[:300]}; lower --max_tokens, or give each more memory, "
                        "and run the same command again."
                    ) from error
                logger.warning("a worker died computing %s: once more", shard.file)
                waiting[task.remote(made, shard)] = shard
    return results
