"""Which embeddings are meant, and clusters out of a file."""

import logging
import os

import pytest

from distil_rank.data.files import find_source, read_clusters
from distil_rank.errors import InputError


def test_clusters_are_read_by_member_and_missing_ones_are_named(tmp_path):
    table = tmp_path / "clusters.tsv"
    table.write_text("a\ta\na\tb\n")
    assert read_clusters(table, ["b", "a"]) == ["a", "a"]
    with pytest.raises(InputError, match="c has none"):
        read_clusters(table, ["a", "c"])
    table.write_text("one column\n")
    with pytest.raises(InputError, match="representative, tab, member"):
        read_clusters(table, ["a"])


def test_auto_takes_the_newest_store_and_warns_where_there_is_none(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert find_source("auto") == "synthetic"
    assert "NO EMBEDDINGS FOUND" in caplog.text
    for number, store in enumerate(["data/sample", "embeddings/mine", "embeddings", "embeddings/yours"]):
        caplog.clear()
        (tmp_path / store).mkdir(parents=True, exist_ok=True)
        (tmp_path / store / "manifest.json").touch()
        os.utime(tmp_path / store / "manifest.json", (number, number))
        with caplog.at_level(logging.WARNING):
            assert find_source("auto") == store
    assert "using embeddings/yours, which changed last, not embeddings, embeddings/mine" in caplog.text
