"""Reading a store: whole, in order, without copies, and refused when damaged."""

import json

import numpy as np
import pytest

from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store import Store
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

SETTINGS = {"dim": 4, "pooling": "mean", "long": "window", "max_length": 100}
PROTEINS = [Protein("a", "MK"), Protein("b", "MKV"), Protein("c", "MK"), Protein("d", "M")]
BY_SEQUENCE = {"MK": 1.0, "MKV": 2.0, "M": 3.0}


def make(path, proteins=PROTEINS, settings=SETTINGS, skip=()):
    """A finished store whose vectors count from the sequence's number, one tenth a residue."""
    writer = StoreWriter(path)
    with writer.storage.lock():
        writer.plan(proteins, settings, {"backbone": "x", "fallback": None}, CleaningReport("in.fasta"))
        for shard in writer.pending():
            texts = writer.sequences(shard)
            counts = [
                0 if text in skip else len(text) if settings["pooling"] == "residue" else 1 for text in texts.values()
            ]
            firsts = [
                BY_SEQUENCE[text] + i / 10
                for text, count in zip(texts.values(), counts, strict=True)
                for i in range(count)
            ]
            vectors = np.repeat(np.array(firsts, np.float32)[:, None], 4, axis=1)
            writer.write_part(shard, list(texts), counts, vectors)
            writer.seal(shard)
        writer.finish()
    return Store.open(path)


def test_content_in_the_order_of_the_input(tmp_path):
    store = make(tmp_path / "store")
    assert (len(store), store.dim, store.ids) == (4, 4, ["a", "b", "c", "d"])
    assert store.sequences == ["MK", "MKV", "MK", "M"]
    assert store.proteins["length"].to_pylist() == [2, 3, 2, 1]
    assert store.embeddings()[:, 0].tolist() == [1, 2, 1, 3], "c shares the vector of a"
    assert store.protein_of_row().tolist() == [0, 1, 2, 3]
    assert sum(len(store.vectors(shard)[1]) for shard in store.manifest["shards"]) == 3, "which is stored once"
    store.verify()


def test_per_residue(tmp_path):
    store = make(tmp_path / "store", settings=SETTINGS | {"pooling": "residue"})
    assert store.protein_of_row().tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(store.embeddings()[:, 0], [1, 1.1, 2, 2.1, 2.2, 1, 1.1, 3], rtol=1e-6)


def test_without_repeats_nothing_is_copied(tmp_path):
    store = make(tmp_path / "store", proteins=PROTEINS[:2])
    vectors = store.embeddings()
    assert not vectors.flags.owndata
    assert not vectors.flags.writeable
    assert vectors.ctypes.data == store.embeddings().ctypes.data or not store.embeddings().flags.owndata


def test_skipped_proteins_are_named_and_left_out(tmp_path):
    store = make(tmp_path / "store", skip={"MK"})
    assert store.ids == ["b", "d"]
    assert store.skipped == ["a", "c"]
    assert store.embeddings()[:, 0].tolist() == [2, 3]
    assert store.manifest["shards"][0]["skipped"] == 1


def test_everything_skipped(tmp_path):
    store = make(tmp_path / "store", skip=set(BY_SEQUENCE))
    assert (len(store), store.embeddings().shape) == (0, (0, 4))


def test_equal_digests_mean_equal_content(tmp_path):
    assert make(tmp_path / "one").digest == make(tmp_path / "two").digest
    assert make(tmp_path / "three", skip={"M"}).digest != Store.open(tmp_path / "one").digest
    assert make(tmp_path / "four", settings=SETTINGS | {"layer": 3}).digest != Store.open(tmp_path / "one").digest
    two = StoreWriter(tmp_path / "two")
    two._write_manifest({**two.manifest, "remark": "who asked for it"})
    assert Store.open(tmp_path / "two").digest == Store.open(tmp_path / "one").digest


def test_no_store(tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Store.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "other", "version": 1}', "\0"])
def test_manifest_of_something_else(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="Expected"):
        Store.open(tmp_path)


@pytest.mark.parametrize("key", ["dim", "backbone", "fallback", "proteins", "shards"])
@pytest.mark.parametrize("value", [None, 1.5, {}])
def test_a_manifest_without_or_with_another_kind_of_value(tmp_path, key, value):
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest = {name: retained for name, retained in manifest.items() if name != key} | ({key: value} if value else {})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"but {key} is missing or wrong; restore it"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("which", "change"),
    [
        ("shards", {"bytes": "many"}),
        ("shards", {"rows": [1, 3]}),
        ("shards", {"rows": [0, "3"]}),
        ("shards", {"rows": None}),
        ("shards", {"proteins": ["other.arrow", 0, 4]}),
        ("shards", {"residues": None}),
        ("shards", {"file": None}),
        ("proteins", {"sha256": None}),
        ("proteins", {"bytes": None}),
    ],
)
def test_a_manifest_whose_files_were_edited(tmp_path, which, change):
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest[which][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"but {which}: .* is missing or wrong; restore it"):
        Store.open(tmp_path)


def test_unfinished_store_reports_how_to_resume(tmp_path):
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["shards"][0]["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="1 of 1 shards are missing; run the same embed command again"):
        Store.open(tmp_path)


@pytest.mark.parametrize("file", ["proteins-00000.arrow", "vectors-00000.arrow"])
def test_truncated_or_missing_file(tmp_path, file):
    make(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"bytes in .*{file}.*damaged"):
        Store.open(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="but got no file"):
        Store.open(tmp_path)


@pytest.mark.parametrize("file", ["proteins-00000.arrow", "vectors-00000.arrow"])
def test_a_changed_byte_is_detected(tmp_path, file):
    store = make(tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file} unchanged but its SHA-256 differs"):
        store.verify()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    Storage(tmp_path).write("file", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=f"Expected to write {path} but got: No space left .*; free space"):
        Storage(tmp_path).write("file", b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def make_layers(path):
    """A finished store of layers 3 and 4, whose vectors are 3 and 4 times those of `make`."""
    writer = StoreWriter(path)
    with writer.storage.lock():
        settings = SETTINGS | {"layers": [3, 4]}
        writer.plan(PROTEINS, settings, {"backbone": "x", "fallback": None}, CleaningReport("in.fasta"))
        for shard in writer.pending():
            texts = writer.sequences(shard)
            one = np.array([[BY_SEQUENCE[text]] * 4 for text in texts.values()], np.float32)
            writer.write_part(shard, list(texts), [1] * len(texts), np.stack([3 * one, 4 * one]))
            writer.seal(shard)
        writer.finish()
    return path


def test_one_of_several_layers(tmp_path, caplog):
    path, plain = make_layers(tmp_path / "several"), make(tmp_path / "one").embeddings()
    with caplog.at_level("INFO"):
        last = Store.open(path)
    assert "holds the layers 3, 4: taking the last, 4" in caplog.text
    third = Store.open(f"{path}:3")
    assert np.array_equal(third.embeddings(), 3 * plain) and np.array_equal(last.embeddings(), 4 * plain)
    assert np.array_equal(last.at(third.layer).embeddings(), third.embeddings())
    assert third.digest != last.digest and third.ids == last.ids
    with pytest.raises(InputError, match=r"layer out of 3, 4, .* but got 9"):
        Store.open(f"{path}:9")


def test_a_store_of_one_layer_is_itself_by_name(tmp_path):
    path = tmp_path / "one"
    make(path, settings=SETTINGS | {"layer": 3})
    assert Store.open(f"{path}:3").digest == Store.open(path).digest
    with pytest.raises(InputError, match=r"a layer out of 3, which .* but got 4"):
        Store.open(f"{path}:4")


@pytest.mark.parametrize("layers", [[], [3], "3,4", [3, "x"], [3, None]])
def test_layers_changed_by_hand(tmp_path, layers):
    file = make_layers(tmp_path / "s") / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers": layers}))
    with pytest.raises(InputError, match="layers is missing or wrong"):
        Store.open(tmp_path / "s")
