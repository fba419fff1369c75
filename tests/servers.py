"""Real servers, MLflow's own and one that speaks S3, as processes on a free port."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

LIKE_OURS = {
    "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",  # an activated environment's
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def mlflow_process(*arguments: str, folder: Path, env: Mapping[str, str], path: str = "/health") -> Iterator[str]:
    """Run `mlflow <arguments> --port <free>` and yield its address once it answers at `path`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", *arguments, "--port", str(port), "--host", "127.0.0.1"]
    with _answering(command, port, folder, {**LIKE_OURS, **env}, path) as address:
        yield address


@contextmanager
def s3_process(folder: Path) -> Iterator[str]:
    """Run moto's server and yield its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--port", str(port), "--host", "127.0.0.1"]
    with _answering(command, port, folder, {}, "/moto-api/") as address:
        yield address


@contextmanager
def _answering(command: list[str], port: int, folder: Path, env: Mapping[str, str], path: str) -> Iterator[str]:
    """Run a server until the end of the context; yield its address once it answers at `path`."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}{path}", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise AssertionError(f"{address} does not answer:\n{log.read_text()}")
