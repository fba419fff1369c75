"""The `serve` command: MLflow's own server answers as the library does, and what cannot be served is one line."""

import random
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import torch
from servers import mlflow_process

from distil_rank import load, save
from distil_rank.cli import main
from distil_rank.codes.code_store import write_code_map
from distil_rank.codes.fitting import fit_metric
from distil_rank.commands.serving import log_model
from distil_rank.embedding import agreement
from distil_rank.embedding.embed import embed
from distil_rank.embedding.quantise import quantise
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.serving.predictor import Predictor, recipe_of

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
# What runs in a shell's background inherits Ctrl-C ignored, and would never hear the one that a test sends.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from distil_rank.cli import main; sys.exit(main())"
)


@pytest.fixture
def models(workplace, tiny_esm2):
    """A store of 300 proteins, and in folders: a code map in a store of codes, a shortened backbone, a student."""
    dice = random.Random(0)
    records = [f">p{i}\n{''.join(dice.choices(ALPHABET, k=dice.randint(20, 40)))}\n" for i in range(300)]
    Path("in.fasta").write_text("".join(records))
    backbone = str(tiny_esm2.fair_esm)
    embed("in.fasta", "states", backbone, layer="1,1n,2", precision="fp32")
    store = Store.open("states:2")
    about = {"weights_sha256": store.manifest["weights_sha256"], "layer": 2, "pooling": "mean", "backbone": backbone}
    x = store.embeddings()
    code_map = fit_metric(x, np.ones(len(x), bool), "whitened", provenance=about).code_map(8, "bit")
    write_code_map(code_map, "codes", data=about)
    shorten = ["--layer", "1", "--data", "states", "--split", "exact", "--copies", "0"]
    assert main(["-q", "shorten", "--backbone", backbone, *shorten]) == 0
    embed("in.fasta", "short", "shortened", precision="fp32")
    torch.manual_seed(0)
    save(LowRankLinear(32, 12, rank=4), "student")
    return workplace


def check_answers(address: str, sequences: list[str], expected: np.ndarray) -> None:
    """The answers of a server, and how it refuses."""

    def ask(*texts: str) -> requests.Response:
        return requests.post(address, json={"dataframe_records": [{"sequence": text} for text in texts]}, timeout=60)

    reply = ask(*sequences)
    assert reply.ok, reply.text
    np.testing.assert_allclose(reply.json()["predictions"], expected, rtol=1e-4, atol=1e-5)
    for wrong, told in (("MK1O2?", "'?'"), (" ", "number 1 has none")):
        refused = ask(wrong)
        assert refused.status_code == 400 and told in refused.json()["message"], refused.text
    assert requests.post(address, json={"inputs": [["no"]]}, timeout=60).status_code == 400


@pytest.mark.slow
def test_servers_answer_as_the_library_does(models):
    """Codes by the command, a shortened backbone by MLflow's own; a student's server is in runs/test_registry.py."""
    store = Store.open("states:2")
    x, sequences = torch.tensor(store.embeddings()[:20]), store.sequences[:20]
    codes = load("codes/code_map").encode(x).numpy()
    command = [sys.executable, "-c", PROGRAM, "serve", "--model", "codes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    try:
        short = log_model(Path("shortened"))
        serving = ("models", "serve", "--env-manager", "local", "--model-uri", short.uri)
        where = {"MLFLOW_TRACKING_URI": short.tracking_uri}
        with mlflow_process(*serving, folder=models, env=where, path="/ping") as address:
            check_answers(f"{address}/invocations", sequences, Store.open("short").embeddings()[:20])
        for line in process.stdout:
            said += line
            if found := re.search(r"curl (http://\S+/invocations)", line):
                check_answers(found[1], sequences, codes)
                break
    finally:
        process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "The server has ended." in said, said
    with pytest.MonkeyPatch.context() as patch:
        student = log_model(Path("student"))
        patch.setenv("MLFLOW_TRACKING_URI", student.tracking_uri)
        answer = mlflow.pyfunc.load_model(student.uri).predict(x.numpy())
    torch.testing.assert_close(torch.as_tensor(answer), load("student")(x).detach())


def test_long_proteins_are_treated_as_in_the_vectors_that_a_map_is_for(workplace, tiny_esm2):
    texts = ["MKVLAAGIC" * 5, "MKVLAAGIC"]
    Path("in.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    backbone = str(tiny_esm2.fair_esm)
    x = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    about = {"backbone": backbone, "pooling": "mean", "max_length": 20}
    for long in ("truncate", "window"):
        embed("in.fasta", long, backbone, precision="fp32", long=long, max_length=20)
        save(
            fit_metric(x, np.ones(100, bool), "whitened", provenance={**about, "long": long}).code_map(8), long + "-map"
        )
        predictor = Predictor.load(recipe_of(Path(long + "-map")), long + "-map")
        expected = predictor.code_map.encode(torch.tensor(Store.open(long).embeddings())).numpy()
        np.testing.assert_allclose(predictor(texts), expected, atol=1e-5)
    save(fit_metric(x, np.ones(100, bool), "whitened", provenance={**about, "long": "error"}).code_map(8), "map")
    with pytest.raises(InputError, match="at most 20 residues but sequence 1 has 45"):
        Predictor.load(recipe_of(Path("map")), "map")(texts)


@pytest.mark.usefixtures("int8_units")
def test_requests_at_once_are_answered_as_one_after_the_other(workplace, tiny_esm2, monkeypatch):
    texts = ["MKVLAAGIC" * n for n in range(1, 9)]
    Path("in.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    for name in ("MIN_INT8_COSINE", "MIN_INT8_NEIGHBOURS"):
        monkeypatch.setattr(agreement, name, 0.0)
    quantise("in.fasta", str(tiny_esm2.fair_esm), "int8")
    monkeypatch.setattr("distil_rank.embedding.int8_encoder.WIDE", 1)  # all cores share one pass
    predictor = Predictor.load(recipe_of(Path("int8")), "int8")
    expected = predictor(texts)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(predictor, [texts] * 40):
            np.testing.assert_array_equal(answer, expected)


@pytest.mark.usefixtures("int8_units")
def test_a_backbone_in_int8_answers_as_embed_does(workplace, tiny_esm2):
    dice = random.Random(0)
    texts = ["".join(dice.choices(ALPHABET, k=dice.randint(20, 40))) for _ in range(40)]
    Path("in.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    backbone = str(tiny_esm2.fair_esm)
    quantise("in.fasta", backbone, "int8")
    embed("in.fasta", "states", "int8", precision="int8")
    x = Store.open("states").embeddings()
    about = {"weights_sha256": Store.open("states").manifest["weights_sha256"], "layer": 2, "backbone": backbone}
    save(fit_metric(x, np.ones(len(x), bool), "whitened", provenance=about).code_map(8, "bit"), "map")

    resolved = [recipe_of(Path("int8")), recipe_of(Path("map")), recipe_of(Path("map"), "int8")]
    assert [recipe.precision for recipe in resolved] == ["int8", "fp32", "int8"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's float32 attention of heads as narrow as these differs by their number
    np.testing.assert_array_equal(Predictor.load(recipe_of(Path("int8")), "int8")(texts), x)
    codes = Predictor.load(recipe_of(Path("map"), "int8", "int8"), "map")(texts)
    torch.set_num_threads(threads)
    np.testing.assert_array_equal(codes, load("map").encode(torch.tensor(x)).numpy())
    with pytest.raises(InputError, match="saved in int8, but got bf16"):
        Predictor.load(recipe_of(Path("map"), "int8", "bf16"), "map")
    with pytest.raises(InputError, match="make one with quantise"):
        Predictor.load(recipe_of(Path("map"), precision="int8"), "map")


def test_what_cannot_be_served(workplace, capsys, tiny_esm2):
    save(LowRankLinear(32, 12, rank=4), "student")
    Path("student/model.safetensors").write_bytes(b"cut")
    x = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    save(fit_metric(x, np.ones(100, bool), "whitened").code_map(8, "bit"), "nameless")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refusals = {
            f"{port} cannot be had": ["--model", "nameless", "--port", port],
            "it has no manifest.json": ["--model", "nowhere"],
            "model.safetensors": ["--model", "student"],
            "to name the backbone of its vectors": ["--model", "nameless"],
        }
        for message, options in refusals.items():
            assert main(["-q", "serve", *options]) == 2
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert message in line and line.startswith("distil-rank: Expected"), line
