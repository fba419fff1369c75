"""Planning, parts and sealing; the lock; what is refused."""

import errno
import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.embedding import planning
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.store import Store, embedding_run, read_provenance
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

SETTINGS = {"dim": 3, "pooling": "mean", "long": "truncate", "max_length": 5}


def plan(path, proteins, **changed):
    writer = StoreWriter(path)
    with writer.storage.lock():
        return writer, writer.plan(
            proteins, SETTINGS | changed, {"backbone": "x", "fallback": None}, CleaningReport("in.fasta")
        )


def fill(writer):
    """Vectors that tell the row: (row, row, row)."""
    for shard in writer.pending():
        rows = list(writer.sequences(shard))
        for row in rows:
            if row not in writer.done(shard):
                writer.write_part(shard, [row], [1], np.full((1, 3), row, np.float32))
        writer.seal(shard)
    writer.finish()


def proteins(*texts):
    return [Protein(f"p{i}", text) for i, text in enumerate(texts)]


def test_plan_notes_long_proteins_and_settings(tmp_path):
    writer, added = plan(tmp_path / "s", proteins("MK", "MKVAAA"))
    fill(writer)
    store = Store.open(tmp_path / "s")
    assert added == 2
    assert store.proteins["notes"].to_pylist() == ["", "truncate"]
    assert store.manifest["backbone"] == "x"
    assert store.manifest["proteins"][0]["source"] == "in.fasta"


sequences = st.lists(st.text("ACD", min_size=1, max_size=12), min_size=1, max_size=40)


@settings(max_examples=20)  # each plans twice
@given(sequences, sequences, st.integers(1, 60), st.sampled_from(["mean", "residue"]))
def test_shards_cover_every_distinct_sequence_once(tmp_path_factory, first, second, size, pooling):
    """Whatever is planned, in two steps, each distinct sequence is in exactly one shard, in order."""
    path = tmp_path_factory.mktemp("any") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_RESIDUES", (size, size))
        writer, _ = plan(path, proteins(*first), pooling=pooling)
        late = [Protein(f"q{i}", text) for i, text in enumerate(second)]
        plan(path, late, pooling=pooling)
    shards = writer.pending()
    planned = {row: text for shard in shards for row, text in writer.sequences(shard).items()}
    assert list(planned) == list(range(len(set(first + second))))
    assert list(planned.values()) == list(dict.fromkeys(first + second))
    assert sum(shard.residues for shard in shards) == sum(map(len, planned.values()))
    assert all(len(writer.sequences(shard)) == shard.rows[1] - shard.rows[0] for shard in shards)
    assert all(shard.residues <= size or len(writer.sequences(shard)) == 1 for shard in shards)


def test_adding_keeps_what_is_there(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    fill(writer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").glob("*.arrow")}
    _, added = plan(tmp_path / "s", [*proteins("MK", "MV"), Protein("new", "MV"), Protein("newer", "MM")])
    assert added == 2
    fill(writer)
    store = Store.open(tmp_path / "s")
    assert store.ids == ["p0", "p1", "new", "newer"]
    assert store.embeddings()[:, 0].tolist() == [0, 1, 1, 2]
    assert all((tmp_path / "s" / name).read_bytes() == content for name, content in before.items())


def test_nothing_new_changes_nothing(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK"))
    fill(writer)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()}
    assert plan(tmp_path / "s", proteins("MK"))[1] == 0
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()} == before


@pytest.mark.parametrize(("key", "value"), [("pooling", "bos"), ("dim", 4), ("long", "window"), ("max_length", 6)])
def test_other_settings_are_refused(tmp_path, key, value):
    plan(tmp_path / "s", proteins("MK"))
    with pytest.raises(InputError, match=f"Expected {key} .*made with, but got .*take another store: --store .*/s-"):
        plan(tmp_path / "s", proteins("MV"), **{key: value})


def test_a_name_with_another_sequence_is_refused_and_nothing_lost(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK"))
    fill(writer)
    with pytest.raises(InputError, match="Expected p0 with the sequence"):
        plan(tmp_path / "s", [Protein("new", "MM"), Protein("p0", "MV")])
    assert Store.open(tmp_path / "s").ids == ["p0"]
    Store.open(tmp_path / "s").verify()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"empty folder .* but it holds thesis\.tex"):
        plan(tmp_path, proteins("MK"))


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "s").touch()
    with pytest.raises(InputError, match="folder that can be written"):
        plan(tmp_path / "s", proteins("MK"))


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"folder that can be written .* but got: File name too long"):
        plan(tmp_path / ("s" * 300), proteins("MK"))


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", forbidden)  # which root would be allowed
    with pytest.raises(InputError, match=r"folder that can be written .* but got: Permission denied"):
        plan(tmp_path / "s", proteins("MK"))


@pytest.mark.parametrize("fails", range(4))
def test_a_full_disk_is_one_line_and_the_next_run_resumes(tmp_path, monkeypatch, fails):
    """The table of proteins, the manifest, a part, the shard: whichever does not fit."""
    whole, _ = plan(tmp_path / "whole", proteins("MK"))
    fill(whole)
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 2 * fails + 1:  # of a file and of its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"Expected to write .* but got: No space left on device; free space"):
            fill(plan(tmp_path / "s", proteins("MK"))[0])
    fill(plan(tmp_path / "s", proteins("MK"))[0])
    content = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "s")]
    assert content[0] == content[1]


def test_temporary_files_of_killed_runs_are_deleted(tmp_path):
    plan(tmp_path / "s", proteins("MK"))
    for name in (".unfinished-proteins-00001.arrow.123", ".unfinished-manifest.json.77"):
        (tmp_path / "s" / name).touch()
    writer, _ = plan(tmp_path / "s", proteins("MK"))
    fill(writer)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        "manifest.json",
        "proteins-00000.arrow",
        "vectors-00000.arrow",
    ]


def test_a_part_whose_writing_was_killed_is_no_part(tmp_path, monkeypatch):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    (shard,) = writer.pending()
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: None)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        writer.write_part(shard, [0], [1], np.zeros((1, 3), np.float32))
    assert len(list((tmp_path / "s" / shard.parts).iterdir())) == 1 and writer.done(shard) == set()
    fill(writer)
    assert Store.open(tmp_path / "s").embeddings()[:, 0].tolist() == [0, 1]


def test_a_shard_sealed_before_the_kill_is_not_computed_again(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK"))
    (shard,) = writer.pending()
    writer.write_part(shard, [0], [1], np.zeros((1, 3), np.float32))
    writer.seal(shard)
    plan(tmp_path / "s", proteins("MK"))  # the next run's first step
    assert writer.pending() == []


@pytest.mark.parametrize("changed", [{}, {"pooling": "bos"}])
@pytest.mark.parametrize("sealed", [True, False])
def test_vectors_of_other_proteins_or_settings_are_not_used(tmp_path, caplog, sealed, changed):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    (shard,) = writer.pending()
    writer.write_part(shard, [0, 1], [1, 1], np.ones((2, 3), np.float32))
    if sealed:
        writer.seal(shard)
    (tmp_path / "s" / "manifest.json").unlink()
    plan(tmp_path / "s", proteins("MK", "MV" if changed else "MM"), **changed)
    (shard,) = writer.pending()
    assert not writer.is_sealed(shard)
    assert writer.done(shard) == set()
    assert "computed again" in caplog.text
    fill(writer)
    assert Store.open(tmp_path / "s").embeddings()[:, 0].tolist() == [0, 1]


def test_vectors_of_the_same_proteins_and_settings_survive_a_lost_manifest(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    fill(writer)
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    (tmp_path / "s" / "manifest.json").unlink()
    plan(tmp_path / "s", proteins("MK", "MV"))
    assert writer.is_sealed(*writer.pending())
    writer.finish()
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before


def test_a_manifest_that_lost_its_last_shard_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_RESIDUES", (2, 2))
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    fill(writer)
    writer._write_manifest({**writer.manifest, "shards": writer.manifest["shards"][:-1]})
    with pytest.raises(InputError, match=r"Expected shards for 2 sequences .* but got shards for 1"):
        plan(tmp_path / "s", proteins("MK", "MV", "ML"))


def test_a_skipped_sequence_is_tried_again_when_its_shard_was_deleted(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV", "ML"))
    (shard,) = writer.pending()
    writer.write_part(shard, [0], [1], np.zeros((1, 3), np.float32))
    writer.write_part(shard, [1, 2], [0, 1], np.full((1, 3), 2, np.float32))
    assert writer.done(shard) == {0, 1, 2}
    writer.seal(shard)
    writer.finish()
    assert Store.open(tmp_path / "s").skipped == ["p1"]
    (tmp_path / "s" / shard.file).unlink()
    plan(tmp_path / "s", proteins("MK", "MV", "ML"))
    fill(writer)
    store = Store.open(tmp_path / "s")
    assert (store.skipped, store.embeddings()[:, 0].tolist()) == ([], [0, 1, 2])


def test_a_truncated_part_is_computed_again(tmp_path):
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV"))
    (shard,) = writer.pending()
    for row in (0, 1):
        writer.write_part(shard, [row], [1], np.full((1, 3), row, np.float32))
    part = next((tmp_path / "s" / "parts").rglob("1.arrow"))
    part.write_bytes(part.read_bytes()[:-20])
    assert writer.done(shard) == {0}
    fill(writer)
    assert Store.open(tmp_path / "s").embeddings()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard_of_a_finished_store_is_computed_again(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(planning, "SHARD_RESIDUES", (2, 2))
    writer, _ = plan(tmp_path / "s", proteins("MK", "MV", "ML"))
    fill(writer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    shard = tmp_path / "s" / "vectors-00001.arrow"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"vectors-00001.*run the same embed command again"):
        Store.open(tmp_path / "s")
    plan(tmp_path / "s", proteins("MK", "MV", "ML"))
    assert "vectors-00001.arrow is missing or damaged: it is computed again" in caplog.text
    assert [shard.file for shard in writer.pending()] == ["vectors-00001.arrow"]
    fill(writer)
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before


def test_provenance_is_no_content(tmp_path):
    path = tmp_path / "s"
    writer, _ = plan(path, proteins("MK"))
    fill(writer)
    content, digest = writer.manifest, Store.open(path).digest
    writer.record_extraction(computed=3)
    assert embedding_run(writer.storage) is None
    writer.record_extraction(computed=1, run="abc")
    writer.record_extraction(computed=2)
    assert read_provenance(writer.storage) == {
        "extractions": [{"computed": 3}, {"computed": 1, "run": "abc"}, {"computed": 2}],
    }
    assert embedding_run(writer.storage) == "abc"
    assert writer.manifest == content and Store.open(path).digest == digest


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"extractions": 3}', '{"extractions": [3]}'])
def test_a_damaged_provenance_is_reported_and_the_store_still_opens(tmp_path, caplog, content):
    writer, _ = plan(tmp_path / "s", proteins("MK"))
    fill(writer)
    (tmp_path / "s" / "provenance.json").write_text(content)
    assert embedding_run(Store.open(tmp_path / "s").storage) is None
    assert "provenance.json cannot be read" in caplog.text


def test_the_manifest_depends_on_content_only(tmp_path):
    for name in "ab":
        writer, _ = plan(tmp_path / name, proteins("MK", "MV", "MK"))
        fill(writer)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def _hold(path, ready, release):
    with StoreWriter(path).storage.lock():
        ready.set()
        release.wait(30)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "s", ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(InputError, match="another process is filling it"):
            plan(tmp_path / "s", proteins("MK"))
    finally:
        holder.kill()
        holder.join()
    assert plan(tmp_path / "s", proteins("MK"))[1] == 1, "the kernel released the lock"
