"""From labels to a predictor, by the real command line: teacher, student, predictions, and what MLflow holds."""

import csv
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import distil_rank as dr
from distil_rank.cli import main
from distil_rank.compression.saved import read_manifest
from distil_rank.data.files import load_matrix
from distil_rank.embedding.run import embed
from distil_rank.errors import InputError
from tests.reader_files import shortest_proteins, write_fasta

COUNT = 150
QUICK = ["--head.epochs", "3", "--head.seconds", "20", "--head.alignment", "false"]
BRIEF = ["--trainer.max_steps", "10"]


def share_of(sequence: str, letters: str) -> float:
    return sum(sequence.count(letter) for letter in letters) / len(sequence)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_esm2, empty_database):
    """A store of two layers of a tiny model, and labels, several labels and numbers of its proteins."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "mlruns").mkdir()
    (folder / "mlruns" / "mlflow.db").write_bytes(empty_database.read_bytes())
    proteins = [(name, sequence) for name, sequence, _ in shortest_proteins(COUNT)]
    write_fasta(folder / "my.fasta", proteins)
    embed(folder / "my.fasta", folder / "my_store", str(tiny_esm2.fair_esm), layer="1,2")
    charge = {one: share_of(text, "KRH") - share_of(text, "DE") for one, text in proteins}
    water = {one: share_of(text, "AVILMFWC") for one, text in proteins}
    thirds = np.quantile(list(charge.values()), [1 / 3, 2 / 3])
    names = np.array(["acid", "neutral", "base"])
    tables = {
        "classes": {name: names[np.searchsorted(thirds, value)] for name, value in charge.items()},
        "numbers": {name: f"{10 + 100 * value:.4f}" for name, value in charge.items()},
        "several": {
            name: "|".join(["greasy"] * (water[name] > 0.4) + ["base"] * (value > 0)) or "other"
            for name, value in charge.items()
        },
    }
    for name, rows in tables.items():
        lines = [f"{one}\t{value}\t{number % 50}\n" for number, (one, value) in enumerate(rows.items())]
        (folder / f"{name}.tsv").write_text("id\tlabel\tplate\n" + "".join(lines))
    write_fasta(folder / "new.fasta", proteins[:5])
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def predictors(place):
    """A predictor of classes through a trained head, and linear ones of numbers and of several labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv(
            "MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlruns' / 'mlflow.db'}"
        )  # another module's may be set
        for name, keep in (("classes", "trained"), ("numbers", "linear"), ("several", "auto")):
            store = "my_store:1,2" if name == "several" else "my_store:1"
            data = ["--labels.source", f"{name}.tsv", "--data.source", store, "--groups", "plate"]
            assert main(["-q", "train-teacher", *data, "--head.keep", keep, *QUICK]) == 0
            assert main(["-q", "distil", "--teacher.kind", f"results/teachers/{name}", *BRIEF]) == 0
    return place / "results" / "predictors"


def refused(capsys, *command: str) -> str:
    assert main(["-q", *command]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_table_of_a_teacher_has_what_needs_no_training(predictors):
    report = json.loads(Path("results/teachers/classes/evaluation.json").read_text())
    names = [entry["name"] for entry in report["entries"]]
    assert names[:1] + names[3:] == ["linear probe", "trained head", "nearest neighbour", "composition"]
    assert {"chance", "majority"} < set(names)
    assert any("Search for the head, limit 20 s" in note for note in report["notes"])
    several = json.loads(Path("results/teachers/several/evaluation.json").read_text())
    assert any("THE PROBE IS THE TEACHER" in note or "it is the teacher" in note for note in several["notes"])


@pytest.fixture(scope="module")
def predictions(predictors, place):
    """Tables of new proteins, by their sequences, and of all, by their vectors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv(
            "MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlruns' / 'mlflow.db'}"
        )  # another module's may be set
        model = ["-q", "predict", "--model", str(predictors / "classes")]
        assert main([*model, "--fasta", "new.fasta", "--output", "a.tsv"]) == 0
        assert main([*model, "--data", "my_store", "--output", "b.tsv"]) == 0
        return table("a.tsv"), {row["id"]: row for row in table("b.tsv")}


def test_predictions_from_sequences_are_those_from_vectors(predictions):
    new, known = predictions
    assert len(known) == COUNT and len(new) == 5
    for row in new:
        assert row["prediction"] == known[row["id"]]["prediction"]
        p = [float(row[f"p({name})"]) for name in ("acid", "base", "neutral")]
        assert sum(p) == pytest.approx(1, abs=1e-3) and max(p) == pytest.approx(float(row["probability"]), abs=1e-4)
        assert float(row["p(acid)"]) == pytest.approx(float(known[row["id"]]["p(acid)"]), abs=2e-3)
        assert 0 <= float(row["distance_percentile"]) <= 100


def test_numbers_have_intervals_that_widen_with_confidence(predictors):
    predictor, x = dr.load(predictors / "numbers"), load_matrix("my_store:1").x
    half, most = (predictor.predict(x, confidence) for confidence in (0.5, 0.9))
    assert (half.low < half.predicted).all() and (half.predicted < half.high).all()
    assert (most.low < half.low).all() and (half.high < most.high).all()
    with pytest.raises(InputError, match="between 0 and 1 but got 1"):
        predictor.predict(x, 1)


def test_several_labels_are_predicted_from_several_layers(predictors):
    predictor = dr.load(predictors / "several")
    p = predictor.predict(np.hstack([load_matrix(f"my_store:{layer}").x[:1] for layer in (1, 2)]))
    assert predictor.classes == ("base", "greasy", "other")
    assert p.predicted[0] == "|".join(np.array(predictor.classes)[p.probabilities[0] > 0.5])


def test_teacher_student_and_predictions_are_linked_and_the_model_answers(predictors, predictions, place):
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
    [prediction] = client.search_runs(
        [client.get_experiment_by_name("predict").experiment_id], order_by=["start_time DESC"], max_results=1
    )
    student = client.get_run(prediction.data.tags["student_run"])
    teacher = client.get_run(student.data.tags["teacher_run"])
    assert teacher.data.params["kept"] == "trained head" and student.data.metrics["retained"] > 0.9
    assert {"predictor_report.png", "predictor_report.md"} < {
        file.path for file in client.list_artifacts(student.info.run_id)
    }
    [output] = student.outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"{client.get_logged_model(output.model_id).artifact_location}")
    sequences = [line for line in Path("new.fasta").read_text().splitlines() if not line.startswith(">")]
    answers = model.predict(pd.DataFrame({"sequence": sequences[:2]}))
    known = {name: row["prediction"] for name, row in predictions[1].items()}
    ids = [line[1:].split()[0] for line in Path("new.fasta").read_text().splitlines() if line.startswith(">")]
    assert list(answers["prediction"]) == [known[one] for one in ids[:2]]


def test_what_does_not_fit_is_one_line(predictors, capsys, tmp_path):
    model = ["predict", "--model", str(predictors / "classes"), "--output", str(tmp_path / "t.tsv")]
    Path("dna.fasta").write_text(">one\n" + "ACGT" * 20 + "\n")
    Path("none.fasta").write_text("")
    assert "look like DNA or RNA" in refused(capsys, *model, "--fasta", "dna.fasta")
    assert "none is left of 0 records" in refused(capsys, *model, "--fasta", "none.fasta")
    assert "layer 1 where the other has 2" in refused(capsys, *model, "--data", "my_store:2")
    np.savez("wide.npz", embeddings=np.ones((3, 8), dtype=np.float32))
    assert "dim 32 where the other has 8" in refused(capsys, *model, "--data", "wide.npz")
    twice = ["distil", "--teacher.kind", str(predictors / "classes"), *BRIEF]
    assert "it holds a student" in refused(capsys, *twice)
    teacher = ["train-teacher", "--data.source", "my_store:1", *QUICK]
    Path("others.tsv").write_text("id\tlabel\nP1\ta\nP2\tb\n")
    assert "give a table whose ids are the data's" in refused(capsys, *teacher, "--labels.source", "others.tsv")
    lines = Path("classes.tsv").read_text().splitlines()
    alone = [lines[0], *(f"{line.split()[0]}\t{line.split()[1]}\t{line.split()[1]}" for line in lines[1:])]
    Path("alone.tsv").write_text("\n".join(alone))
    assert "of more than one group" in refused(capsys, *teacher, "--labels.source", "alone.tsv", "--groups", "plate")


def test_a_teacher_whose_labels_changed_is_not_distilled(predictors, capsys):
    table = Path("numbers.tsv")
    text = table.read_text()
    try:
        table.write_text(text.replace("10.", "11."))
        assert "train it again" in refused(capsys, "distil", "--teacher.kind", "results/teachers/numbers", *BRIEF)
    finally:
        table.write_text(text)


def test_a_changed_predictor_is_not_loaded(predictors, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(predictors / "several", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["predictor"]["classes"][0] = "acid"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its hash differs"):
        dr.load(folder)
    assert read_manifest(predictors / "several")["predictor"]["kind"] == "multilabel"
    with pytest.raises(InputError, match=r"vectors \(N, 64\)"):
        dr.load(predictors / "several").predict(torch.zeros(2, 8))
