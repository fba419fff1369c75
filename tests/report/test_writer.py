"""Reports: figures are whole, whatever the terminal's width, every form says the same, and each run keeps its own."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from distil_rank.report import writer
from distil_rank.report.tables import NARROW
from distil_rank.report.writer import Report, Table, link, publish, run_folder

HEAD = ["method", "R²", "95 %", "cen. cos", "kNN@10", "cos p5", "cosine", "rel. MSE", "optimum"]
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
    assert ("the report has all" in text) == (len(retained) < len(ROW)) == (width < 100)
    assert set(HEAD) - set(NARROW) == {"method", "R²", "optimum"}


def test_a_report_says_the_same_on_the_terminal_in_markdown_and_in_json(tmp_path, capsys):
    report = Report(
        [Table("title", HEAD, [ROW])],
        ["NOTE: small"],
        "method",
        Table("", ["what"], [["Use this."]]),
        {"r2": float("nan")},
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


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(Path, "symlink_to", refuse)


def test_every_run_keeps_its_folder_and_latest_follows(tmp_path, file_system):
    for number, run_id in enumerate(("aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc")):
        folder = run_folder(tmp_path / "distil" / "random-r8", run_id)
        (folder / "student").mkdir()
        (folder / "student" / "weights").write_text(str(number))
        latest = link(folder.parent / "latest", folder)
        assert (latest / "student" / "weights").read_text() == str(number)
    retained = sorted(path.name for path in latest.parent.iterdir() if not path.name.startswith(("latest", ".")))
    assert [name[-8:] for name in retained] == ["aaaaaaaa", "bbbbbbbb", "cccccccc"]
    assert (latest.parent / retained[0] / "student" / "weights").read_text() == "0"


def test_a_file_can_be_linked_and_the_whole_tree_moved(tmp_path, file_system):
    (tmp_path / "old" / "run").mkdir(parents=True)
    (tmp_path / "old" / "run" / "summary.json").write_text("1")
    (tmp_path / "old" / "summary.json").write_text("a file of an earlier version")
    link(tmp_path / "old" / "summary.json", tmp_path / "old" / "run" / "summary.json")
    (tmp_path / "old").rename(tmp_path / "new")
    assert (tmp_path / "new" / "summary.json").read_text() == "1"


def test_the_latest_results_are_found_in_one_place(tmp_path, file_system):
    place = tmp_path / "evaluate" / "store"
    folders = []
    for text, run_id in (("first", "aaaaaaaaaa"), ("second", "bbbbbbbbbb")):
        folders.append(run_folder(place, run_id))
        (folders[-1] / "encoder").mkdir()
        for name in ("evaluation.md", "encoder/manifest.json"):
            (folders[-1] / name).write_text(text)
        publish(folders[-1], place)
        assert (place / "evaluation.md").read_text() == (place / "encoder" / "manifest.json").read_text() == text
        assert (place / "latest" / "evaluation.md").read_text() == text
    assert (folders[0] / "evaluation.md").read_text() == "first"
