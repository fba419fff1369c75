"""Runs in MLflow. Only this room knows MLflow.

Runs go to a sqlite database under `mlruns/`, their artifacts beside it, or wherever `MLFLOW_TRACKING_URI` points.
All calls go through our own client: MLflow's current run, tracking address and environment stay untouched.
"""

import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import requests
import yaml
from filelock import FileLock
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import Schema, TensorSpec
from sqlalchemy.exc import SQLAlchemyError

from distil_rank.errors import InputError
from distil_rank.tracking.run_store import (
    MODEL_TRAINING,
    RUN_LISTS,
    VIEW,
    artifact_location,
    default_tracking_uri,
    exit_on_signals,
    list_view,
    versions,
    was_interrupted,
    without_credentials,
)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
set_telemetry_client()  # it read the environment when MLflow was imported

for _logger in ("alembic", "mlflow"):  # such as "Creating initial MLflow database tables..."
    logging.getLogger(_logger).setLevel(logging.WARNING)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds in which a remote server has to answer


@dataclass(frozen=True)
class Run:
    """One open MLflow run, made by `start_run`; its `client` is for whatever is not offered here."""

    id: str
    experiment: str
    experiment_id: str
    tracking_uri: str = field(repr=False)  # it may hold a password
    client: mlflow.MlflowClient = field(repr=False)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record parameters, each once; nested mappings become dotted names."""
        self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in _flatten(params).items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record one value of each metric, to five significant digits."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, rounded(value), now, step) for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags; a tag that is there is replaced."""
        self.client.log_batch(self.id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def note(self, markdown: str) -> None:
        """Describe the run, in Markdown, on its page, after links to the runs that this one builds on.

        Those are the runs that its tags `<what>_run` name. MLflow cuts what exceeds its limit.
        """
        links = []
        for tag, other in self.client.get_run(self.id).data.tags.items():
            if tag.endswith("_run"):
                with suppress(MlflowException):  # another server's run, or one deleted for good
                    info = self.client.get_run(other).info
                    page = f"#/experiments/{info.experiment_id}/runs/{other}?{MODEL_TRAINING}"
                    links.append(f"{tag.removesuffix('_run')} [{info.run_name}]({page})")
        if links:
            markdown = f"Builds on {', '.join(links)}.\n\n{markdown}"
        self.set_tags({"mlflow.note.content": markdown})

    def log_artifact(self, path: Path) -> None:
        """Keep a file with the run."""
        self.client.log_artifact(self.id, str(path))

    def keep(self, options: Any, files: Iterable[Path], markdown: str) -> None:
        """Keep what each command leaves: its options, as `config.yaml`, its files and its note."""
        config = options if isinstance(options, Mapping) else asdict(options)
        self.client.log_text(self.id, yaml.safe_dump(config), "config.yaml")
        for path in files:
            self.log_artifact(path)
        self.note(markdown)

    def log_dataset(self, width: int, *, name: str, digest: str, context: str, source: str) -> None:
        """Record the rows that went in, `(N, width)`, by name, digest and location; not the rows themselves.

        A server takes 36 characters of the digest.
        """
        origin = get_dataset_source_from_json(json.dumps({"uri": source}), "local")
        schema = Schema([TensorSpec(np.dtype(np.float32), (-1, width))])
        dataset = MetaDataset(origin, name=name, digest=digest[:36], schema=schema)  # type: ignore[abstract]
        context_tag = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.id, [DatasetInput(dataset._to_mlflow_entity(), context_tag)])


def rounded(value: float) -> float:
    """To five significant digits, which MLflow's lists have room for; whole numbers stay as they are.

    >>> rounded(0.90435127), rounded(41.66666), rounded(1234567)
    (0.90435, 41.667, 1234567.0)
    """
    return float(value) if float(value).is_integer() else float(f"{value:.5g}")


@contextmanager
def start_run(
    experiment: str,
    name: str,
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    parent: Run | None = None,
    root: Path = Path(),
) -> Iterator[Run]:
    """Open a run; it ends FINISHED, FAILED with the reason in the tag `error`, or KILLED (Ctrl-C, SIGTERM, SIGHUP).

    Of the processes of a distributed command the first one's run is kept; the others' are deleted when they end.

    Runs are kept under `root/mlruns` unless `MLFLOW_TRACKING_URI` says otherwise; `experiment` is one of
    `run_store.RUN_LISTS`, or a new name.

    Raises:
        InputError: if the tracking server does not answer, or MLflow refuses the place.
    """
    own = {f"version.{package}": number for package, number in versions().items()}
    own |= {"mlflow.parentRunId": parent.id} if parent else {}
    with ExitStack() as stack:
        tracking_uri = default_tracking_uri(root)
        if process_rank() > 0:
            tracking_uri = f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/mlflow.db"
        try:
            with exclusive_lock(tracking_uri):
                client = connect(tracking_uri)
                experiment_id = _experiment_id(client, experiment, artifact_location(tracking_uri, root, experiment))
            created = client.create_run(experiment_id, run_name=name, tags={**own, **resolve_tags(), **tags})
        except (MlflowException, SQLAlchemyError, ImportError) as error:  # the last: a database's driver
            raise InputError(
                f"Expected MLflow to keep runs at {without_credentials(tracking_uri)} but got: {_first_line(error)}; "
                f"{'install it, or ' * isinstance(error, ImportError)}set another MLFLOW_TRACKING_URI, or none."
            ) from error
        run = Run(created.info.run_id, experiment, experiment_id, tracking_uri, client)
        with _final_status(run), exit_on_signals(signal.SIGTERM, signal.SIGHUP):
            run.log_params(params)
            yield run


@contextmanager
def exclusive_lock(tracking_uri: str) -> Iterator[None]:
    """Hold a lock, so that no two processes create the same local database or experiment at once.

    Raises:
        InputError: if the database's folder cannot be written.
    """
    if not tracking_uri.startswith("sqlite:///"):
        yield
        return
    folder = Path(tracking_uri.removeprefix("sqlite:///")).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise InputError(
            f"Expected a folder that can be written for runs at {folder} but got: {error.strerror}; work in another "
            "folder, or set MLFLOW_TRACKING_URI."
        ) from error


def connect(tracking_uri: str) -> mlflow.MlflowClient:
    """A client for the runs at an address.

    Raises:
        InputError: if a remote server does not answer within five seconds (MLflow itself would try for minutes).
    """
    if tracking_uri.startswith("http"):
        try:
            answer = requests.get(f"{tracking_uri.rstrip('/')}/health", timeout=CONNECT_TIMEOUT)
            reason = f"HTTP {answer.status_code}" if answer.status_code >= 500 else None
        except requests.exceptions.SSLError:
            reason = None  # it answers; MLflow's settings decide about its certificate
        except requests.RequestException as error:
            reason = "no answer in time" if isinstance(error, requests.Timeout) else "no connection"
        if reason:
            raise InputError(
                f"Expected an MLflow server at {without_credentials(tracking_uri)} but there is {reason}: start it, "
                "or unset MLFLOW_TRACKING_URI to keep runs under mlruns/."
            )
    return mlflow.MlflowClient(tracking_uri)


@contextmanager
def _final_status(run: Run) -> Iterator[None]:
    """Set the run's status when the block ends: FINISHED, KILLED or FAILED."""
    status, tags = "FINISHED", {}
    try:
        yield
    except BaseException as error:
        exited = isinstance(error, SystemExit) and not error.code
        status = "KILLED" if was_interrupted(error) else "FINISHED" if exited else "FAILED"
        tags = {"error": _first_line(error)} if status == "FAILED" else {}
        raise
    finally:
        try:
            run.set_tags(tags)
            run.client.set_terminated(run.id, status)
        except MlflowException as error:  # which must not hide what ended the run
            log.warning("MLflow did not record the run's end: %s", _first_line(error))


def _experiment_id(client: mlflow.MlflowClient, name: str, location: str | None) -> str:
    """The experiment's id; created, tags and given its columns if need be."""
    entry = client.get_experiment_by_name(name)
    if entry is None:
        entry = client.get_experiment(client.create_experiment(name, artifact_location=location))
    elif entry.lifecycle_stage == "deleted":
        log.warning("Experiment %s was deleted in MLflow; it is restored for the new run.", name)
        client.restore_experiment(entry.experiment_id)
    if location is not None and entry.artifact_location != location:
        log.warning(
            "Artifacts of experiment %s go to %s, where its database was made, not to %s.",
            *(name, entry.artifact_location, location),
        )
    tags = {"mlflow.experimentKind": "custom_model_development"}  # the user interface then shows runs, not traces
    if name in RUN_LISTS:
        tags["mlflow.note.content"], columns = RUN_LISTS[name]
        tags[f"mlflow.sharedViewState.{VIEW}"] = list_view(columns)
    for key, value in tags.items():
        if entry.tags.get(key) != value:
            client.set_experiment_tag(entry.experiment_id, key, value)
    return entry.experiment_id


def process_rank() -> int:
    """The rank of this process in a distributed command, as its launcher (Lightning, torchrun, SLURM) sets it."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank), 0))


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted names.

    >>> _flatten({"optimiser": {"lr": 0.1}, "rank": 64})
    {'optimiser.lr': 0.1, 'rank': 64}
    """
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _first_line(error: BaseException) -> str:
    """The first line of an error's message without passwords, after its type unless the message stands alone."""
    line = (without_credentials(str(error)).strip().splitlines() or [""])[0]
    return line if isinstance(error, (InputError, MlflowException)) else f"{type(error).__name__}: {line}"
