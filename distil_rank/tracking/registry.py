"""Students as MLflow models: logged with their run, registered, the best of each kind marked as champion."""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import numpy as np
import torch
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import nn

from distil_rank.tracking.run import Run, rounded
from distil_rank.tracking.run_store import is_remote

REGISTERED_NAME = "distil-rank"
CHAMPION = "champion"


def log_student(
    run: Run,
    layer: nn.Module,
    example: np.ndarray,
    *,
    name: str = "student",
    metrics: Mapping[str, float] | None = None,
) -> str:
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
    with _logged_model(run, name) as (model_id, folder):
        _pytorch_flavour().save_model(
            layer,
            folder,
            mlflow_model=Model(run_id=run.id, model_id=model_id),
            signature=ModelSignature(inputs, outputs),
            input_example=rows,
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "torch", "numpy")],
            serialization_format="pt2",
        )
    now = int(time.time() * 1000)
    figures = [Metric(key, rounded(value), now, 0, model_id=model_id) for key, value in (metrics or {}).items()]
    run.client.log_batch(run.id, metrics=figures)
    return f"models:/{model_id}"


@contextmanager
def _logged_model(run: Run, name: str) -> Iterator[tuple[str, str]]:
    """A new model's id, and a folder to save it to; it is kept when the context ends."""
    params = run.client.get_run(run.id).data.params
    model = run.client.create_logged_model(run.experiment_id, name, source_run_id=run.id, params=params)
    with tempfile.TemporaryDirectory() as folder:
        yield model.model_id, f"{folder}/model"
        run.client.log_model_artifacts(model.model_id, f"{folder}/model")
    run.client.finalize_logged_model(model.model_id, "READY")
    run.client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])


def promote_champion(run: Run, model_uri: str, *, r2: float, rank: int, teacher: str, data: str) -> str:
    """Register a student; make it champion if no registered one of its kind has a higher held-out R².

    R² compares only at the same rank, on the same teacher and data. The best of each rank also has the
    alias `champion-rank-<rank>`; `champion` is the newest of them.

    Returns:
        Its address in the registry: `models:/distil-rank@champion`, or `models:/distil-rank/<version>`.
    """
    client = run.client
    if not client.search_registered_models(f"name = '{REGISTERED_NAME}'"):
        client.create_registered_model(REGISTERED_NAME, description="Low-rank students, by `distil-rank`.")
    kind = {"rank": str(rank), "teacher": teacher, "data": data}
    baselines = [
        float(other.tags["r2"])
        for other in client.search_model_versions(f"name = '{REGISTERED_NAME}'")
        if kind.items() <= other.tags.items()
    ]
    model_id = model_uri.removeprefix("models:/")
    local = not is_remote(run.tracking_uri)  # MLflow would look a local `models:/` up at its default address
    student = client.create_model_version(
        REGISTERED_NAME,
        client.get_logged_model(model_id).artifact_location if local else model_uri,
        run_id=run.id,
        tags={**kind, "r2": repr(float(r2))},
        model_id=model_id,
    )
    link = json.dumps([{"name": REGISTERED_NAME, "version": student.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    if r2 < max(baselines, default=-math.inf):
        return f"models:/{REGISTERED_NAME}/{student.version}"
    for alias in (CHAMPION, f"{CHAMPION}-rank-{rank}"):
        client.set_registered_model_alias(REGISTERED_NAME, alias, student.version)
    return f"models:/{REGISTERED_NAME}@{CHAMPION}"


def _pytorch_flavour() -> ModuleType:
    """`mlflow.pytorch`, kept from setting the root logger to show errors only, as its import does."""
    handler, root = logging.NullHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        return import_module("mlflow.pytorch")
    finally:
        root.removeHandler(handler)
