"""The benchmark scripts: input that is not there is one line and exit code 2."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.documented import run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "command", [["recipe.py"], ["recommendation.py"], ["codes.py", "million"], ["search.py", "folds"]]
)
def test_data_that_are_not_there_are_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    script, *arguments = command
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_script([str(BENCHMARKS / script), *arguments, "--data", "absent/absent.npz"])
    assert ended.value.code == 2
    assert "absent" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def scripts(monkeypatch):
    """Where scripts find each other; their short names are free again afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_what_is_measured_on_a_gpu_runs_on_a_cpu(scripts, tmp_path, monkeypatch):
    """A tiny model; without the baselines that take long, and without a process of its own."""
    gpu = importlib.import_module("gpu")
    left = {
        name: make for name, make in gpu.ENGINES.items() if name in (gpu.OURS, "fair-esm, fp32", "esm-efficient, bf16")
    }
    monkeypatch.setattr(gpu, "ENGINES", left)
    monkeypatch.setattr(gpu, "SECONDS", 0.01)
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=lambda command, **options: None))
    gpu.compare(torch.device("cpu"), BENCHMARKS.parent / "data" / "sample.fasta.gz", tmp_path / "gpu")

    result = json.loads((tmp_path / "gpu.json").read_text())
    mine, theirs, absent = result["in_memory"]
    assert mine["worst_cosine"] > 0.999 and theirs["worst_cosine"] > 0.999999
    assert all(
        row[key]["residues_per_second"] > 0 for row in (mine, theirs) for key in ("50-300", "600-1000", "sample")
    )
    assert [row["proteins"] for row in result["whole_command"]] == [9, 9, 12, 12, 3, 9, 9]
    assert result["facts"]["same_bytes"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("Machine: ") and text.count("\n|---") == 3 and absent["missing"] in text
