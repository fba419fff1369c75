"""A student, a code map or a backbone as an MLflow model that a server answers from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from distil_rank.codes.code_store import MAP
from distil_rank.deployment.artefact import MANIFEST, Student, load
from distil_rank.lowrank.code_map import CodeMap
from distil_rank.runs.model_server import serve_model
from distil_rank.runs.registry import log_script, log_student
from distil_rank.runs.tracking import start_run
from distil_rank.runs.ui import free_port
from distil_rank.serving import predictor
from distil_rank.serving.predictor import Predictor, is_backbone, recipe_of

SCRIPT = Path(predictor.__file__).with_name("mlflow_model.py")
EXAMPLE = "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMF"  # how human haemoglobin alpha begins


def serve(
    model: str,
    backbone: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    output: str = "results",
) -> None:
    """Log a student, a code map or a backbone as an MLflow model, and answer requests until Ctrl-C.

    Args:
        model: Folder of a student or a code map, as `save` or `code` writes it, of a store of codes, or of a backbone
            that was shortened or saved in int8.
        backbone: Of the vectors that a code map takes, where it does not name one.
        precision: Of a backbone; auto is int8 for one that was saved in it, fp32 for others.
        host: Address to listen on; 0.0.0.0 lets other machines in, without a password.
        port: To listen on; 5000, or a free one where that is taken.
        output: Folder for the server's log.

    Raises:
        InputError: the port is taken, or the model cannot be loaded.
    """
    port = free_port(host, port)
    served = log_model(Path(model), backbone, precision)
    Path(output).mkdir(parents=True, exist_ok=True)
    serve_model(served.uri, served.tracking_uri, Path(output).absolute() / "serve.log", host, port, served.example)


@dataclass(frozen=True)
class Served:
    """A model that MLflow keeps.

    Attributes:
        uri: Its address, `models:/<id>`.
        tracking_uri: Where MLflow keeps it.
        example: Body of a request.
    """

    uri: str
    tracking_uri: str
    example: str


def log_model(folder: Path, backbone: str | None = None, precision: str = "auto") -> Served:
    """Log a student, a code map or a backbone with an MLflow run; for the arguments see `serve`.

    Raises:
        InputError: it cannot be loaded.
    """
    if (folder / MAP / MANIFEST).exists():
        folder = folder / MAP
    layer = None if is_backbone(folder) else load(folder)
    with start_run("serve", folder.absolute().name, params={"model": str(folder)}, tags={}) as run:
        if layer is None or isinstance(layer, CodeMap):
            recipe = recipe_of(folder, backbone, precision)
            answer = Predictor.load(recipe, folder)([EXAMPLE])  # what cannot answer is not logged
            uri = log_script(run, "model", SCRIPT, folder, asdict(recipe), answer)
            return Served(uri, run.tracking_uri, f'{{"dataframe_records": [{{"sequence": "{EXAMPLE}"}}]}}')
        assert isinstance(layer, Student)
        uri = log_student(run, layer, torch.randn(2, layer.in_features).numpy())
        return Served(uri, run.tracking_uri, f'{{"inputs": [[{", ".join(["0.1"] * layer.in_features)}]]}}')
