"""Files of a store as objects in S3, or in anything that speaks its protocol (`AWS_ENDPOINT_URL`).

Through boto3 itself: the lock takes uploads under a condition (`If-Match`), which neither fsspec nor pyarrow's file
systems offer. Credentials, region, profile and endpoint are found as in every program that uses it.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from distil_rank.embedding.lease import Lease
from distil_rank.embedding.storage import (
    BATCH_ROWS,
    S3,
    Storage,
    missing_or_damaged,
    open_columns,
    read_batches,
    sha256_of,
)
from distil_rank.errors import InputError

try:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError as missing:
    raise InputError(f"Expected boto3 for a store at {S3}… but it is missing; pip install boto3.") from missing

ABSENT = ("404", "NoSuchKey")
REFUSED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict", *ABSENT)
LOCK = ".lock"
DELETED_AT_ONCE = 1000  # the protocol's limit


@cache
def _client() -> Any:
    """boto3's, one for a process; it may be used by several threads."""
    return boto3.client("s3", config=Config(retries={"mode": "standard", "total_max_attempts": 6}))


os.register_at_fork(after_in_child=_client.cache_clear)  # its connections belong to the parent


class S3Storage(Storage):
    """Objects below a prefix.

    Args:
        location: `s3://BUCKET/NAME`.
    """

    def __init__(self, location: str):
        self.bucket, _, prefix = location.removeprefix(S3).partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket or not self.prefix:
            raise InputError(f"Expected {S3}BUCKET/NAME but got {location}.")
        self.location = f"{S3}{self.bucket}/{self.prefix}"
        self._lease: Lease | None = None

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}"}

    @contextmanager
    def _requests(self, name: str) -> Iterator[Any]:
        """boto3's client; its errors become ours."""
        try:
            yield _client()
        except (BotoCoreError, Boto3Error, ClientError) as error:
            if _code_of(error) in ABSENT:
                raise FileNotFoundError(self.where(name)) from error
            raise InputError(
                f"Expected to reach {self.where(name)} but got: {' '.join(str(error).split())[:200]}; check bucket, "
                "credentials and AWS_ENDPOINT_URL, and run the same command again: finished work is kept."
            ) from error

    def read_bytes(self, name: str) -> bytes:  # noqa: D102 - as the class above
        with self._requests(name) as client:
            content: bytes = client.get_object(**self._object(name))["Body"].read()
        return content

    def entries(self, folder: str = "") -> dict[str, int | None]:  # noqa: D102
        prefix = f"{self.prefix}/{folder}/" if folder else f"{self.prefix}/"
        found: dict[str, int | None] = {}
        with self._requests(folder) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            for page in pages:
                found |= {one["Key"].removeprefix(prefix): one["Size"] for one in page.get("Contents", [])}
                folders = (one["Prefix"] for one in page.get("CommonPrefixes", []))
                found |= {one.removeprefix(prefix).rstrip("/"): None for one in folders}
        return found

    def _head(self, name: str) -> dict[str, Any]:
        with self._requests(name) as client:
            head: dict[str, Any] = client.head_object(**self._object(name))
        return head

    def size(self, name: str) -> int | None:  # noqa: D102
        try:
            return int(self._head(name)["ContentLength"])
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str:  # noqa: D102
        return self._head(name)["Metadata"].get("sha256") or self.sha256_of_content(name)

    def sha256_of_content(self, name: str) -> str:  # noqa: D102
        digest = hashlib.sha256()
        with self._requests(name) as client:
            for block in client.get_object(**self._object(name))["Body"].iter_chunks(2**20):
                digest.update(block)
        return digest.hexdigest()

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:  # noqa: D102
        if columns is not None:
            with self._reader(name, columns) as reader:
                return reader.read_all().select(columns)
        try:
            return pa.ipc.open_file(pa.py_buffer(self.read_bytes(name))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise missing_or_damaged(self.where(name)) from error

    def lines(self, name: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:  # noqa: D102
        first = start // BATCH_ROWS
        with self._reader(name, columns) as reader:
            batches = [reader.get_batch(number) for number in range(first, 1 + (stop - 1) // BATCH_ROWS)]
        table = pa.Table.from_batches(batches).select(columns)
        return table.slice(start - first * BATCH_ROWS, stop - start)

    @contextmanager
    def _reader(self, name: str, columns: Sequence[str]) -> Iterator[pa.ipc.RecordBatchFileReader]:
        """Reads the parts of an Arrow file that the columns take."""
        try:
            with pa.PythonFile(_Ranges(self, name), mode="r") as source:
                yield open_columns(source, columns)
        except (OSError, pa.ArrowException) as error:
            raise missing_or_damaged(self.where(name)) from error

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:  # noqa: D102
        with self.local_copy(name) as path:
            yield from read_batches(path, columns)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:  # noqa: D102
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            if self._lease is not None and name.endswith(".json"):
                self._lease.check()
            extra = {"Metadata": {"sha256": sha256_of(Path(file.name))}}
            with self._requests(name) as client:  # one upload, or several parts that appear together
                client.upload_file(file.name, *self._object(name).values(), ExtraArgs=extra)

    def delete(self, name: str) -> None:  # noqa: D102
        with self._requests(name) as client:
            client.delete_object(**self._object(name))

    def delete_folder(self, name: str) -> None:  # noqa: D102
        with self._requests(name) as client:
            names = self._names_below(name)
            for start in range(0, len(names), DELETED_AT_ONCE):
                keys = [{"Key": f"{self.prefix}/{one}"} for one in names[start : start + DELETED_AT_ONCE]]
                client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})

    def _names_below(self, folder: str) -> list[str]:
        """Names of all files in a folder and in those within it."""
        prefix = f"{self.prefix}/{folder}/"
        with self._requests(folder) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [one["Key"].removeprefix(f"{self.prefix}/") for page in pages for one in page.get("Contents", [])]

    def delete_unfinished(self) -> None:
        """Nothing: what was not uploaded whole is no object."""

    @contextmanager
    def lock(self) -> Iterator[None]:  # noqa: D102
        self._lease = Lease(_LockObject(self), str(self.location))
        try:
            with self._lease.held():
                yield
        finally:
            self._lease = None

    def scratch(self) -> AbstractContextManager[str]:  # noqa: D102
        return tempfile.TemporaryDirectory()

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:  # noqa: D102
        with tempfile.TemporaryDirectory() as folder:
            for one in [name] if self.size(name) is not None else self._names_below(name):
                path = Path(folder) / one
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._requests(one) as client:
                    client.download_file(*self._object(one).values(), str(path))
            yield Path(folder) / name


class _LockObject:
    """The object that holds the lease."""

    def __init__(self, storage: S3Storage):
        self.storage = storage

    def read(self) -> tuple[bytes, str] | None:
        try:
            with self.storage._requests(LOCK) as client:
                found = client.get_object(**self.storage._object(LOCK))
                return found["Body"].read(), found["ETag"]
        except FileNotFoundError:
            return None

    def put(self, content: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self.storage._requests(LOCK) as client:
            try:
                etag: str = client.put_object(**self.storage._object(LOCK), Body=content, **condition)["ETag"]
            except ClientError as error:
                if _code_of(error) in REFUSED:
                    return None
                raise
        return etag

    def delete(self) -> None:
        self.storage.delete(LOCK)


class _Ranges(io.RawIOBase):
    """An object as a file that can be read from anywhere, one request for each read."""

    def __init__(self, storage: S3Storage, name: str):
        super().__init__()
        self.storage, self.name = storage, name
        self.length = int(storage._head(name)["ContentLength"])
        self.position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        stop = self.length if size < 0 else min(self.position + size, self.length)
        if self.position >= stop:
            return b""
        with self.storage._requests(self.name) as client:
            request = {**self.storage._object(self.name), "Range": f"bytes={self.position}-{stop - 1}"}
            content: bytes = client.get_object(**request)["Body"].read()
        self.position += len(content)
        return content


def _code_of(error: Exception) -> str:
    """The protocol's name for an error."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""
