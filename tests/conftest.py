"""What several test files share: a tiny ESM-2 as each kind of checkpoint, and a project with an empty run database."""

import argparse
import functools
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.model.esm2 import ESM2
from hypothesis import settings
from servers import s3_process

from distil_rank.data import mmseqs
from distil_rank.data.files import load_matrix
from distil_rank.embedding import precision
from distil_rank.embedding.int8.quantisation import Int8Linear, has_int8_units
from tests.esm2_files import hugging_face_folder

LAYERS, DIM, HEADS = 2, 32, 4

settings.register_profile("no deadline", deadline=None)  # a busy machine fails no test
settings.load_profile("no deadline")


@dataclass(frozen=True)
class TinyEsm2:
    """The model and the files that hold its weights."""

    model: ESM2
    fair_esm: Path  # a .pt file
    safetensors: Path  # a Hugging Face folder
    bin: Path  # another


@pytest.fixture(autouse=True)
def log_levels() -> None:
    """Undo what a command that an earlier test ran in this process set, so that `caplog` sees all it should."""
    logging.getLogger("distil_rank").setLevel(logging.NOTSET)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def tracking_address() -> Iterator[None]:
    """Undo what Lightning's own MLFlowLogger sets for the whole process, and for commands of later tests."""
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session", autouse=True)
def clusters_once() -> Iterator[Callable]:
    """MMseqs2 takes six seconds for few proteins as for many, and tests cluster the same; yields what does."""
    real = mmseqs._run_mmseqs
    run = functools.cache(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmseqs, "_run_mmseqs", lambda binary, sequences: list(run(binary, tuple(sequences))))
        yield real


@pytest.fixture(scope="module")
def int8_units() -> Iterator[None]:
    """Int8 on every processor: without units for it, whose sums could saturate, products are float64's, exact too."""

    def prepare(self: Int8Linear, weight, scales, zero_point, dtype=torch.float32) -> None:
        self.weight, self.scales, self.zero_point, self.dtype = weight.double(), scales, zero_point, dtype

    def product(self: Int8Linear, values: torch.Tensor) -> torch.Tensor:
        return ((values.double() - self.zero_point) @ self.weight.T * self.scales).to(self.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if not has_int8_units():
            patch.setattr(precision, "has_int8_units", lambda: True)
            patch.setattr(Int8Linear, "__init__", prepare)
            patch.setattr(Int8Linear, "__call__", product)
        yield


@pytest.fixture(scope="session")
def tiny_esm2(tmp_path_factory: pytest.TempPathFactory) -> TinyEsm2:
    """ESM-2 of 2 layers, 32 wide, with 4 heads."""
    folder = tmp_path_factory.mktemp("tiny_esm2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ESM2(LAYERS, DIM, HEADS).eval()
        for parameter in model.parameters():  # fresh layer norms and biases would hide a mix-up
            parameter.data += 0.2 * torch.randn_like(parameter)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    fair_esm = folder / "esm2_tiny.pt"
    config = argparse.Namespace(
        encoder_layers=LAYERS, encoder_embed_dim=DIM, encoder_attention_heads=HEADS, token_dropout=True
    )
    prefixed = {f"encoder.sentence_encoder.{key}": value for key, value in state.items() if "lm_head" not in key}
    prefixed |= {f"encoder.{key}": value for key, value in state.items() if "lm_head" in key}
    torch.save({"cfg": {"model": config}, "model": prefixed}, fair_esm)

    for name in ("safetensors", "bin"):
        hugging_face_folder(model, folder / name, pickled=name == "bin")
    return TinyEsm2(model, fair_esm, folder / "safetensors", folder / "bin")


@pytest.fixture(scope="session")
def slice_of_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 of the sample's proteins with 32 of their dimensions, and a label each, as `.npz`."""
    sample = load_matrix(Path(__file__).parents[1] / "data" / "sample")
    path = tmp_path_factory.mktemp("slice") / "proteins.npz"
    assert sample.sequences is not None
    sequences = np.array(sample.sequences[:240])
    labels = np.array(["long" if len(sequence) > 150 else "short" for sequence in sequences])
    ids = np.array(sample.ids[:240])
    np.savez(path, embeddings=sample.x[:240, :32], ids=ids, sequences=sequences, labels=labels)
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without runs; making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server that speaks S3, with a bucket `proteins`; yields the environment variables that lead to it."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    with s3_process(tmp_path_factory.mktemp("s3")) as address:
        env = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        env |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket="proteins")
        yield env


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty place in S3, `s3://proteins/...`, that this process can reach."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://proteins/{request.node.name}"


@pytest.fixture(scope="session")
def forks():
    """Starts processes as forks of one that has loaded torch, within milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distil_rank.embedding.run"])
    return context


@pytest.fixture
def workplace(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a run database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project's root with an empty `mlruns/`; whatever a test leaves in the working directory fails it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, here = tmp_path / "my project #1", tmp_path / "here"
    (root / "mlruns").mkdir(parents=True)
    shutil.copy(empty_database, root / "mlruns")
    here.mkdir()
    monkeypatch.chdir(here)
    yield root
    assert not list(here.iterdir())
    assert {path.name for path in root.iterdir()} == {"mlruns"}
