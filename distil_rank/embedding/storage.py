"""Where the files of a store are: a folder here, or objects in S3 below a prefix (`s3.py`).

Both promise that a file appears whole or not at all, and takes the place of an older one at once (a rename; a single
upload), and that one process at a time holds the lock, a dead one not for long (the kernel's; a lease).
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from filelock import FileLock, Timeout

from distil_rank.artefact import UNFINISHED, atomic_file
from distil_rank.errors import InputError

Location = str | Path  # a folder, or s3://BUCKET/NAME

S3 = "s3://"
LOCK = ".lock"
BATCH_ROWS = 4096  # lines in each record batch of a table of proteins but the last
_SCHEME = re.compile(r"[a-z0-9+]+:/")  # also of an address that `Path` has shortened


def is_remote(location: Location) -> bool:
    """Whether a location is in S3; raises `InputError` for one in another object storage.

    >>> is_remote("s3://bucket/store"), is_remote("embeddings/store")
    (True, False)
    """
    if _SCHEME.match(str(location)) and not str(location).startswith(S3):
        raise InputError(f"Expected a folder or {S3}BUCKET/NAME but got {location}.")
    return str(location).startswith(S3)


class Storage:
    """Files in a folder by name, as in `parts/vectors-00000/7.arrow`; `lock` or the first file creates it."""

    def __init__(self, location: Location):
        self.location = location

    def where(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.location}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """A file's content, or `FileNotFoundError`."""
        return Path(self.where(name)).read_bytes()

    def entries(self, folder: str = "") -> dict[str, int | None]:
        """Size in bytes of each file in a folder, None for a folder in it; nothing if it does not exist."""
        place = Path(self.where(folder))
        paths = sorted(place.iterdir()) if place.is_dir() else []
        return {path.name: None if path.is_dir() else path.stat().st_size for path in paths}

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is none."""
        path = Path(self.where(name))
        return path.stat().st_size if path.exists() else None

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, which is read for it, in hexadecimal."""
        with self._source(name, stream=True) as source:
            return hashlib.file_digest(source, "sha256").hexdigest()

    def fingerprint(self, name: str) -> dict[str, Any]:
        """Size and SHA-256 of a file, as it was written."""
        return {"bytes": self.size(name), "sha256": self.sha256(name)}

    def _source(self, name: str, stream: bool = False) -> AbstractContextManager[pa.NativeFile]:
        """A file to read; as a stream with little memory (mapped pages count as such)."""
        return pa.OSFile(self.where(name)) if stream else pa.memory_map(self.where(name))

    @contextmanager
    def _reader(self, name: str, columns: Sequence[str] | None, stream: bool = False) -> Iterator[pa.RecordBatchReader]:
        """Reads an Arrow file, of which other columns stay unread; raises `InputError` where it is damaged."""
        try:
            with self._source(name, stream) as source:
                reader = pa.ipc.open_file(source)
                if columns is not None:
                    fields = sorted(reader.schema.get_field_index(column) for column in columns)
                    reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
                yield reader
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"Expected an Arrow file at {self.where(name)} but it is missing or damaged ({reason}); embed again."
            ) from error

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """An Arrow file, or some of its columns; memory-mapped where it is on a disk."""
        with self._reader(name, columns) as reader:
            table = reader.read_all()
        return table if columns is None else table.select(columns)

    def lines(self, name: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Lines from `start` to below `stop` of a table of proteins; no others are read."""
        first = start // BATCH_ROWS
        with self._reader(name, columns) as reader:
            batches = [reader.get_batch(number) for number in range(first, 1 + (stop - 1) // BATCH_ROWS)]
        return pa.Table.from_batches(batches).select(columns).slice(start - first * BATCH_ROWS, stop - start)

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The record batches of an Arrow file, one in memory at a time."""
        with self._reader(name, columns, stream=True) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).select(columns)

    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to write; it appears when the context ends without an exception."""
        return atomic_file(Path(self.where(name)))

    def write(self, name: str, content: bytes | pa.Table) -> None:
        """Writes bytes, or a table as an Arrow file."""
        with self.writing(name) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with pa.ipc.new_file(file, content.schema) as writer:
                    writer.write_table(content)

    def delete(self, name: str) -> None:
        """Deletes a file, if it exists."""
        Path(self.where(name)).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        """Deletes a folder and all that is in it, if it exists."""
        shutil.rmtree(self.where(name), ignore_errors=True)

    def _delete_unfinished(self) -> None:
        for left in Path(self.location).glob(f"{UNFINISHED}*"):
            left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the exclusive lock, or raises `InputError`. A folder that is new and empty at the end is deleted."""
        folder = Path(self.location)
        lock = FileLock(folder / LOCK, blocking=False)
        try:
            new = not folder.exists()
            lock.acquire()  # makes the folder, too
        except Timeout:
            raise InputError(
                f"Expected exclusive access to {folder} but another process is filling it; wait for it, or choose "
                "another store."
            ) from None
        except OSError as error:
            raise InputError(
                f"Expected a folder that can be written at {folder} but got: {error.strerror}; choose another store."
            ) from error
        try:
            self._delete_unfinished()
            yield
        finally:
            self._delete_unfinished()  # of this run's killed workers
            (folder / LOCK).unlink(missing_ok=True)  # before it is released: FileLock does not take a deleted file
            lock.release()
            if new:
                with suppress(OSError):  # a refused request leaves no empty folder
                    folder.rmdir()

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file or folder as a path on a disk, for reading only; it need not exist."""
        yield Path(self.where(name))
