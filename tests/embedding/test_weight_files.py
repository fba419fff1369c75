"""A large file's hash is computed once, and again when the file changes."""

import hashlib
import os

import pytest

from distil_rank.embedding import weight_files
from distil_rank.embedding.weight_files import cached_sha256, load_tensors
from distil_rank.errors import InputError


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """The files that were read for their hash."""
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_files, "REMEMBERED_BYTES", 4)
    read, original = [], weight_files.sha256_of
    monkeypatch.setattr(weight_files, "sha256_of", lambda path: (read.append(path.name), original(path))[1])
    return read


def test_a_hash_is_kept_until_the_file_changes(hashed, tmp_path):
    file, other = tmp_path / "a.pt", tmp_path / "b.pt"
    file.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    for _ in range(2):
        assert cached_sha256(file) == hashlib.sha256(b"weights").hexdigest()
        assert cached_sha256(other) == hashlib.sha256(b"other weights").hexdigest()
    assert hashed == ["a.pt", "b.pt"]
    file.write_bytes(b"WEIGHTS")  # of the same size
    os.utime(file, ns=(1, 1))
    assert cached_sha256(file) == hashlib.sha256(b"WEIGHTS").hexdigest()
    assert hashed == ["a.pt", "b.pt", "a.pt"]


@pytest.mark.parametrize("content", ["", "{", "abcd"])
def test_a_damaged_cache_is_replaced(hashed, tmp_path, content):
    file = tmp_path / "a.pt"
    file.write_bytes(b"weights")
    cached_sha256(file)
    [entry] = (tmp_path / "cache" / "sha256").iterdir()
    entry.write_text(content)
    assert cached_sha256(file) == cached_sha256(file) == hashlib.sha256(b"weights").hexdigest()
    assert hashed == ["a.pt"] * 2


def test_a_cache_that_cannot_be_written_is_done_without(hashed, tmp_path):
    (tmp_path / "cache").write_text("a file in the folder's place")
    file = tmp_path / "a.pt"
    file.write_bytes(b"weights")
    assert cached_sha256(file) == cached_sha256(file) == hashlib.sha256(b"weights").hexdigest()
    assert hashed == ["a.pt", "a.pt"]


@pytest.mark.parametrize(
    "content", [b"hello", b"", b"0", b">p1\nMKV\n", b"version: 1", b"{}", b"\x80\x02.", b"PK\x03\x04"]
)
def test_files_that_hold_no_weights_are_one_line(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(
        InputError, match=r"Expected weights in .*a\.pt but they cannot be loaded safely \(\w+: "
    ) as refused:
        load_tensors(tmp_path / "a.pt")
    assert "\n" not in str(refused.value)
