"""Where the files of a store are: a folder, or objects in S3 below a prefix. All that knows the difference is here.

Both kinds promise what a store relies on:

- a file appears whole or not at all, and takes the place of an older one at once (a rename; a single upload);
- what was written is what every reader finds from then on;
- one process at a time holds the lock, and a dead one does not hold it for long (`locking.py`; `lease.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa

from distil_rank.embedding.locking import exclusive_lock
from distil_rank.errors import InputError

Location = str | Path  # a folder, or s3://BUCKET/NAME

S3 = "s3://"
BATCH_ROWS = 4096  # lines in each record batch of a table of proteins but the last
TEMPORARY = ".planning-"  # prefix of a folder for temporary files


class Storage(ABC):
    """Files by name; a name may have folders before it, as in `parts/vectors-00000/7.arrow`.

    Attributes:
        location: As the user names it.
    """

    location: Location

    def where(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.location}/{name}"

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def entries(self, folder: str = "") -> dict[str, int | None]:
        """Size in bytes of each file in a folder by name, None for a folder in it; nothing if it does not exist."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is none."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """SHA-256 of a file as it was written, in hexadecimal."""

    @abstractmethod
    def sha256_of_content(self, name: str) -> str:
        """SHA-256 of a file, which is read for it."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """An Arrow file, or some of its columns; memory-mapped where it is on a disk.

        Raises:
            InputError: the file is missing or damaged.
        """

    @abstractmethod
    def lines(self, name: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Lines from `start` to below `stop` of a table of proteins.

        Raises:
            InputError: the file is missing or damaged.
        """

    @abstractmethod
    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The record batches of an Arrow file, one in memory at a time."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to write; it appears when the context ends without an exception.

        Raises:
            InputError: it cannot be written; the previous file stays.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file, if it exists."""

    @abstractmethod
    def delete_folder(self, name: str) -> None:
        """Deletes a folder and all that is in it, if it exists."""

    @abstractmethod
    def delete_unfinished(self) -> None:
        """Deletes what killed processes have left of files that never appeared; the caller holds the lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Holds the exclusive lock.

        Raises:
            InputError: another process holds it, or nothing can be written there.
        """

    @abstractmethod
    def scratch(self) -> AbstractContextManager[str]:
        """A folder on a disk for temporary files, deleted at the end."""

    @abstractmethod
    def local_copy(self, name: str) -> AbstractContextManager[Path]:
        """A file or folder as a path on a disk, for reading only; it need not exist."""

    def write(self, name: str, content: bytes | pa.Table) -> None:
        """Writes bytes, or a table as an Arrow file.

        Raises:
            InputError: it cannot be written; the previous file stays.
        """
        with self.writing(name) as file:
            write_content(file, content)

    def write_folder(self, name: str, files: Path, last: str) -> None:
        """Writes all files of a folder on a disk, the one that makes them complete last."""
        for path in sorted(files.iterdir(), key=lambda path: (path.name == last, path.name)):
            self.write(f"{name}/{path.name}", path.read_bytes())


class LocalStorage(Storage):
    """Files in a folder.

    Args:
        folder: Created by `lock` or by the first file.
    """

    def __init__(self, folder: Path):
        self.location = self.folder = folder

    def read_bytes(self, name: str) -> bytes:  # noqa: D102 - as the class above
        return (self.folder / name).read_bytes()

    def entries(self, folder: str = "") -> dict[str, int | None]:  # noqa: D102
        place = self.folder / folder
        paths = sorted(place.iterdir()) if place.is_dir() else []
        return {path.name: None if path.is_dir() else path.stat().st_size for path in paths}

    def size(self, name: str) -> int | None:  # noqa: D102
        path = self.folder / name
        return path.stat().st_size if path.exists() else None

    def sha256(self, name: str) -> str:  # noqa: D102
        return sha256_of(self.folder / name)

    sha256_of_content = sha256

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:  # noqa: D102
        table = read_table(self.folder / name)
        return table if columns is None else table.select(columns)

    def lines(self, name: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:  # noqa: D102
        return self.table(name, columns).slice(start, stop - start)

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:  # noqa: D102
        return read_batches(self.folder / name, columns)

    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:  # noqa: D102
        return atomic_file(self.folder / name)

    def delete(self, name: str) -> None:  # noqa: D102
        (self.folder / name).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:  # noqa: D102
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def delete_unfinished(self) -> None:  # noqa: D102
        for temporary in [*self.folder.glob(".*.arrow*"), *self.folder.glob(".*.json.*")]:
            temporary.unlink(missing_ok=True)
        for folder in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def lock(self) -> AbstractContextManager[None]:  # noqa: D102
        return exclusive_lock(self.folder)

    def scratch(self) -> AbstractContextManager[str]:  # noqa: D102
        return tempfile.TemporaryDirectory(dir=self.folder, prefix=TEMPORARY)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:  # noqa: D102
        yield self.folder / name


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write atomically: temporary file, fsync, rename, fsync of the folder.

    Raises:
        InputError: it cannot be written; the previous file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"Expected to write {path} but got: {error.strerror or error}; free space there, or remove the cause, and "
            "run the same command again: finished work is kept."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | pa.Table) -> None:
    """Writes bytes, or a table as an Arrow file, through an `atomic_file`."""
    with atomic_file(path) as file:
        write_content(file, content)


def write_content(file: IO[bytes], content: bytes | pa.Table) -> None:
    """Writes bytes, or a table as an Arrow file."""
    if isinstance(content, bytes):
        file.write(content)
    else:
        with pa.ipc.new_file(file, content.schema) as writer:
            writer.write_table(content)


def read_table(path: Path) -> pa.Table:
    """Memory-maps an Arrow file.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise missing_or_damaged(str(path)) from error


def missing_or_damaged(where: str) -> InputError:
    """The error for an Arrow file that cannot be read."""
    return InputError(f"Expected an Arrow file at {where} but it is missing or damaged; embed again.")


def open_columns(source: pa.NativeFile, columns: Sequence[str] | None) -> pa.ipc.RecordBatchFileReader:
    """A reader of some columns of an open Arrow file; the others are not read."""
    if columns is None:
        return pa.ipc.open_file(source)
    schema = pa.ipc.open_file(source).schema
    fields = sorted(schema.get_field_index(column) for column in columns)
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, one in memory at a time (a memory-mapped file would count as memory)."""
    with pa.OSFile(str(path)) as source:
        reader = open_columns(source, columns)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield batch if columns is None else batch.select(columns)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
