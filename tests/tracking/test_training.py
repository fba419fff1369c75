import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import torch
from mlflow import MlflowClient
from servers import mlflow_process
from torch import nn

from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import default_tracking_uri
from distil_rank.tracking.training import log_student, register_student


@pytest.fixture
def layer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 3, bias=False), nn.Linear(3, 7))


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)


def answers(layer: nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return layer(torch.from_numpy(rows)).numpy()


@pytest.fixture
def without_this_package(tmp_path) -> dict[str, str]:
    """An environment in which importing `distil_rank` fails."""
    (tmp_path / "distil_rank.py").write_text("raise ImportError('distil_rank is not installed here')")
    environment = {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import distil_rank"]
    absent = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"not installed here" in absent.stderr
    return environment


@pytest.mark.parametrize("given", [1, 4])
def test_a_student_takes_any_number_of_rows_whatever_its_example_had(project, layer, rows, given):
    with start_run("distil", "one", params={"rank": 3}, tags={}, root=project) as run:
        uri = log_student(run, layer, rows[:given], metrics={"test/r2": 0.5})
    model = run.client.get_logged_model(uri.removeprefix("models:/"))
    loaded = mlflow.pyfunc.load_model(model.artifact_location)
    for count in (1, 2, 5):
        np.testing.assert_allclose(loaded.predict(rows[:count]), answers(layer, rows[:count]), atol=1e-6)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 12)
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, 7)
    assert loaded.input_example.shape == (max(2, given), 12)
    assert model.artifact_location.startswith(str(project / "mlruns" / "artifacts" / "distil"))
    assert (model.status, model.source_run_id, model.params["rank"]) == ("READY", run.id, "3")
    assert [(metric.key, metric.value) for metric in model.metrics] == [("test/r2", 0.5)]
    outputs = run.client.get_run(run.id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]


def test_logging_a_student_leaves_it_as_it_was(project, layer, rows):
    layer.double().train()
    with start_run("distil", "one", params={}, tags={}, root=project) as run:
        log_student(run, layer, rows)
    assert layer.training and layer[0].weight.dtype == torch.float64


def test_a_registered_student_can_be_chosen_by_its_tags(project, layer, rows):
    with start_run("distil", "one", params={}, tags={}, root=project) as run:
        uri = log_student(run, layer, rows)
        places = [register_student(run, uri, {"r2": r2, "rank": 8}) for r2 in (0.5, 0.4)]
    assert places == ["models:/distil-rank/1", "models:/distil-rank/2"]
    versions = run.client.search_model_versions("name = 'distil-rank'")
    assert max(versions, key=lambda one: float(one.tags["r2"])).version == 1 and versions[0].tags["rank"] == "8"


@pytest.mark.slow
def test_a_student_answers_over_http_without_this_package(project, layer, rows, without_this_package, tmp_path):
    with start_run("distil", "one", params={}, tags={}, root=project) as run:
        uri = register_student(run, log_student(run, layer, rows), {"r2": 0.5})
    arguments = ("models", "serve", "--model-uri", uri, "--env-manager", "local")
    environment = {**without_this_package, "MLFLOW_TRACKING_URI": default_tracking_uri(project)}
    with mlflow_process(*arguments, folder=tmp_path, env=environment, path="/ping") as address:
        for count in (1, 5):
            reply = requests.post(f"{address}/invocations", json={"inputs": rows[:count].tolist()}, timeout=60)
            assert reply.ok, reply.text
            np.testing.assert_allclose(reply.json()["predictions"], answers(layer, rows[:count]), atol=1e-5)
        refused = requests.post(f"{address}/invocations", json={"inputs": rows[:, :5].tolist()}, timeout=60)
        assert refused.status_code == 400


@pytest.mark.slow
def test_a_remote_server_keeps_everything(tmp_path, layer, rows, monkeypatch):
    (tmp_path / "server").mkdir()
    storage = ("--backend-store-uri", "sqlite:///runs.db", "--artifacts-destination", "artifacts", "--workers", "1")
    with mlflow_process("server", *storage, folder=tmp_path / "server", env={}) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        (tmp_path / "project").mkdir()
        with start_run("distil", "remote", params={"rank": 3}, tags={}, root=tmp_path / "project") as run:
            run.log_metrics({"test/r2": 0.5})
            run.keep({"a": 1}, [], "")
            run.log_dataset(12, name="sample", digest="d" * 64, context="test", source="data")
            uri = register_student(run, log_student(run, layer, rows), {"r2": 0.5})
        client = MlflowClient(address)
        retained = client.get_run(run.id)
        assert (retained.info.status, retained.data.metrics["test/r2"]) == ("FINISHED", 0.5)
        assert uri == "models:/distil-rank/1"
        version = client.get_model_version("distil-rank", "1")
        assert version.run_id == run.id
        place = client.download_artifacts(run.id, "config.yaml", str(tmp_path))
        assert Path(place).read_text() == "a: 1\n"
        assert not list((tmp_path / "project").iterdir())
