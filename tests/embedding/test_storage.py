"""Local and S3 storages keep the same promises."""

import hashlib

import pyarrow as pa
import pytest

from distil_rank.embedding import s3 as s3_files
from distil_rank.embedding.storage import is_remote
from distil_rank.embedding.store import open_storage
from distil_rank.errors import InputError

TABLE = pa.table({"row": pa.array(range(10_000)), "name": [f"p{i}" for i in range(10_000)]})


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    return open_storage(tmp_path / "store" if request.param == "local" else request.getfixturevalue("s3"))


def test_bytes_come_back_and_replace_older_ones(storage):
    assert storage.size("a/b.bin") is None and storage.entries("a") == {}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/b.bin")
    for content in (b"old", b"newer"):
        storage.write("a/b.bin", content)
        assert storage.read_bytes("a/b.bin") == content and storage.size("a/b.bin") == len(content)
        digest = hashlib.sha256(content).hexdigest()
        assert storage.fingerprint("a/b.bin") == {"bytes": len(content), "sha256": digest}
        assert storage.sha256("a/b.bin") == digest
    storage.write("c.bin", b"")
    assert storage.entries() == {"a": None, "c.bin": 0}
    assert storage.entries("a") == {"b.bin": 5}


def test_a_write_that_fails_leaves_the_older_file(storage):
    storage.write("a", b"old")
    with pytest.raises(ZeroDivisionError), storage.writing("a") as file:
        file.write(b"half of the ne")
        raise ZeroDivisionError
    assert storage.read_bytes("a") == b"old" and storage.entries() == {"a": 3}


def test_tables_whole_by_column_by_line_and_by_batch(storage):
    with storage.writing("t.arrow") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4096)
    assert storage.table("t.arrow").equals(TABLE)
    assert storage.table("t.arrow", ["name"]).equals(TABLE.select(["name"]))
    assert storage.table("t.arrow", ["name", "row"]).equals(TABLE.select(["name", "row"]))
    for start, stop in ((0, 1), (4000, 4096), (4096, 4097), (4095, 8193), (9999, 10_000), (0, 10_000)):
        assert storage.lines("t.arrow", start, stop, ["name"]).equals(TABLE.slice(start, stop - start).select(["name"]))
    assert pa.Table.from_batches(storage.batches("t.arrow", ["row"])).equals(TABLE.select(["row"]))
    with storage.local_copy("t.arrow") as path:
        assert path.stat().st_size == storage.size("t.arrow")


@pytest.mark.parametrize("columns", [None, ["row"]])
def test_missing_and_damaged_tables_are_named(storage, columns):
    storage.write("t.arrow", b"ARROW1 or not")
    for name in ("t.arrow", "absent.arrow"):
        with pytest.raises(InputError, match=f"Arrow file at .*{name} but it is missing or damaged"):
            storage.table(name, columns)


def test_deleting(storage):
    for name in ("a/1", "a/b/2", "ab/3"):
        storage.write(name, b"x")
    storage.delete("absent")
    storage.delete_folder("absent")
    storage.delete_folder("a")
    storage.delete("ab/3")
    assert storage.size("ab/3") is None and storage.entries("a") == {}
    for name in "xyz":
        storage.write(f"f/{name}", name.encode())
    with storage.local_copy("f") as folder:
        assert sorted(path.read_text() for path in folder.iterdir()) == ["x", "y", "z"]
    with storage.local_copy("nothing") as folder:
        assert not folder.exists()


def test_one_holder_at_a_time(storage, monkeypatch):
    monkeypatch.setattr("distil_rank.embedding.s3.SECONDS", 1)
    other = open_storage(storage.location)
    with (
        storage.lock(),
        pytest.raises(InputError, match=r"Expected exclusive access to .* filling it; wait"),
        other.lock(),
    ):
        pass
    with other.lock():
        pass
    assert storage.entries() == {}


def test_places_that_are_neither():
    assert not is_remote("folder") and is_remote("s3://bucket/name")
    for place in ("gs://bucket/name", "s3:/bucket/name"):
        with pytest.raises(InputError, match=f"Expected a folder or s3://BUCKET/NAME but got {place}"):
            open_storage(place)
    with pytest.raises(InputError, match="Expected s3://BUCKET/NAME but got s3://bucket"):
        open_storage("s3://bucket")


def test_what_does_not_answer_is_one_line(s3, monkeypatch):
    with pytest.raises(InputError, match=r"Expected to reach s3://absent/store/a but got: .*NoSuchBucket"):
        open_storage("s3://absent/store").write("a", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(s3_files.RETRIES, "max_retries", 1)
    with pytest.raises(InputError, match=r"Expected to reach .* error sending request; check bucket, credentials"):
        open_storage(s3).size("a")
    monkeypatch.setattr(s3_files, "PROCESS", -1)
    with pytest.raises(InputError, match="this process was forked"):
        open_storage(s3).size("a")


def test_credentials_of_a_profile(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(InputError, match=r"Expected credentials for s3://.* but there are none; set AWS_PROFILE"):
        open_storage(s3)
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(InputError, match=r"Expected credentials for s3://"):
        open_storage(s3)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    open_storage(s3).write("a", b"x")
    assert open_storage(s3).read_bytes("a") == b"x"


def test_a_large_object_is_read_in_parts(s3, monkeypatch):
    """Blocks smaller than the file: whole, by columns, and as a stream."""
    monkeypatch.setattr(s3_files, "BLOCK", 5000)
    storage = open_storage(s3)
    storage.write("t.arrow", TABLE)
    assert storage.table("t.arrow").equals(TABLE)
    assert storage.table("t.arrow", ["name"]).equals(TABLE.select(["name"]))
    assert pa.Table.from_batches(storage.batches("t.arrow", ["row"])).equals(TABLE.select(["row"]))
    assert storage.sha256("t.arrow") == storage.fingerprint("t.arrow")["sha256"]
