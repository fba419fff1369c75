"""MLflow's own pages on the project's runs, by a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import requests

from distil_rank.errors import InputError
from distil_rank.options.ui import UiOptions
from distil_rank.tracking.run_store import (
    MODEL_TRAINING,
    VIEW,
    default_tracking_uri,
    exit_on_signals,
    is_remote,
    without_credentials,
)

DEFAULT_PORT = 5000
STOP_TIMEOUT = 10.0  # seconds
http = requests.Session()
http.trust_env = False  # our own server needs no proxy


def ui(options: UiOptions) -> None:
    """Show the runs in a browser until Ctrl-C.

    Raises:
        InputError: if the port is taken, or the server ends by itself.
    """
    root, host = Path(options.root), options.host
    uri = default_tracking_uri(root)
    if is_remote(uri):
        print(f"MLFLOW_TRACKING_URI keeps the runs at {without_credentials(uri)}: open that in a browser.")
        return
    folder = root.resolve() / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(host, options.port), folder / "ui.log"
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    places = ["--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *places, "--workers", "1", "--host", host, "--port", str(port)]
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env["MLFLOW_BACKEND_STORE_URI"] = uri  # which may hold a password, and arguments can be seen by everybody
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts programs of its environment
    print("Starting the MLflow UI ...", flush=True)
    with exit_on_signals(signal.SIGTERM, signal.SIGHUP), log.open("wb") as output:
        # A process group of its own, so that Ctrl-C reaches us alone and we end all of it.
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=env, start_new_session=True)
        try:
            if (pages := run_lists(address, server)) is not None:
                print(f"MLflow UI at {address}/#/experiments?{MODEL_TRAINING} (Ctrl-C ends it)")
                for name, page in pages:
                    print(f"  {name:9} {page}", flush=True)
            server.wait()
        except (KeyboardInterrupt, SystemExit):
            print("\nThe MLflow UI has ended.")
            return
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(server.pid, number)
                    server.wait(STOP_TIMEOUT)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
    raise InputError(f"Expected MLflow to run at {address} until Ctrl-C but it ended by itself; see {log}.")


def run_lists(address: str, server: subprocess.Popen[bytes]) -> list[tuple[str, str]] | None:
    """Each of our experiments with the page of its runs, opened with the columns that matter, once the server answers.

    None where it ends before that.
    """
    while server.poll() is None:
        with suppress(requests.RequestException):
            answer = http.post(f"{address}/api/2.0/mlflow/experiments/search", json={"max_results": 1000}, timeout=30)
            answer.raise_for_status()
            experiments = sorted(answer.json()["experiments"], key=itemgetter("name"))
            query = f"{MODEL_TRAINING}&viewStateShareKey={VIEW}"
            return [
                (one["name"], f"{address}/#/experiments/{one['experiment_id']}/runs?{query}")
                for one in experiments
                if f"mlflow.sharedViewState.{VIEW}" in {tag["key"] for tag in one.get("tags", ())}
            ]
        time.sleep(0.2)
    return None


def free_port(host: str, wanted: int | None) -> int:
    """A port that nothing listens on: the wanted one, else 5000, else any.

    Raises:
        InputError: if the wanted one cannot be had.
    """
    for port in (wanted,) if wanted is not None else (DEFAULT_PORT, 0):
        try:
            with socket.create_server((host, port)) as listener:
                return int(listener.getsockname()[1])
        except OSError as error:
            reason = error.strerror
    raise InputError(f"Expected a free port at {host} but {wanted} cannot be had ({reason}): choose another --port.")
