"""MLflow's server for one model, until Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path

from distil_rank.errors import InputError
from distil_rank.runs.interrupts import exit_on_signals, was_interrupted
from distil_rank.runs.ui import mlflow_server, wait_until_ready


def serve_model(model: str, tracking_uri: str, log: Path, host: str, port: int, example: str) -> None:
    """Answer requests; ends with Ctrl-C.

    Args:
        model: its address, `models:/<id>`.
        tracking_uri: where MLflow keeps it.
        log: what the server prints goes there.
        host: address to listen on.
        port: to listen on.
        example: of a request's body, to show.

    Raises:
        InputError: if the server does not start, or ends by itself.
    """
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    command = ["models", "serve", "--model-uri", model, "--env-manager", "local", "--host", host, "--port", str(port)]
    print("Starting the server ...", flush=True)
    env = {"MLFLOW_TRACKING_URI": tracking_uri}
    with exit_on_signals(signal.SIGTERM, signal.SIGHUP), mlflow_server(command, log, env) as server:
        try:
            wait_until_ready(server, address, log)
            print(f"{model} answers at {address}/invocations (Ctrl-C ends it), for example to:", flush=True)
            print(f"  curl {address}/invocations -H 'Content-Type: application/json' -d '{example}'", flush=True)
            server.wait()
        except (KeyboardInterrupt, SystemExit) as end:
            if not was_interrupted(end):
                raise
            print("\nThe server has ended.")
            return
    raise InputError(f"The server ended by itself; see {log}.")
