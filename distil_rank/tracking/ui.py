"""MLflow's user interface on the project's runs, until Ctrl-C."""

from __future__ import annotations

import socket
from itertools import chain
from operator import itemgetter
from pathlib import Path

from distil_rank.errors import InputError
from distil_rank.tracking.mlflow_server import http, run_server
from distil_rank.tracking.run_store import VIEW, default_tracking_uri, is_remote, without_credentials

DEFAULT_PORT = 5000


def serve_ui(root: Path = Path(), port: int | None = None, host: str = "127.0.0.1") -> None:
    """Show the runs in a browser; ends with Ctrl-C.

    Args:
        root: the project, whose `mlruns/` holds the runs.
        port: to listen on; 5000, or a free one where that is taken, if not given.
        host: address to listen on; 0.0.0.0 lets other machines in.

    Raises:
        InputError: if the port is taken, or the server does not start.
    """
    uri = default_tracking_uri(root)
    if is_remote(uri):
        print(f"MLFLOW_TRACKING_URI keeps the runs at {without_credentials(uri)}: open that in a browser.")
        return
    folder = root.resolve() / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(host, port)
    options = {"--backend-store-uri": uri, "--artifacts-destination": str(folder / "artifacts"), "--workers": "1"}
    command = ["server", *chain.from_iterable(options.items())]
    run_server("the MLflow UI", command, folder / "ui.log", host, port, _announce)


def _announce(address: str) -> None:
    print(f"MLflow UI at {address} (Ctrl-C ends it)")
    for name, page in run_lists(address):
        print(f"  {name:8} {page}", flush=True)


def run_lists(address: str) -> list[tuple[str, str]]:
    """Each of our experiments with the page of its runs, opened with the columns that matter."""
    answer = http.post(f"{address}/api/2.0/mlflow/experiments/search", json={"max_results": 1000}, timeout=30)
    return [
        (
            experiment["name"],
            f"{address}/#/experiments/{experiment['experiment_id']}/runs"
            f"?workflowType=machine_learning&viewStateShareKey={VIEW}",
        )
        for experiment in sorted(answer.json()["experiments"], key=itemgetter("name"))
        if f"mlflow.sharedViewState.{VIEW}" in {tag["key"] for tag in experiment.get("tags", ())}
    ]


def free_port(host: str, wanted: int | None) -> int:
    """A port that nothing listens on: the wanted one, else 5000, else any.

    Raises:
        InputError: if the wanted one cannot be had.
    """
    for port in (wanted,) if wanted is not None else (DEFAULT_PORT, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                return int(listener.getsockname()[1])
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or "ports go from 0 to 65535"
    raise InputError(f"Expected a free port at {host} but {wanted} cannot be had ({reason}): choose another --port.")
