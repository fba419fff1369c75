"""MLflow's server for one model, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from distil_rank.runs.mlflow_server import run_server


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
    command = ["models", "serve", "--model-uri", model, "--env-manager", "local"]

    def announce(address: str) -> None:
        print(f"{model} answers at {address}/invocations (Ctrl-C ends it), for example to:", flush=True)
        print(f"  curl {address}/invocations -H 'Content-Type: application/json' -d '{example}'", flush=True)

    run_server("the server", command, log, host, port, announce, {"MLFLOW_TRACKING_URI": tracking_uri})
