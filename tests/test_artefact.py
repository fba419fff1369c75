"""A folder is read as it was written or not at all, and what is not ours is never overwritten."""

import json
import os

import numpy as np
import pytest

from distil_rank import artefact
from distil_rank.artefact import check_writable, json_text, read_folder, sha256_of, write_atomically, write_folder
from distil_rank.errors import InputError

FILES = {"a.bin": b"one", "b.bin": b"another"}


def written(path, **values):
    return write_folder(path, {"format": "kind", **values}, FILES)


def forge(path, change):
    """What a careful forger does: change the manifest and mend its hash."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = artefact._manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read(tmp_path):
    values = {"r2": np.float32(0.5), "none": float("nan"), "ranks": (1, 2), "name": "µ"}
    manifest, files = read_folder(written(tmp_path / "x" / "y", **values), "kind")
    assert {key: manifest[key] for key in values} == {"r2": 0.5, "none": None, "ranks": [1, 2], "name": "µ"}
    assert {name: path.read_bytes() for name, path in files.items()} == FILES
    assert manifest["files"]["a.bin"] == {"bytes": 3, "sha256": sha256_of(tmp_path / "x" / "y" / "a.bin")}


def test_what_was_written_before_is_replaced_and_nothing_else(tmp_path):
    written(tmp_path)
    (tmp_path / "export.onnx").touch()
    write_folder(tmp_path, {"format": "kind"}, {"a.bin": b"new"})
    assert {file.name for file in tmp_path.iterdir()} == {"a.bin", "export.onnx", "manifest.json"}
    assert read_folder(tmp_path, "kind")[1]["a.bin"].read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_changed_short_and_missing_files_are_refused(tmp_path, name):
    content = (written(tmp_path) / name).read_bytes()
    changed = content.replace(b"one", b"One") if name == "a.bin" else content.replace(b'"bytes": 3', b'"bytes": 2')
    for other, message in [(content[:2], "hash differs|cannot be read"), (changed, f"{name} as it was saved but")]:
        (tmp_path / name).write_bytes(other)
        with pytest.raises(InputError, match=message) as error:
            read_folder(tmp_path, "kind")
        assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"is missing|has no manifest"):
        read_folder(tmp_path, "kind")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="zip"), "'kind' in .* but its manifest is of 'zip'"),
        (lambda m: m.update(version=99), "version 1 but .* has 99; upgrade"),
        (lambda m: m["files"].update({"../x": m["files"]["a.bin"]}), "lists '../x'"),
        (lambda m: m["files"].update({"": m["files"]["a.bin"]}), "is missing"),
        (lambda m: m["files"]["a.bin"].update(bytes=float("inf")), "cannot be read"),
        (lambda m: m["files"]["a.bin"].update(bytes=4), "hash differs"),
        (lambda m: m.update(files="x"), "cannot be read"),
    ],
)
def test_forgeries_with_the_right_hash_are_refused(tmp_path, change, message):
    forge(written(tmp_path / "x"), change)
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path / "x", "kind")


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    written(tmp_path)
    with pytest.raises(InputError, match="JSON values to save but got a object"):
        write_folder(tmp_path, {"format": "kind", "x": object()}, {"a.bin": b"new"})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; free space there"):
        write_folder(tmp_path, {"format": "kind"}, {"a.bin": b"new"})
    with pytest.raises(InputError, match="No space"):
        write_atomically(tmp_path / "alone", b"x")
    assert read_folder(tmp_path, "kind")[1]["a.bin"].read_bytes() == b"one"
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "manifest.json"}


def test_what_is_not_ours_is_not_overwritten(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; name another place"):
        check_writable(tmp_path / "file" / "deep")
    with pytest.raises(InputError, match="holds other files; name another place"):
        written(tmp_path)
    write_folder(tmp_path / "store", {"format": "distil-rank codes"}, {})
    with pytest.raises(InputError, match="holds 'distil-rank codes'; name another place"):
        written(tmp_path / "store")
    check_writable(tmp_path / "store")  # where a file goes beside others
    check_writable(tmp_path / "new" / "folder", "kind")


def test_json_has_no_numbers_that_are_none():
    assert json.loads(json_text({"a": [np.int64(3), float("-inf"), True, None]})) == {"a": [3, None, True, None]}
