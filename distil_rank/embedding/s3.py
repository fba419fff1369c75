"""Files of a store as objects in S3, or in anything that speaks its protocol (`AWS_ENDPOINT_URL`), through obstore.

Object storage has no lock that a kernel releases, so the lock is a *lease*: an object that its holder writes again and
again by conditional uploads. It is taken by creating the object (`If-None-Match: *`); the holder replaces it every few
seconds (`If-Match`), and stops when it finds another's in its place; whoever finds an object that stays the same for
`SECONDS`, by its own clock, takes it over: its holder is dead.

Should a holder pause for longer, two processes may compute at the same time: they write the same bytes, and the
manifest is written only right after the lease was renewed.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from distil_rank.artefact import sha256_of
from distil_rank.embedding.storage import LOCK, S3, Storage
from distil_rank.errors import InputError

try:
    from obstore import open_reader
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import S3Store
except ImportError as missing:
    raise InputError(
        f"Expected obstore for a store at {S3}… but it is missing; pip install 'distil-rank[s3]'."
    ) from missing

logger = logging.getLogger(__name__)

SECONDS = 30.0  # without a sign of life, after which a holder counts as dead
LOOKS = 10  # at the object in that time; counted, so that a pause of the observer is not taken for one of the holder
BLOCK = 2**23  # bytes of an object that are read at once
RETRIES: Any = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
_forked = threading.Event()
os.register_at_fork(after_in_child=_forked.set)  # the child has none of the threads that obstore works with


@contextmanager
def _requests(where: str) -> Iterator[None]:
    """Requests to the server, whose errors become ours."""
    if _forked.is_set():
        raise InputError(f"Expected to reach {where} but this process was forked; start it by spawn.")
    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise FileNotFoundError(where) from error
        reason = " ".join(str(error).partition("Debug source")[0].split())[:300]
        raise InputError(
            f"Expected to reach {where} but got: {reason}; check bucket, credentials and AWS_ENDPOINT_URL, and run the "
            "same command again: finished work is kept."
        ) from error


class S3Storage(Storage):
    """Objects below a prefix. Credentials, region and endpoint come from `AWS_…`, or from where boto3 finds them."""

    def __init__(self, location: str):
        bucket, _, prefix = location.removeprefix(S3).partition("/")
        if not bucket or not prefix.strip("/"):
            raise InputError(f"Expected {S3}BUCKET/NAME but got {location}.")
        super().__init__(f"{S3}{bucket}/{prefix.strip('/')}")
        options: dict[str, Any] = {"client_options": {"allow_http": True}, "retry_config": RETRIES}
        if "AWS_ACCESS_KEY_ID" not in os.environ and find_spec("boto3"):
            from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415  (profiles, single sign-on)

            try:
                options["credential_provider"] = Boto3CredentialProvider()
            except ValueError as error:
                raise InputError(f"Expected credentials for {location} but there are none; set AWS_PROFILE.") from error
        self._files = S3Store(bucket, prefix=prefix.strip("/"), **options)
        self._lease: Lease | None = None

    def read_bytes(self, name: str) -> bytes:  # noqa: D102 - as the class above
        with _requests(self.where(name)):
            return self._files.get(name).bytes().to_bytes()

    def entries(self, folder: str = "") -> dict[str, int | None]:  # noqa: D102
        with _requests(self.where(folder)):
            listed = self._files.list_with_delimiter(folder)
        files = {Path(one["path"]).name: one["size"] for one in listed["objects"]}
        return {**dict.fromkeys(Path(one).name for one in listed["common_prefixes"]), **files}

    def size(self, name: str) -> int | None:  # noqa: D102
        try:
            with _requests(self.where(name)):
                return self._files.head(name)["size"]
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str:  # noqa: D102
        with _requests(self.where(name)):
            attributes: Any = self._files.get(name, options={"head": True}).attributes
        return attributes.get("sha256") or self.sha256_of_content(name)

    def _source(self, name: str, stream: bool = False, whole: bool = False) -> pa.NativeFile:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(self.where(name))
        if whole or size <= BLOCK:
            return pa.BufferReader(self.read_bytes(name))
        with _requests(self.where(name)):
            file = open_reader(self._files, name, buffer_size=BLOCK if stream else 2**20, size=size)
        return pa.PythonFile(_File(file), mode="r")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:  # noqa: D102
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            if self._lease is not None and name.endswith(".json") and not self._lease.renew():
                raise InputError(
                    f"Expected to keep the exclusive access to {self.location} but this process did not answer for "
                    f"{SECONDS:.0f} seconds and another has taken over; wait for it."
                )
            attributes: Any = {"sha256": sha256_of(Path(file.name))}
            with _requests(self.where(name)):  # one upload, or several parts that appear together
                self._files.put(name, Path(file.name), attributes=attributes)

    def delete(self, name: str) -> None:  # noqa: D102
        with _requests(self.where(name)):
            self._files.delete(name)

    def delete_folder(self, name: str) -> None:  # noqa: D102
        with _requests(self.where(name)):
            self._files.delete([one["path"] for one in self._files.list(name).collect()])

    def delete_unfinished(self) -> None:
        """Nothing: what was not uploaded whole is no object."""

    @contextmanager
    def lock(self) -> Iterator[None]:  # noqa: D102
        self._lease = Lease(self._files, str(self.location))
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
            with _requests(self.where(name)):
                below = [one["path"] for one in self._files.list(name).collect()]
            for one in below or [name] * (self.size(name) is not None):
                path = Path(folder) / one
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.read_bytes(one))
            yield Path(folder) / name


class _File:
    """An object that can be read from anywhere, with the attribute that pyarrow misses in obstore's."""

    closed = False

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Lease:
    """The exclusive right to plan and finish a store; `where` names it in messages."""

    def __init__(self, files: S3Store, where: str):
        self.files, self.where = files, where
        holder = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex}"
        self._contents = (f"{holder} {number}" for number in count())
        self._version: str | None = None
        self._lost = False
        self._mutex = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lease or raises `InputError`, renews it in a thread, and gives it back."""
        self.acquire()
        end = threading.Event()

        def keep() -> None:
            while not end.wait(SECONDS / LOOKS * 2):
                try:
                    if not self.renew():
                        return
                except InputError as error:  # a connection that comes back
                    logger.warning("%s", error)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            if self.renew():
                with _requests(self.where):
                    self.files.delete(LOCK)

    def acquire(self) -> None:
        """Takes the lease, from a dead holder where there is one; raises `InputError` where it lives."""
        first = last = self._read()
        for look in range(LOOKS):
            if first is None or last is None:
                break
            if look == 0:
                logger.info("%s is locked: looking for %.0f s whether its holder is alive", self.where, SECONDS)
            time.sleep(SECONDS / LOOKS)
            last = self._read()
            if last is not None and last[1] != first[1]:
                raise self._refused(last[0])
        self._version = None if last is None else last[1]
        if not self._put():
            raise self._refused(b"another process")

    def _refused(self, content: bytes) -> InputError:
        who = content.decode(errors="replace").partition("\n")[0]
        return InputError(
            f"Expected exclusive access to {self.where} but {who} is filling it; wait for it, or choose another store."
        )

    def renew(self) -> bool:
        """Writes a sign of life; whether the lease is still this process's."""
        with self._mutex:
            self._lost = self._lost or not self._put()
            return not self._lost

    def _read(self) -> tuple[bytes, str | None] | None:
        """Content and version of the object; None where there is none."""
        try:
            with _requests(f"{self.where}/{LOCK}"):
                answer = self.files.get(LOCK)
                return answer.bytes().to_bytes(), answer.meta["e_tag"]
        except FileNotFoundError:
            return None

    def _upload(self, content: bytes) -> str | None:
        """The object's new version; None where it is not the one any more that this lease knows."""
        with _requests(f"{self.where}/{LOCK}"):
            try:
                mode: Any = "create" if self._version is None else {"e_tag": self._version}
                return self.files.put(LOCK, content, mode=mode)["e_tag"]
            except (AlreadyExistsError, PreconditionError):
                return None

    def _put(self) -> bool:
        """Writes the object in place of the version that this lease knows; whether it is this lease's then."""
        content = next(self._contents).encode()
        version = self._upload(content)
        if version is None:  # unless the answer to an accepted upload was lost, and it was sent again
            last = self._read()
            version = last[1] if last is not None and last[0] == content else None
        self._version = version or self._version
        return version is not None
