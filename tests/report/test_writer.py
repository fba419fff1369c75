"""Reports: figures are whole, whatever the terminal's width, and every form says the same."""

import json

import pytest
from rich.console import Console

from distil_rank.report import writer
from distil_rank.report.comparison import NARROW
from distil_rank.report.writer import Report, Table

HEAD = ["method", "R²", "95 %", "cen. cos", "kNN@10", "cos p5", "cosine", "rel. MSE", "optimum", "probe"]
ROW = [
    "Distil-Rank",
    "-0.9986",
    "[-0.998, 0.999]",
    "0.9992",
    "0.9978",
    "0.9997",
    "0.9999",
    "1.6e-04",
    "100.0 % ≈",
    "0.88",
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_figures_are_never_cut(width, monkeypatch):
    console = Console(width=width, record=True)
    monkeypatch.setattr(writer, "_console", lambda: console)
    Table("title", HEAD, [ROW], NARROW).show()
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    retained = [cell for cell in ROW if cell in text]
    assert {"Distil-Rank", "-0.9986", "100.0 % ≈"} <= set(retained)
    assert ("the report has all" in text) == (len(retained) < len(ROW)) == (width < 200)
    assert set(HEAD) - set(NARROW) == {"method", "R²", "optimum"}


def test_a_report_says_the_same_on_the_terminal_in_markdown_and_in_json(tmp_path, capsys):
    report = Report(
        [Table("title", HEAD, [ROW])], ["NOTE: small"], "method", ["Use this."], "what", {"r2": float("nan")}
    )
    report.show()
    shown, (markdown, data) = capsys.readouterr().out, report.save(tmp_path / "deep/report")
    for text in ("title", "Distil-Rank", "NOTE: small", "Use this."):
        assert text in shown and text in markdown.read_text()
    assert json.loads(data.read_text()) == {"r2": None}


def test_names_never_run_into_values(capsys):
    writer.show_facts("Title", {"calibration_sha256": "8736548", "b": 1.0, "absent": None})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["  calibration_sha256  8736548", "  b                   1"]
