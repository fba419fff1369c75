"""Which data `auto` is, and where the proteins that ship are."""

import logging
import shutil
from pathlib import Path

import numpy as np

from distil_rank.data import files
from distil_rank.data.files import LABELLED, UNLABELLED, find_source, sample
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.store_writer import StoreWriter

X = np.ones((1, 4), np.float32)


def test_auto_is_what_ships_unless_there_is_one_finished_store_of_the_users(tmp_path, monkeypatch, caplog):
    shipped = Path("data").resolve()
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    for place in ("PACKAGED", "EDITABLE"):
        monkeypatch.setattr(files, place, tmp_path / "absent")
    assert find_source("auto") == "synthetic"
    assert "NO EMBEDDINGS FOUND" in caplog.text
    assert find_source("mine.npz") == "mine.npz"

    def made(name: str, finished: bool = True) -> None:
        writer = StoreWriter(Path("embeddings") / name)
        settings = {"dim": 4, "pooling": "mean", "long": "window", "max_length": 9, "layer": 1}
        with writer.storage.lock():
            writer.plan([Protein("a", "MK")], settings, {"backbone": "x", "fallback": None}, CleaningReport(""))
            (shard,) = writer.pending()
            writer.write_part(shard, [0], [1], X)
            if finished:
                writer.seal(shard)
                writer.finish()

    def auto(*arguments, **options):
        caplog.clear()
        return find_source("auto", *arguments, **options)

    (tmp_path / "data").symlink_to(shipped)
    shutil.copytree(shipped / "functions", "embeddings/functions-layers")  # as `make recommend` leaves it
    assert (auto(), auto("functions")) == ("data/sample", "data/functions")
    made("killed", finished=False)
    assert auto() == "data/sample"

    made("mine")
    assert auto() == auto("functions") == "embeddings/mine"
    assert "Taking the embeddings in embeddings/mine, the only finished ones" in caplog.text
    assert "(--data, with make DATA=, names another)" in caplog.text
    assert auto("functions", labelled=True) == "data/functions"
    Path("embeddings/mine/labels.tsv").touch()
    assert auto("functions", labelled=True) == "embeddings/mine"

    made("yours")
    assert auto() == "data/sample"
    assert "as there are several of yours (embeddings/mine, embeddings/yours) (--data.source, " in caplog.text


def test_a_checkout_uses_its_own_data(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert sample(LABELLED) == "data/functions"
    assert sample(UNLABELLED, LABELLED) == "data/sample"


def test_an_installed_package_uses_its_copy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    packaged = tmp_path / "site-packages"
    (packaged / LABELLED).mkdir(parents=True)
    monkeypatch.setattr(files, "PACKAGED", packaged)
    monkeypatch.setattr(files, "EDITABLE", tmp_path / "absent")
    assert sample(UNLABELLED, LABELLED) == str(packaged / LABELLED)


def test_outside_the_checkout_an_editable_installation_uses_its_data(monkeypatch, tmp_path, pytestconfig):
    monkeypatch.chdir(tmp_path)
    assert sample(LABELLED) == str(pytestconfig.rootpath / "data" / LABELLED)


def test_what_is_missing_is_named_as_a_checkout_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place in ("PACKAGED", "EDITABLE"):
        monkeypatch.setattr(files, place, tmp_path / "absent")
    assert sample(UNLABELLED) == "data/sample"
