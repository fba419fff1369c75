"""The commands on a slice of the real sample: results, files, and what MLflow holds afterwards."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distil_rank.cli import main
from distil_rank.compression.saved import load, read_manifest
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store import embedding_run
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS

ROOT = Path(__file__).parents[2]
QUICK = ["--trainer.max_steps", "12", "--rank", "8", "--data.split", "exact"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, slice_of_sample):
    """An empty directory with 240 of the sample's proteins, where every test of this file runs."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(slice_of_sample, folder / "proteins.npz")
    return folder


@pytest.fixture(autouse=True)
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("distil_rank.training.experiment.ORIGINAL_STEPS", 50)
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="module")
def distilled(workplace):
    """One `distil`, by the real command line."""
    with pytest.MonkeyPatch.context() as patch:  # before `here`, which is of each test
        patch.chdir(workplace)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("distil_rank.training.experiment.ORIGINAL_STEPS", 50)
        assert main(["distil", "--data.source", "proteins.npz", "--teacher.steps", "40", *QUICK]) == 0
    return json.loads((workplace / "results/distil/denoising-r8/latest/summary.json").read_text())


def test_a_teacher_that_diverges_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    huge = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32) * 1e30
    np.savez("huge.npz", embeddings=huge)
    assert main(["distil", "--data.source", "huge.npz", "--rank", "2", "--teacher.steps", "5"]) == 2
    assert "its weights became NaN or infinite; give vectors of a smaller" in capsys.readouterr().err.splitlines()[-1]


def client(workplace) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{workplace / 'mlruns' / 'mlflow.db'}")


def runs(workplace, experiment):
    entry = client(workplace).get_experiment_by_name(experiment)
    return [] if entry is None else client(workplace).search_runs([entry.experiment_id])


def test_the_report_has_the_whole_comparison(distilled):
    (teacher,) = distilled["teachers"]
    methods = [row["method"] for row in teacher["comparison"]]
    expected = ["constant", "svd", "svd_bias", "whitened_svd", "closed_form", "original recipe", "Distil-Rank"]
    assert methods == expected
    assert distilled["schema"] == 2
    assert teacher["parameters"] == {"dense": 1056, "student": 544, "ratio": 1056 / 544, "break_even_rank": 16.0}
    assert {row["batch"] for row in teacher["latency"]} == {1, 32, 256}
    assert {"r2", "centred_cosine", "knn_overlap"} <= teacher["comparison"][0]["metrics"].keys()
    best = {row["method"]: row["metrics"]["r2"]["value"] for row in teacher["comparison"]}
    assert best["svd"] < best["closed_form"]
    assert teacher["pareto"][-1]["r2"] == pytest.approx(1, abs=1e-6)


def test_mlflow_holds_what_a_reader_needs(distilled, workplace):
    (run,) = runs(workplace, "distil")
    (teacher,) = runs(workplace, "teacher")
    assert run.info.status == teacher.info.status == "FINISHED"
    assert run.data.tags["teacher_run"] == teacher.info.run_id
    assert run.data.params["rank"] == "8" and run.data.params["teacher"] == "denoising"
    ours = distilled["teachers"][0]["comparison"][-1]["metrics"]
    assert run.data.metrics["r2"] == pytest.approx(ours["r2"]["value"], rel=1e-4)
    assert run.data.metrics["r2"] == float(f"{ours['r2']['value']:.5g}")
    steps = client(workplace).get_metric_history(run.info.run_id, "val/one_minus_r2/student")
    assert len(steps) > 2 and steps[0].step == 0
    for name in (
        "val/one_minus_cosine/student",
        "val/relative_mse/svd",
        "train/loss",
        "val/mse",
        "training_retained",
        "batch32_ratio",
    ):
        assert name in run.data.metrics, name
    contexts = {tag.value for data in run.inputs.dataset_inputs for tag in data.tags}
    assert contexts == {"train", "val", "test"}
    artifacts = {file.path for file in client(workplace).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json", "summary.md", "report.png"} <= artifacts
    assert "| Distil-Rank |" in run.data.tags["mlflow.note.content"]
    assert run.outputs.model_outputs, "the student is a logged model"
    config = yaml.safe_load(Path(client(workplace).download_artifacts(run.info.run_id, "config.yaml")).read_text())
    assert config["trainer"]["max_steps"] == 12


def test_the_student_is_a_folder_that_loads_and_exports(distilled, workplace):
    folder = workplace / "results/distil/denoising-r8/latest/student"
    student, manifest = load(folder), read_manifest(folder)
    measured = distilled["teachers"][0]["comparison"][-1]["metrics"]["r2"]
    assert manifest["metrics"]["held_out_r2"]["value"] == pytest.approx(measured["value"])
    assert manifest["data"]["digest"] == distilled["data"]["digest"]
    assert load(folder, rank=3).rank == 3
    assert main(["export", "--artefact", str(folder), "--to", "dense", "--output", "mine.safetensors"]) == 0
    torch.testing.assert_close(load_file("mine.safetensors")["weight"], student.B @ student.A)
    Path("mine.safetensors").unlink()


def test_nothing_is_scattered(distilled, workplace):
    assert {path.name for path in workplace.iterdir()} <= {"proteins.npz", "mlruns", "results", "mine.yaml", "mine"}


def test_a_teacher_that_is_there_is_used_again(distilled, workplace, caplog):
    before = len(runs(workplace, "teacher"))
    with caplog.at_level(logging.INFO, "distil_rank"):
        command = [
            "distil",
            "--data.source",
            "proteins.npz",
            "--teacher.steps",
            "40",
            "--distil.warm_start",
            "svd",
            *QUICK,
        ]
        assert main(command) == 0
    assert len(runs(workplace, "teacher")) == before
    logging.getLogger().handlers.clear()


def test_the_original_recipe_is_a_shipped_config():
    config = yaml.safe_load((ROOT / "configs" / "original.yaml").read_text())
    assert config["trainer"]["max_steps"] == ORIGINAL_STEPS or ORIGINAL_STEPS == 50
    assert config["data"] == {"batch_size": ORIGINAL_BATCH, "replacement": True}
    assert config["distil"] == ORIGINAL


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs(path, capsys):
    steps = ["--trainer.max_steps", "4", "--teacher.steps", "4", "--rank", "32", "--output", "results/configs"]
    command = ["-q", "distil", "--config", str(path), "--data.source", "proteins.npz", "--data.split", "exact", *steps]
    assert main(command) == 0
    assert "Distil-Rank" in capsys.readouterr().out


def test_configs_layer_and_the_command_line_wins(workplace):
    (workplace / "mine.yaml").write_text("rank: 5\ndistil: {alpha: 0.5}\n")
    command = ["distil", "--config", str(ROOT / "configs/trainer_quick.yaml"), "--config", "mine.yaml"]
    command += ["--data.source", "proteins.npz", "--data.split", "exact", "--rank", "6", "--teacher.kind", "random"]
    assert main([*command, "--trainer.max_steps", "3"]) == 0
    run = next(run for run in runs(workplace, "distil") if run.data.params.get("rank") == "6")
    assert run.data.params["distil.alpha"] == "0.5"


def test_benchmark_runs_the_three_teachers(workplace, capsys):
    command = ["benchmark", "--data.source", "proteins.npz", "--teacher.steps", "20", "--seeds", "[1, 2]", *QUICK]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 100 for line in shown.splitlines())
    report = json.loads((workplace / "results/distil_rank_summary.json").read_text())
    assert [teacher["teacher"] for teacher in report["teachers"]] == ["random", "denoising", "spectral"]
    assert all(row["seeds"] == 2 for teacher in report["teachers"] for row in teacher["comparison"][-2:])
    assert (workplace / "results/distil_rank_final_report.png").stat().st_size > 10_000


def test_a_sweep_is_a_parent_with_children_and_no_noise(workplace, capfd):
    command = ["sweep", "--data.source", "proteins.npz", "--teacher.kind", "spectral", "--ranks", "[2, 4]"]
    assert main([*command, "--trainer.max_steps", "4", "--data.split", "exact"]) == 0
    assert not re.search("GPU|TPU|Tip|stopped", capfd.readouterr().err)
    found = runs(workplace, "sweep")
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.params["rank"] for run in children} == {"2", "4"}
    assert (workplace / "results/distil_rank_sweep.png").exists()
    best = max(children, key=lambda run: run.data.metrics["r2"])
    assert parent.data.metrics["children"] == 2 and parent.data.params["rank"] == best.data.params["rank"] == "4"
    for name in ("r2", "knn_overlap", "speed_up", "parameter_ratio"):
        assert parent.data.metrics[name] == best.data.metrics[name], name


def test_ranks_beyond_the_layer_are_refused_before_the_first_run(workplace, capsys):
    before = len(runs(workplace, "sweep"))
    command = ["sweep", "--data.source", "proteins.npz", "--teacher.kind", "spectral", "--data.split", "exact"]
    assert main([*command, "--ranks", "[2, 64]"]) == 2
    assert "`rank` in [1, 32] but got 64" in capsys.readouterr().err
    assert len(runs(workplace, "sweep")) == before


def test_a_rank_beyond_the_layer_is_refused_before_the_teacher_is_trained(workplace, capsys):
    before = len(runs(workplace, "teacher"))
    command = ["--data.source", "proteins.npz", "--data.split", "exact", "--teacher.noise", "0.123", "--rank", "33"]
    for name in ("distil", "benchmark"):
        assert main([name, *command]) == 2
        assert "`rank` in [1, 32] but got 33" in capsys.readouterr().err
    assert len(runs(workplace, "teacher")) == before


def test_a_plain_squared_error_is_left_to_the_closed_form(workplace):
    command = ["distil", "--data.source", "proteins.npz", "--teacher.kind", "random", "--distil.alpha", "0", *QUICK]
    assert main([*command, "--output", "results/plain"]) == 0
    (teacher,) = json.loads((workplace / "results/plain/distil/random-r8/latest/summary.json").read_text())["teachers"]
    r2 = {row["method"]: row["metrics"]["r2"]["value"] for row in teacher["comparison"]}
    assert r2["Distil-Rank"] == r2["closed_form"] > r2["original recipe"]
    assert "exact minimum" in teacher["training_note"]


def test_what_stands_behind_the_layer_is_trained_for_even_without_a_cosine_term(workplace):
    Path("mine").mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(torch.nn.ModuleDict({"out": torch.nn.Linear(32, 2)}).state_dict(), "mine/head.safetensors")
    command = ["distil", "--data.source", "proteins.npz", "--teacher.kind", "random", "--distil.alpha", "0", *QUICK]
    assert main([*command, "--head", "tanh,mine/head.safetensors:out", "--output", "results/head"]) == 0
    (teacher,) = json.loads((workplace / "results/head/distil/random-r8/latest/summary.json").read_text())["teachers"]
    assert "12 steps" in teacher["training_note"]


def test_another_way_of_drawing_batches_makes_another_teacher(workplace):
    command = ["distil", "--data.source", "proteins.npz", "--teacher.steps", "40", *QUICK]
    before = len(runs(workplace, "teacher"))
    assert main([*command, "--data.batch_size", "16", "--output", "results/again"]) == 0
    assert main([*command, "--data.batch_size", "32", "--output", "results/again"]) == 0
    assert len(runs(workplace, "teacher")) == before + 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distil", "--data.sauce", "x"], "sauce"),
        (["distil", "--distil.learning_rate", "1"], "learning_rate"),
        (["distil", "--rank", "0", "--data.source", "proteins.npz", "--data.split", "exact"], "rank"),
        (["distil", "--rank", "best", "--data.source", "proteins.npz", "--data.split", "exact"], "rank"),
        (["distil", "--data.source", "absent.npz"], "absent.npz"),
        (
            ["distil", "--teacher.kind", "absent.pt:x", "--data.source", "proteins.npz", "--data.split", "exact"],
            "absent",
        ),
        (["distil", "--ckpt_path", "absent.ckpt", "--data.source", "proteins.npz", *QUICK], "absent.ckpt"),
        (["train-teacher", "--teacher.noise", "loud"], "noise"),
        (["sing"], "sing"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("distil-rank: ") and said in last


def test_the_module_runs_and_its_exit_code_is_the_commands():
    command = [sys.executable, "-m", "distil_rank", "distil", "--data.source", "absent.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "absent.npz" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_of_two_processes_one_speaks_and_is_remembered(tiny_esm2, tmp_path):
    (tmp_path / "two.fasta").write_text(">a\nMKVLAAG\n>b\nACDEFGHIKL\n")
    options = [
        "--fasta",
        "two.fasta",
        "--store",
        "store",
        "--backbone",
        str(tiny_esm2.fair_esm),
        "--accelerator",
        "cpu",
    ]
    command = [sys.executable, "-m", "distil_rank", "embed", *options, "--devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Embeddings") == 1
    (run,) = runs(tmp_path, "embed")
    assert embedding_run(Storage(tmp_path / "store")) == run.info.run_id


def test_the_makefile_keeps_its_rank_from_lightning():
    command = [
        "make",
        "-s",
        "-C",
        str(ROOT),
        "--eval",
        "USES_show := RANK",
        "--eval",
        "show: ; @env",
        "show",
        "RANK=0.95",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) > 3 and not [line for line in shown if line.startswith("RANK=")]


def test_help_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("embed", "train-teacher", "distil", "benchmark", "sweep", "ui"))
