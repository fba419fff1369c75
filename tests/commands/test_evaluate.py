"""The `evaluate` command: results, files, MLflow, and what it refuses."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from distil_rank.cli import main
from distil_rank.compression.saved import save
from distil_rank.lowrank.low_rank import LowRankLinear

ROOT = Path(__file__).parents[2]
SAMPLE = str(ROOT / "data" / "functions")


def test_evaluating_the_sample(workplace, capsys):
    save(LowRankLinear(320, 320, rank=8, input_mean=False), workplace / "student")
    np.savez(workplace / "other.npz", embeddings=np.random.default_rng(0).normal(size=(706, 7)), ids=ids())
    command = [
        "evaluate",
        "--data",
        SAMPLE,
        "--ranks",
        "[32]",
        "--students",
        "[student:4]",
        "--others",
        "[noise=other.npz]",
    ]
    assert main([*command, "--alignment", "false"]) == 0
    printed = capsys.readouterr().out
    folder = workplace / "results" / "evaluate" / "functions"
    content = json.loads((folder / "evaluation.json").read_text())
    names = [entry["name"] for entry in content["entries"]]
    assert names == ["full vector", "chance", "student, rank 32", "student:4", "noise", "composition"]
    assert content["schema"] == 1 and content["metrics"][0] == "mAP" and content["evaluated"] == 352
    bytes_of = {entry["name"]: entry["bytes"] for entry in content["entries"]}
    assert (bytes_of["full vector"], bytes_of["student, rank 32"], bytes_of["student:4"]) == (1280, 128, 16)
    assert "| student, rank 32 | 128 |" in (folder / "evaluation.md").read_text() and "student, rank 32" in printed
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    noise, chance = (next(e for e in content["entries"] if e["name"] == name) for name in ("noise", "chance"))
    assert noise["scores"]["mAP"]["value"] < 0.06 and chance["scores"]["mAP"]["value"] < 0.06

    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("evaluate")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    ours = content["entries"][2]
    logged, digits = run.data.metrics, 1e-4  # MLflow gets five significant digits, the JSON all
    assert logged["student_rank_32/mAP"] == pytest.approx(ours["scores"]["mAP"]["value"], rel=digits)
    assert logged["retained"] == pytest.approx(ours["retained"]["mAP"]["value"], rel=digits)
    assert run.data.params["best"] == "student, rank 32" and run.data.params["metric"] == "mAP"
    assert {"evaluation.json", "evaluation.md", "evaluation.png"} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }


def test_nothing_is_kept_of_a_score_that_is_not_positive(workplace, capsys):
    """Targets without any relation to the vectors: the full vector's correlation may be negative."""
    y = np.random.default_rng(3).normal(size=706)
    lines = [f"{name};{value:.4f}" for name, value in zip(ids(), y, strict=True)]
    (workplace / "numbers.csv").write_text("\n".join(["id;label", *lines]))
    assert (
        main(["evaluate", "--data", SAMPLE, "--labels.source", "numbers.csv", "--ranks", "[4]", "--metric", "r2"]) == 0
    )
    place = workplace / "results/evaluate/functions"
    content = json.loads((place / "evaluation.json").read_text())
    (folder,) = [path for path in place.iterdir() if path.is_dir() and not path.is_symlink()]
    assert (folder / "evaluation.json").samefile(place / "evaluation.json")
    assert content["task"] == "regression" and content["metrics"] == ["r2", "spearman"]
    assert content["entries"][0]["scores"]["r2"]["value"] <= 0.01


def ids() -> np.ndarray:
    lines = (ROOT / "data/functions/labels.tsv").read_text().splitlines()[1:]
    return np.array([line.split("\t")[0] for line in lines])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("id,label\nX1,a\nX2,b\n", [], "such as A0A011AB45"),
        (None, ["--labels.column", "nothing"], "a column 'nothing'"),
        (None, ["--labels.column", "organism", "--task", "regression"], "a number for each protein"),
        (None, ["--groups", "nothing"], "--groups out of"),
        (None, ["--task", "classification", "--groups", "label"], "--groups out of"),
        (None, ["--ranks", "[999]"], "ranks in [1, 320]"),
        (None, ["--others", "[absent.npy]"], "absent.npy"),
        (None, ["--others", f"[a={SAMPLE},a={SAMPLE}]"], "'a' comes twice"),
        ("PK\x03\x04", [], "Excel"),
        ("id,label\n" + "".join(f"{name},one\n" for name in ids()), [], "at least two classes"),
        ("id,label\n" + "".join(f"{name},{name}\n" for name in ids()), [], "at least two proteins"),
    ],
)
def test_what_is_refused(workplace, capsys, labels, options, message):
    if labels is not None:
        (workplace / "labels.csv").write_text(labels)
        options = ["--labels.source", "labels.csv", *options]
    assert main(["evaluate", "--data", SAMPLE, "--alignment", "false", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("distil-rank: Expected")
