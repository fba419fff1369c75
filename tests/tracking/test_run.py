import fcntl
import json
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.tracking.context import registry

from distil_rank.errors import InputError
from distil_rank.tracking import run as tracking
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import MODEL_TRAINING, RUN_LISTS, VIEW, default_tracking_uri


def client(root) -> MlflowClient:
    return MlflowClient(default_tracking_uri(root))


def test_a_run_keeps_what_it_is_given(project, tmp_path):
    (tmp_path / "figure.png").write_bytes(b"png")
    tags = {"teacher_run": "abc"}
    with start_run("distil", "random, rank 8", params={"rank": 8}, tags=tags, root=project) as run:
        run.log_params({"optimiser": {"lr": 0.1, "betas": (0.9, 0.999)}, **{f"p{i}": i for i in range(150)}})
        for step in range(3):
            run.log_metrics({"val/r2": step / 10}, step)
        run.log_metrics({"test/r2": 0.5})
        run.keep({"a": 1}, [tmp_path / "figure.png"], "**bold**")
        run.log_dataset(4, name="sample", digest="d" * 16, context="test", source="data/sample.arrow")
        assert client(project).get_run(run.id).info.status == "RUNNING"

    retained = client(project).get_run(run.id)
    assert (retained.info.status, retained.info.run_name) == ("FINISHED", "random, rank 8")
    assert retained.data.params["rank"] == "8"
    assert retained.data.params["optimiser.lr"] == "0.1"
    assert retained.data.params["p149"] == "149"
    assert retained.data.tags["teacher_run"] == "abc"
    assert retained.data.tags["version.torch"] == version("torch")
    assert retained.data.tags["mlflow.note.content"] == "**bold**"
    assert retained.data.metrics["test/r2"] == 0.5
    history = client(project).get_metric_history(run.id, "val/r2")
    assert [(value.step, value.value) for value in history] == [(step, step / 10) for step in range(3)]
    (dataset,) = retained.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("sample", "d" * 16)
    assert mlflow.data.get_source(dataset).to_dict() == {"uri": "data/sample.arrow"}
    folder = project / "mlruns" / "artifacts" / "distil" / run.id / "artifacts"
    assert (folder / "figure.png").read_bytes() == b"png"
    assert (folder / "config.yaml").read_text() == "a: 1\n"


def test_a_run_names_its_commit(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__])
    for provider in registry._run_context_provider_registry:  # MLflow looks once a process
        monkeypatch.setattr(provider, "_cache", {}, raising=False)
    with start_run("distil", "committed", params={}, tags={}, root=project) as run:
        pass
    tags = client(project).get_run(run.id).data.tags
    assert len(tags["mlflow.source.git.commit"]) == 40 and tags["mlflow.user"]


def test_children_are_nested_in_their_parent(project):
    with start_run("sweep", "ranks", params={}, tags={}, root=project) as parent:
        for rank in (4, 8):
            with start_run("sweep", f"rank {rank}", params={"rank": rank}, tags={}, parent=parent, root=project):
                pass
        assert client(project).get_run(parent.id).info.status == "RUNNING"
    nested = client(project).search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.id}'")
    assert {run.data.params["rank"] for run in nested} == {"4", "8"}


@pytest.mark.parametrize(
    ("launcher", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_launchers_say_which_process_is_the_first(monkeypatch, launcher, first):
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, rank in launcher.items():
        monkeypatch.setenv(variable, rank)
    assert (tracking.process_rank() == 0) == first


def test_only_the_first_process_of_a_distributed_command_keeps_its_run(project, monkeypatch):
    with monkeypatch.context() as second:
        second.setenv("LOCAL_RANK", "1")
        with start_run("embed", "on two devices", params={}, tags={}, root=project) as run:
            run.log_metrics({"proteins": 3})
            run.keep({"a": 1}, [], "")
    assert client(project).get_experiment_by_name("embed") is None
    assert {path.name for path in (project / "mlruns").iterdir()} == {"mlflow.db"}


def interrupted_as_lightning_does_it() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise SystemExit(1)  # noqa: B904


def leave(code: int) -> None:
    raise SystemExit(code)


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (interrupted_as_lightning_does_it, "KILLED", None),
        (lambda: leave(143), "KILLED", None),
        (lambda: leave(0), "FINISHED", None),
        (lambda: leave(1), "FAILED", "SystemExit: 1"),
        (lambda: fail(ValueError("singular\nmatrix")), "FAILED", "ValueError: singular"),
        (lambda: fail(InputError("Expected a rank.")), "FAILED", "Expected a rank."),
    ],
)
def test_how_a_run_ends_is_its_status(project, end, status, reason):
    with (
        pytest.raises((Exception, SystemExit)),
        start_run("distil", "ends early", params={}, tags={}, root=project) as run,
    ):
        end()
    retained = client(project).get_run(run.id)
    assert retained.info.status == status
    assert retained.data.tags.get("error") == reason


def test_a_note_links_to_the_runs_that_it_builds_on(project):
    with start_run("teacher", "random 8-d", params={}, tags={}, root=project) as made:
        pass
    tags = {"teacher_run": made.id, "embedding_run": "of another server"}
    with start_run("distil", "random r2", params={}, tags=tags, root=project) as run:
        run.note("**bold**")
    note = client(project).get_run(run.id).data.tags["mlflow.note.content"]
    page = f"#/experiments/{made.experiment_id}/runs/{made.id}?{MODEL_TRAINING}"
    assert note == f"Builds on teacher [random 8-d]({page}).\n\n**bold**"


@pytest.mark.parametrize("experiment", RUN_LISTS)
def test_an_experiment_is_described_and_has_its_columns(project, experiment):
    with start_run(experiment, "one", params={}, tags={}, root=project) as run:
        pass
    tags = client(project).get_experiment(run.experiment_id).tags
    assert tags["mlflow.note.content"]
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])
    assert set(view["columnWidths"]) == set(view["selectedColumns"])


def test_a_deleted_experiment_is_restored(project, caplog):
    for _ in range(2):
        with start_run("distil", "one", params={}, tags={}, root=project) as run:
            pass
        client(project).delete_experiment(run.experiment_id)
    assert "was deleted" in caplog.text


def test_a_database_that_was_moved_is_said_to_be(project, caplog):
    with start_run("distil", "one", params={}, tags={}, root=project):
        pass
    client(project)._tracking_client.store.engine.dispose()
    (project / "mlruns" / "mlflow.db").rename(project / "mlruns" / "moved.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlruns' / 'moved.db'}")
        with start_run("distil", "two", params={}, tags={}, root=project):
            assert not caplog.records
        (project / "mlruns" / "other").mkdir()
        (project / "mlruns" / "moved.db").rename(project / "mlruns" / "other" / "moved.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlruns' / 'other' / 'moved.db'}")
        with start_run("distil", "three", params={}, tags={}, root=project):
            pass
    assert f"not to {project / 'mlruns' / 'other' / 'artifacts' / 'distil'}" in caplog.text


def test_mlflow_is_silent_and_its_process_wide_state_stays(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    with start_run("distil", "on a new database", params={}, tags={}, root=tmp_path):
        assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")
    assert mlflow.get_tracking_uri() == before
    assert default_tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_an_address_that_mlflow_refuses_is_an_input_error(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{project / 'mlruns'}")
    with pytest.raises(InputError) as refused, start_run("distil", "x", params={}, tags={}, root=project):
        pass
    assert "\n" not in str(refused.value) and "file:" in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (
            "postgresql://me:secret@localhost/db",
            "at postgresql://localhost/db but got: ModuleNotFoundError: .*install it",
        ),
        ("postgresql://h/db?user=me&password=secret", r"db\?user=me&password=\*\*\* but got: ModuleNotFoundError"),
        ("foo://me:se/c@secret@host", "unsupported URI 'foo://host'"),
        ("me:secret@host", "at host but got"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_without_its_password(project, monkeypatch, caplog, uri, shown):
    caplog.set_level(logging.DEBUG, "distil_rank")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=shown) as refused, start_run("embed", "x", params={}, tags={}, root=project):
        pass
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value) + caplog.text


def test_the_reason_of_a_failure_is_kept_without_a_password(project):
    with (
        pytest.raises(ValueError, match="secret"),
        start_run("distil", "x", params={}, tags={}, root=project) as run,
    ):
        raise ValueError("no answer of https://me:secret@host/db")
    assert client(project).get_run(run.id).data.tags["error"] == "ValueError: no answer of https://host/db"
    assert str(run.tracking_uri) not in repr(run)


def test_no_server_there(project, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(InputError, match="there is no connection") as refused:
            tracking.connect(default_tracking_uri())
    assert "secret" not in str(refused.value)


def test_a_server_that_keeps_silent(project, monkeypatch):
    monkeypatch.setattr(tracking, "CONNECT_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="no answer in time"):
            tracking.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_gateway_without_a_server_behind_it(project):
    class BadGateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(502)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), BadGateway) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(InputError, match="HTTP 502"):
            tracking.connect(f"http://127.0.0.1:{server.server_port}")


def test_a_server_lost_in_the_middle_does_not_hide_what_ended_the_run(project, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    def lost(*_: object) -> None:
        raise mlflow.MlflowException("connection lost")

    with (
        pytest.raises(ZeroDivisionError),
        start_run("distil", "unlucky", params={}, tags={}, root=project),
    ):
        monkeypatch.setattr(MlflowClient, "set_terminated", lost)
        _ = 1 / 0
    assert "connection lost" in caplog.text


def test_the_database_is_made_by_one_process_at_a_time(project):
    def run():
        with start_run("embed", "one", params={}, tags={}, root=project):
            pass

    other = threading.Thread(target=run)
    with (project / "mlruns" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert client(project).get_experiment_by_name("embed") is None
    other.join(60)
    assert client(project).get_experiment_by_name("embed") is not None


def test_a_folder_for_runs_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").touch()
    with (
        pytest.raises(
            InputError, match=r"folder that can be written for runs at .*mlruns but got: .*; work in another"
        ),
        start_run("embed", "one", params={}, tags={}, root=tmp_path),
    ):
        pass


def test_a_damaged_database_is_one_line(project):
    (project / "mlruns" / "mlflow.db").write_bytes(b"no database" * 500)
    with (
        pytest.raises(InputError, match=r"Expected MLflow to keep runs at .* but got: .*not a database"),
        start_run("embed", "one", params={}, tags={}, root=project),
    ):
        pass
