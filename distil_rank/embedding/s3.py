"""Files of a store as objects in S3, or in anything that speaks its protocol (`AWS_ENDPOINT_URL`), through obstore.

Object storage has no lock that a kernel releases, so the lock is a *lease*: an object that its holder writes again and
again by conditional uploads. It is taken by creating the object (`If-None-Match: *`); the holder replaces it every few
seconds (`If-Match`), and stops when it finds another's in its place; whoever finds an object that stays the same for
`SECONDS`, by its own clock, takes it over: its holder is dead.

Should a holder pause for longer, two processes may compute at the same time: they write the same bytes, and the
manifest is written only right after the lease was renewed.
"""

import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pyarrow as pa

from distil_rank.artefact import sha256_of
from distil_rank.embedding.storage import LOCK, S3, Storage
from distil_rank.errors import InputError

try:
    from botocore.exceptions import BotoCoreError
    from obstore import open_reader
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import S3Store
except ImportError as missing:
    raise InputError(
        f"Expected obstore and boto3 for a store at {S3}… but got: {missing}; pip install 'distil-rank[s3]'."
    ) from missing

logger = logging.getLogger(__name__)

SECONDS = 30.0  # without a sign of life, after which a holder counts as dead
LOOKS = 10  # at the object in that time; counted, so that a pause of the observer is not taken for one of the holder
BLOCK = 2**23  # bytes of an object that are read at once
RETRIES: Any = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
PROCESS = os.getpid()  # a fork has none of the threads that obstore works with


@contextmanager
def _requests(where: str) -> Iterator[None]:
    """Requests to the server, whose errors become ours."""
    if os.getpid() != PROCESS:
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
    """Objects below a prefix. Credentials and region are those that boto3 finds: `AWS_…`, a profile, single sign-on."""

    def __init__(self, location: str):
        bucket, _, prefix = location.removeprefix(S3).strip("/").partition("/")
        if not bucket or not prefix:
            raise InputError(f"Expected {S3}BUCKET/NAME but got {location}.")
        super().__init__(f"{S3}{bucket}/{prefix}")
        try:
            credentials = Boto3CredentialProvider()
        except (ValueError, BotoCoreError) as error:
            raise InputError(f"Expected credentials for {location} but there are none; set AWS_PROFILE.") from error
        options: Any = {"client_options": {"allow_http": True}, "retry_config": RETRIES}
        self._files = S3Store(bucket, prefix=prefix, credential_provider=credentials, **options)
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
        with suppress(FileNotFoundError), _requests(self.where(name)):
            return self._files.head(name)["size"]
        return None

    def fingerprint(self, name: str) -> dict[str, Any]:  # noqa: D102
        with _requests(self.where(name)):
            answer: Any = self._files.get(name, options={"head": True})
        return {"bytes": answer.meta["size"], "sha256": answer.attributes.get("sha256") or self.sha256(name)}

    @contextmanager
    def _source(self, name: str, stream: bool = False) -> Iterator[pa.NativeFile]:
        with _requests(self.where(name)):
            file = open_reader(self._files, name, buffer_size=BLOCK)
            calls = {call: getattr(file, call) for call in ("read", "seek", "tell", "close")}
            yield pa.PythonFile(SimpleNamespace(**calls, closed=False), mode="r")  # obstore's has no `closed`

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
            attributes: Any = {"sha256": sha256_of(file.name)}
            with _requests(self.where(name)):  # one upload, or several parts that appear together
                self._files.put(name, Path(file.name), attributes=attributes)

    def delete(self, name: str) -> None:  # noqa: D102
        with _requests(self.where(name)):
            self._files.delete(name)

    def delete_folder(self, name: str) -> None:  # noqa: D102
        with _requests(self.where(name)):
            self._files.delete([one["path"] for one in self._files.list(name).collect()])

    @contextmanager
    def lock(self) -> Iterator[None]:  # noqa: D102
        self._lease = Lease(self._files, str(self.location))
        try:
            with self._lease.held():
                yield
        finally:
            self._lease = None

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:  # noqa: D102
        files = [f"{name}/{file}" for file in self.entries(name)] or [name] * (self.size(name) is not None)
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                path = Path(folder) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.read_bytes(file))
            yield Path(folder) / name


class Lease:
    """The exclusive right to plan and finish a store; `where` names it in messages."""

    def __init__(self, files: S3Store, where: str):
        self.files, self.where = files, where
        self._holder = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex} "
        self._version: str | None = None  # of the object, as this process last saw it
        self._mutex = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lease or raises `InputError`, renews it in a thread, and gives it back."""
        self.acquire()
        end = threading.Event()

        def keep() -> None:
            while not end.wait(SECONDS / 5):
                with suppress(InputError):  # a connection that comes back
                    self.renew()

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
        if first is not None:
            logger.info("%s is locked: looking for %.0f s whether its holder is alive", self.where, SECONDS)
        for _ in range(LOOKS):
            if last is None or last != first:
                break
            time.sleep(SECONDS / LOOKS)
            last = self._read()
        self._version = None if last is None else last[1]
        if last not in (None, first) or not self.renew():
            holder = last[0].decode(errors="replace").partition("\n")[0] if last else "another process"
            raise InputError(
                f"Expected exclusive access to {self.where} but {holder} is filling it; wait for it, or choose another "
                "store."
            )

    def renew(self) -> bool:
        """Writes a sign of life in place of the version that this process knows; whether the lease is still its own."""
        content = f"{self._holder}{time.time_ns()}".encode()
        mode: Any = "create" if self._version is None else {"e_tag": self._version}
        with self._mutex, _requests(f"{self.where}/{LOCK}"):
            try:
                self._version = self.files.put(LOCK, content, mode=mode)["e_tag"]
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                last = self._read()
                if last is None or not last[0].startswith(self._holder.encode()):
                    return False
                self._version = last[1]  # the upload was accepted, its answer lost
        return True

    def _read(self) -> tuple[bytes, str | None] | None:
        """Content and version of the object; None where there is none."""
        with suppress(FileNotFoundError), _requests(f"{self.where}/{LOCK}"):
            answer = self.files.get(LOCK)
            return answer.bytes().to_bytes(), answer.meta["e_tag"]
        return None
