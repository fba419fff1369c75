"""A Ray cluster: which one, what a worker takes of it, and the connection to it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from distil_rank.errors import InputError

ANSWER_SECONDS = 10.0  # for a cluster's address to accept a connection; Ray itself would wait for minutes
OBJECT_STORE_BYTES = 128 * 2**20  # of a cluster started here; vectors go straight into the store, not through Ray


@dataclass(frozen=True)
class Cluster:
    """Where workers run, and what each takes.

    Attributes:
        address: HOST:PORT of a Ray cluster; None starts one on this machine for as long as it is needed.
        cores: CPU cores of each worker.
        gpus: GPUs of each worker, 0 or 1.
    """

    address: str | None = None
    cores: int = 1
    gpus: int = 0


def workers_on(address: str | None, cores: int | None = None, gpus: int = 0) -> Cluster:
    """What to ask a cluster for, after a check that there is one.

    Args:
        address: HOST:PORT of a Ray cluster, None for one on this machine.
        cores: CPU cores of each worker; by default one beside a GPU, otherwise all that this machine has.
        gpus: GPUs of each worker, 0 or 1.

    Raises:
        InputError: no core, Ray is missing, or nothing answers at the address.
    """
    if cores is not None and cores < 1:
        raise InputError(f"Expected ray_cores of at least 1 but got {cores}.")
    if find_spec("ray") is None:
        raise InputError("Expected Ray for --engine ray but it is missing; pip install 'distil-rank[ray]'.")
    if address is not None:
        _check_answers(address)
    return Cluster(address, cores or (1 if gpus else os.cpu_count() or 1), gpus)


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"Expected --ray_address HOST:PORT, such as 10.0.0.1:6379, but got {address}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"Expected a Ray cluster at {address} but nothing answers ({reason}); start one with "
            f"ray start --head --port {port}."
        ) from error


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here ends with the context, and sends no usage statistics.

    Args:
        address: As in `Cluster`.

    Raises:
        InputError: the cluster refuses.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no GPU is hidden from a worker that takes none
    import ray  # noqa: PLC0415  (optional: the ray extra)

    own: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address is None else {}
    )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"Expected a Ray cluster at {address or 'this machine'} but got: {reason}") from error
    try:
        if threading.current_thread() is threading.main_thread():  # Ray has put its own in place of the handler
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # it hides every exception but Ctrl-C's
        yield ray
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
