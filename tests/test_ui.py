import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, open_browser
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from distil_rank.errors import InputError
from distil_rank.registry import log_student, promote_champion
from distil_rank.run_logger import RunLogger
from distil_rank.tracking import start_run
from distil_rank.ui import free_port, serve_ui

NOTE = """| method | R² |
|---|---|
| truncated SVD | 0.41 |
| **Distil-Rank** | **0.98** |
"""


class ToyStudent(LightningModule):
    """A rank-2 student of a random layer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 8)
        self.student = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))

    def residual(self, rows):
        return (self.student(rows) - self.teacher(rows)).square().mean()

    def training_step(self, rows):
        loss = self.residual(rows)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, rows):
        self.log("val/r2/student", 1 - self.residual(rows))

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), 0.01)


def record_runs(root: Path) -> None:
    """What a small pipeline leaves behind: a teacher, two students, and a sweep over two ranks."""
    rows = DataLoader(torch.randn(24, 8), batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    figures = {
        "test/r2": 0.98,
        "test/centred_cosine": 0.97,
        "test/knn_overlap": 0.95,
        "share_of_optimum": 1.0,
        "test/cosine": 0.999,
        "speed_up": 9.7,
        "parameter_ratio": 9.93,
    }
    with start_run(
        "teacher", "random 8-d", params={"teacher": "random", "backbone": "tiny"}, tags={}, root=root
    ) as made:
        made.log_metrics({"effective_rank": 5.0})
    for kind in ("random", "spectral"):
        params = {"teacher": kind, "rank": 2, "backbone": "tiny"}
        with start_run("distil", f"{kind} r2", params=params, tags={"teacher_run": made.id}, root=root) as run:
            module = ToyStudent()
            options = {**quiet, "logger": RunLogger(run), "log_every_n_steps": 1, "max_epochs": 10}
            Trainer(**options, enable_checkpointing=False).fit(module, rows, rows)
            run.log_dataset((24, 8), name="sample", digest="0123456789abcdef", context="training", source="sample")
            run.log_metrics(figures)
            run.note(NOTE)
            uri = log_student(run, module.student, np.zeros((2, 8)), metrics={"test/r2": 0.98})
            promote_champion(run, uri, r2=0.98, rank=2, teacher=kind, data="0123456789abcdef")
    with start_run("sweep", "ranks of random", params={"backbone": "tiny"}, tags={}, root=root) as parent:
        for rank in (2, 4):
            params = {"teacher": "random", "rank": rank, "backbone": "tiny"}
            with start_run("sweep", f"random r{rank}", params=params, tags={}, parent=parent, root=root) as child:
                child.log_metrics({**figures, "test/r2": rank / 5})
            parent.log_metrics({"rank/r2": rank / 5}, step=rank)


@dataclass
class Served:
    """The process of `serve_ui`, and the pages that it named."""

    process: subprocess.Popen
    pages: dict[str, str]


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    with open_browser(tmp_path / "profile") as opened:
        yield opened


def serve(root: Path) -> list[str]:
    """The command that serves the runs of a project, on a free port."""
    port = free_port("127.0.0.1", None)
    # What runs in a shell's background inherits Ctrl-C ignored, and would never hear the one that a test sends.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"from pathlib import Path; from distil_rank.ui import serve_ui; serve_ui(Path({str(root)!r}), {port})"
    return [sys.executable, "-c", f"{heard}; {program}"]


@pytest.fixture
def served(browser, project) -> Iterator[Served]:
    record_runs(project)
    process = subprocess.Popen(serve(project), stdout=subprocess.PIPE, text=True)
    pages = {}
    try:
        for line in process.stdout:
            if found := re.match(r"  (\w+) +(http\S+)", line):
                pages[found[1]] = found[2]
            if len(pages) == 3:
                break
        yield Served(process, pages)
    finally:
        process.terminate()  # a killed one could not end the server that it started
        process.wait(60)


@pytest.mark.slow
def test_the_runs_as_a_browser_shows_them(browser, served):
    browser.open(served.pages["distil"])
    assert browser.sees("random r2", "spectral r2", "2 matching runs")
    assert browser.sees("Low-rank students beside the teachers")
    assert browser.sees("Parameters", "teacher", "rank", "backbone", "Metrics", "test/r2", "test/centred_cosine")
    browser.screenshot("runs")
    run_page = browser.link("random r2").split("?")[0]

    browser.open(run_page)
    assert browser.sees("Description", "truncated SVD", "0.41", "Registered models", "distil-rank")
    assert browser.count("table td strong") >= 2, "the description's table is drawn, its bold cells bold"
    assert browser.sees("teacher_run", "version.torch", "sample")
    browser.screenshot("run")
    teacher_page = browser.link("random 8-d")

    browser.open(f"{run_page}/model-metrics")
    assert browser.sees("train", "val/r2", "test", "centred_cosine")
    assert browser.count(".js-plotly-plot", at_least=2) >= 2
    browser.screenshot("charts")

    browser.open(teacher_page)
    assert browser.sees("random 8-d", "effective_rank")

    browser.open(served.pages["sweep"])
    assert browser.sees("ranks of random")
    browser.screenshot("sweep")

    served.process.send_signal(signal.SIGINT)
    told, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert "has ended" in told
    address = re.match(r"http://127.0.0.1:(\d+)", served.pages["distil"])
    assert free_port("127.0.0.1", int(address[1])), "nothing listens there any more"


def test_a_taken_port_is_said_or_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"{port} cannot be had"):
            free_port("127.0.0.1", port)
        monkeypatch.setattr("distil_rank.ui.USUAL_PORT", port)
        assert free_port("127.0.0.1", None) != port


def test_a_remote_server_has_its_own_page(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking.example")
    serve_ui()
    assert "https://tracking.example" in capsys.readouterr().out


@pytest.mark.slow
def test_a_database_that_cannot_be_read_is_one_clear_error(project):
    (project / "mlruns" / "mlflow.db").write_text("not a database" * 100)
    ended = subprocess.run(serve(project), capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"InputError: Expected the MLflow UI to start at .* see .*ui\.log", ended.stderr)
    assert "not a database" in (project / "mlruns" / "ui.log").read_text()
