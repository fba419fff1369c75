"""What training leaves in MLflow: Lightning's metrics, and students as registered models."""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, Schema, TensorSpec
from torch import nn

from distil_rank.tracking.run import Run, rounded
from distil_rank.tracking.run_store import is_remote

REGISTERED_NAME = "distil-rank"


class RunLogger(MLFlowLogger):
    """Log a `Trainer`'s metrics into a run of `start_run`, which alone decides how the run ends.

    Metrics are sent in the background (one call takes as long as several steps of a small student), and waited for
    when the fit ends, however it ends: only SIGKILL loses some. Hyper-parameters are the run's own parameters.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.experiment, tracking_uri=run.tracking_uri, run_id=run.id, synchronous=False)
        self._mlflow_client = run.client

    @property
    def experiment(self) -> mlflow.MlflowClient:
        """The run's client. Lightning's own property would also set the process's MLFLOW_TRACKING_URI, for good."""
        return self._mlflow_client

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the command has recorded them."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Wait for what was sent. The run stays open: it may hold several fits, and what follows them."""
        self._mlflow_client._tracking_client.store.flush_async_logging()  # mlflow's own function takes another address


def log_student(run: Run, layer: nn.Module, example: np.ndarray, metrics: Mapping[str, float] | None = None) -> str:
    """Keep a layer with its run, as a model that loads and serves without this package.

    It is stored as an exported graph, not pickled, and takes any number of rows.

    Args:
        layer: maps `(N, n)` to `(N, m)`, float32.
        example: some input rows, `(N, n)`.
        metrics: figures to show beside it in the list of models.

    Returns:
        The model's address, `models:/<id>`, for `mlflow.pyfunc.load_model` and `mlflow models serve`.
    """
    layer = copy.deepcopy(layer).cpu().float().eval()
    rows = np.resize(example, (max(2, len(example)), example.shape[1])).astype(np.float32)  # one row: a fixed batch
    with torch.inference_mode():
        width = layer(torch.from_numpy(rows)).shape[1]
    inputs, outputs = (Schema([TensorSpec(np.dtype(np.float32), (-1, size))]) for size in (rows.shape[1], width))
    with _logged_model(run, "student", metrics or {}) as (path, model):
        mlflow.pytorch.save_model(
            layer,
            path,
            mlflow_model=model,
            signature=ModelSignature(inputs, outputs),
            input_example=rows,
            pip_requirements=_requirements("mlflow", "torch", "numpy"),
            serialization_format="pt2",
        )
    return f"models:/{model.model_id}"


class ServedPredictor(PythonModel):
    """A predictor behind MLflow: a column `sequence` in, a line for each protein out.

    Args:
        predict: from the predictor's folder and sequences to one record of plain values a protein.
    """

    def __init__(self, predict: Callable[[str, list[str]], list[dict[str, Any]]]) -> None:
        self.function = predict

    def load_context(self, context: Any) -> None:
        """Remember where the predictor lies."""
        self.folder = str(context.artifacts["predictor"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predictions in the order of the sequences."""
        return pd.DataFrame(self.function(self.folder, [str(one) for one in model_input["sequence"]]))


def log_predictor(run: Run, folder: Path, code: str, example: list[str], metrics: Mapping[str, float]) -> str:
    """Keep a predictor with its run, as a model from sequences to predictions; returns its address, `models:/<id>`.

    Args:
        folder: of the predictor.
        code: a Python file that sets a `ServedPredictor`, which MLflow runs to load the model: nothing is pickled.
        example: some sequences.
        metrics: figures to show beside it.
    """
    with _logged_model(run, "predictor", metrics) as (path, model):
        script = Path(path).with_name("served.py")
        script.write_text(code)
        mlflow.pyfunc.save_model(
            path,
            python_model=str(script),
            artifacts={"predictor": str(folder.resolve())},
            mlflow_model=model,
            signature=ModelSignature(Schema([ColSpec("string", "sequence")])),
            input_example=pd.DataFrame({"sequence": example}),
            pip_requirements=_requirements("distil-rank", "mlflow", "torch"),
        )
    return f"models:/{model.model_id}"


@contextmanager
def _logged_model(run: Run, name: str, metrics: Mapping[str, float]) -> Iterator[tuple[str, Model]]:
    """A place to save a model in, and what MLflow calls it; then it is a ready output of the run, with its figures."""
    client, params = run.client, run.client.get_run(run.id).data.params
    model_id = client.create_logged_model(run.experiment_id, name, source_run_id=run.id, params=params).model_id
    with tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/model", Model(run_id=run.id, model_id=model_id)
        client.log_model_artifacts(model_id, f"{folder}/model")
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(model_id, step=0)])
    now = int(time.time() * 1000)
    figures = [Metric(key, rounded(value), now, 0, model_id=model_id) for key, value in metrics.items()]
    client.log_batch(run.id, metrics=figures)


def _requirements(*packages: str) -> list[str]:
    return [f"{package}=={version(package)}" for package in packages]


def register_student(run: Run, model_uri: str, tags: Mapping[str, object]) -> str:
    """Register a student with tags to choose by; returns its address in the registry, `models:/distil-rank/<version>`.

    R² compares only at the same rank, on the same teacher and data.
    """
    client, model_id = run.client, model_uri.removeprefix("models:/")
    if not client.search_registered_models(f"name = '{REGISTERED_NAME}'"):
        client.create_registered_model(REGISTERED_NAME, description="Low-rank students, by `distil-rank`.")
    local = not is_remote(run.tracking_uri)  # MLflow would look a local `models:/` up at its default address
    student = client.create_model_version(
        REGISTERED_NAME,
        client.get_logged_model(model_id).artifact_location if local else model_uri,
        run_id=run.id,
        tags={name: str(value) for name, value in tags.items()},
        model_id=model_id,
    )
    link = json.dumps([{"name": REGISTERED_NAME, "version": student.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return f"models:/{REGISTERED_NAME}/{student.version}"
