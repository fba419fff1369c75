"""One of MLflow's servers as a process of its own, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests

from distil_rank.errors import InputError
from distil_rank.tracking.interrupts import exit_on_signals, was_interrupted

http = requests.Session()
http.trust_env = False  # our own server needs no proxy
START_TIMEOUT, STOP_TIMEOUT = 120.0, 10.0  # seconds


def run_server(
    name: str,
    command: Sequence[str],
    log: Path,
    host: str,
    port: int,
    announce: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> None:
    """Start `mlflow COMMAND` and wait until Ctrl-C, or until it ends.

    Args:
        name: what to call it on screen, such as `the server`.
        command: with its options, but for the address.
        log: what it prints goes there; its folder is the working directory.
        host: address to listen on.
        port: to listen on.
        announce: called with its address once it answers.
        env: further environment variables.

    Raises:
        InputError: if it does not start, or ends by itself.
    """
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    print(f"Starting {name} ...", flush=True)
    command = [*command, "--host", host, "--port", str(port)]
    with exit_on_signals(signal.SIGTERM, signal.SIGHUP), _process(command, log, env or {}) as server:
        try:
            _wait_until_ready(server, address, log)
            announce(address)
            server.wait()
        except (KeyboardInterrupt, SystemExit) as end:
            if not was_interrupted(end):
                raise
            print(f"\n{name[0].upper()}{name[1:]} has ended.")
            return
    raise InputError(f"Expected {name} to run until Ctrl-C but it ended by itself; see {log}.")


@contextmanager
def _process(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow COMMAND` as a process group of its own, so that Ctrl-C reaches us alone and we end all of it."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts programs of its environment
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=log.parent,
            env={**os.environ, **quiet, **env},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        for ask in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, ask)
                server.wait(STOP_TIMEOUT)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Waits until a server answers at /health.

    Raises:
        InputError: it does not.
    """
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end and server.poll() is None:
        try:
            http.get(f"{address}/health", timeout=5)
            return
        except requests.RequestException:
            time.sleep(0.2)
    raise InputError(f"Expected MLflow to start at {address} but it did not; see {log}.")
