"""A folder per run, and the link to the latest."""

from pathlib import Path

import pytest

from distil_rank.report.run_folder import link, publish, run_folder, set_latest


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
        latest = set_latest(folder)
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
