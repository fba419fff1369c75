import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser, open_browser

from distil_rank.cli import main
from distil_rank.commands.ui import free_port, ui
from distil_rank.errors import InputError
from distil_rank.options.ui import UiOptions

QUICK = ["--trainer.max_steps", "12", "--data.source", "proteins.npz", "--data.split", "exact"]


def record_runs() -> None:
    """The real commands on a slice of the real sample: a distillation and a sweep."""
    for command in (
        ["distil", "--rank", "4", "--teacher.kind", "random"],
        ["sweep", "--ranks", "[2, 4]", "--teacher.kind", "spectral"],
    ):
        assert main(["-q", *command, *QUICK]) == 0


@dataclass
class Served:
    """The process of `ui`, and the pages that it named."""

    process: subprocess.Popen
    pages: dict[str, str]


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    with open_browser(tmp_path / "profile") as opened:
        yield opened


def serve(root: Path) -> list[str]:
    """What serves the runs of a project, on a free port."""
    port = free_port("127.0.0.1", None)
    # What runs in a shell's background inherits Ctrl-C ignored, and would never hear the one that a test sends.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"from distil_rank.commands import ui; ui.ui(ui.UiOptions({str(root)!r}, {port}))"
    return [sys.executable, "-c", f"{heard}; {program}"]


@pytest.fixture
def served(browser, slice_of_sample, tmp_path, monkeypatch) -> Iterator[Served]:
    shutil.copy(slice_of_sample, tmp_path / "proteins.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("distil_rank.training.experiment.ORIGINAL_STEPS", 50)
    record_runs()
    process = subprocess.Popen(serve(tmp_path), stdout=subprocess.PIPE, text=True)
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
    assert browser.sees("random r4", "1 matching run")
    assert browser.sees("Low-rank students beside the teachers")
    assert browser.sees("Parameters", "teacher", "rank", "backbone", "Metrics", "r2", "centred_cosine")
    browser.screenshot("runs")
    run_page = browser.link("random r4").split("?")[0]

    browser.open(run_page)
    assert browser.sees("Description", "original recipe", "closed_form", "Registered models", "distil-rank")
    assert browser.count("table td") >= 7 * 8, "the description's comparison is drawn as a table"
    assert browser.sees("teacher_run", "version.torch", "proteins")
    browser.screenshot("run")
    teacher_page = browser.link("random 32-d")

    browser.open(f"{run_page}/model-metrics")
    assert browser.sees("train", "val", "loss")
    assert browser.count(".js-plotly-plot", at_least=2) >= 2
    assert not re.search(r"\btest \(", browser.text()), "charts of single figures come after the curves"
    browser.screenshot("charts")

    browser.open(teacher_page)
    assert browser.sees("random 32-d", "effective_rank")

    browser.open(served.pages["sweep"])
    assert browser.sees("sweep 32-d proteins", "3 matching runs", "children")
    assert not re.search(r"\d\.\d{6}", browser.text()), "figures are short enough to read"
    browser.screenshot("sweeps")
    browser.open(browser.link("sweep 32-d proteins").split("?")[0])
    assert browser.sees("Description", "spectral", "speed-up")
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
        monkeypatch.setattr("distil_rank.commands.ui.DEFAULT_PORT", port)
        assert free_port("127.0.0.1", None) != port


def test_a_remote_server_has_its_own_page(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking.example")
    ui(UiOptions())
    assert "https://tracking.example" in capsys.readouterr().out


@pytest.mark.slow
def test_a_database_that_cannot_be_read_is_one_clear_error(project):
    (project / "mlruns" / "mlflow.db").write_text("not a database" * 100)
    ended = subprocess.run(serve(project), capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"InputError: Expected MLflow to run at .* see .*ui\.log", ended.stderr)
    assert "not a database" in (project / "mlruns" / "ui.log").read_text()
