"""The pages' tables come out of results/, and what they name exists; test_documentation.py runs what they tell."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    """The script that keeps the pages true."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_pages_tell_users_to_type_exists(pages):
    for page in pages.pages():
        assert pages.unknown_names(page.read_text()) == [], page.name


def test_what_does_not_exist_is_found(pages):
    text = "`make nonsense` and `make distil RNK=8`, ```\ndistil-rank distil \\\n  --rnak 3\n``` `benchmarks/absent.py`"
    text = text.replace("```", "\n```") + "\n"
    assert pages.unknown_names(text) == [
        "make nonsense",
        "make distil RNK=",
        "distil-rank distil --rnak",
        "benchmarks/absent.py",
    ]


def test_a_table_names_the_machine_that_its_file_names(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    place = "<!-- table: one.md -->\n<!-- /table -->\n"
    for line in ("Machine: an abacus, 2 cores.", "- Machine: an abacus, 2 cores."):
        (tmp_path / "one.md").write_text(f"{line}\n\n| a |\n|---|\n| 1 |\n")
        expected = place.replace("\n", "\n| a |\n|---|\n| 1 |\n\n*Measured on: an abacus, 2 cores.*\n", 1)
        assert pages.fill_tables(place) == expected and pages.fill_tables(expected) == expected


def test_a_table_comes_out_of_its_file(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "found.md").write_text("text\n\n| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| 2 |\n")
    page = "<!-- table: found.md 2 -->\nold\n<!-- /table -->\n<!-- table: absent.md -->\nkept\n<!-- /table -->\n"
    expected = page.replace("old\n", "| b |\n|---|\n| 2 |\n")
    assert pages.fill_tables(page) == expected
