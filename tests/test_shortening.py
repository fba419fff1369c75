"""The `shorten` command: the folder, MLflow, and what it refuses, each in one line."""

import json
import logging
import random

import mlflow
import pytest
import torch

from distil_rank.cli import main
from distil_rank.deployment.artefact import save
from distil_rank.embedding.store import Store
from distil_rank.lowrank.low_rank import LowRankLinear

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def proteins(workplace):
    """A working directory with a few proteins."""
    dice = random.Random(0)
    records = [f">p{i}\n{''.join(dice.choices(ALPHABET, k=dice.randint(20, 40)))}\n" for i in range(300)]
    (workplace / "in.fasta").write_text("".join(records))
    rows = [f"p{i}\t{'odd' if record.count('K') % 2 else 'even'}\n" for i, record in enumerate(records)]
    (workplace / "labels.tsv").write_text("id\tlabel\n" + "".join(rows))
    yield workplace
    logging.getLogger().handlers.clear()


def test_from_sequences_to_embeddings_by_fewer_layers(proteins, tiny_esm2, capsys):
    model, exact = ["--backbone", str(tiny_esm2.fair_esm)], ["--split", "exact"]
    labels = ["--labels.source", "labels.tsv"]
    assert main(["shorten", *model, "--layer", "1", "--fasta", "in.fasta", "--data", "states", *exact, *labels]) == 0
    printed = capsys.readouterr().out
    assert "r2" in printed and "960: validation R²" in printed and "of accuracy on labels.tsv" in printed
    metrics = json.loads((proteins / "shortened" / "manifest.json").read_text())["metrics"]
    assert metrics["function"]["metric"] == "accuracy" and metrics["augmentation"]["copies"] == 960
    assert Store.open("states").manifest["layers"] == [1, "1n", 2]
    assert main(["embed", "--backbone", "shortened", "--fasta", "in.fasta", "--store", "short"]) == 0
    found = Store.open("short")
    assert found.manifest["backbone"] == "shortened" and len(found) == 300
    client = mlflow.MlflowClient(f"sqlite:///{proteins / 'mlruns' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("shorten").experiment_id])
    assert run.info.status == "FINISHED" and "test/r2" in run.data.metrics
    assert {"backbone.json", "manifest.json"} <= {file.path for file in client.list_artifacts(run.info.run_id)}

    save(LowRankLinear(32, 32, rank=4, input_mean=False), proteins / "student")
    codes = ["--target", "codes", "--codes", "student", "--output", "coded"]
    assert main(["shorten", *model, "--layer", "1", "--data", "states", *codes, *exact]) == 0
    trained = ["--train", "layer", "--epochs", "1", "--output", "trained"]
    assert main(["shorten", *model, "--layer", "1", "--data", "states", *trained, *exact]) == 0
    torch.save({"dense.weight": torch.randn(2, 32), "dense.bias": torch.zeros(2)}, proteins / "head.pt")
    refusals = {
        "from 1 to 1": ["--layer", "2", "--fasta", "in.fasta"],
        "from 1 to 1, before": ["--layer", "0", "--fasta", "in.fasta"],
        "layer 2 and of a later one": ["--layer", "2", "--data", "states"],
        "together with --target codes": ["--layer", "1", "--data", "states", "--target", "codes"],
        "--train for --target head": [
            *("--layer", "1", "--data", "states", "--target", "head", "--head", "head.pt:dense"),
        ],
        "--copies of at least 0": ["--layer", "1", "--data", "states", "--copies", "-1"],
        "--train_minutes above 0": ["--layer", "1", "--data", "states", "--train", "layer", "--train_minutes", "0"],
        "store of BOS vectors": ["--layer", "1", "--data", "states", "--bos_layers", "1", "--output", "o"],
        "--bos_layers of at least 0": ["--layer", "1", "--data", "states", "--bos_layers", "-1"],
        "holds layer 1 only": ["--layer", "1", "--data", "short"],
    }
    capsys.readouterr()
    for message, options in refusals.items():
        assert main(["shorten", *model, *options, *exact]) == 2, message
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distil-rank:")]
        assert message in line
    assert main(["shorten", "--backbone", "shortened", "--layer", "1", "--data", "states", *exact]) == 2
    for layer in ("0", "1,1", "3"):
        assert main(["embed", *model, "--fasta", "in.fasta", "--store", "new", "--layer", layer]) == 2
    assert main(["embed", *model, "--fasta", "in.fasta", "--store", "states", "--layer", "1,2"]) == 2
    assert main(["judge", "--data", "states:9", "--labels.source", "in.fasta"]) == 2
