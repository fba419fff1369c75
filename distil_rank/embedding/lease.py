"""One process at a time fills a store in S3: an object that its holder writes again and again.

Object storage has no lock that a kernel releases, so the lock is a *lease*. Each step is one conditional upload, which
the server accepts only if the object is still the one that was seen:

- it is taken by creating the object (`If-None-Match: *`);
- the holder replaces it every few seconds (`If-Match`), and stops writing when it finds another's in its place;
- whoever finds an object that stays the same for `SECONDS` takes it over (`If-Match`): its holder is dead. Times are
  the observer's own, so that clocks need not agree.

Should a holder pause for longer than that, two processes may compute at the same time: they write the same bytes, since
parts and shards depend on nothing else, and the manifest is written only right after the lease was renewed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

SECONDS = 30.0  # without a sign of life, after which a holder counts as dead
LOOKS = 10  # at the object in that time; counted, so that a pause of the observer is not taken for one of the holder


class ConditionalObject(Protocol):
    """One object that is read and replaced under conditions."""

    def read(self) -> tuple[bytes, str] | None:
        """Content and version; None where there is none."""

    def put(self, content: bytes, version: str | None) -> str | None:
        """Uploads if the object still has this version (None: does not exist); its new version, None if refused."""

    def delete(self) -> None:
        """Deletes it."""


class Lease:
    """The exclusive right to plan and finish a store.

    Args:
        file: What it is kept in.
        where: The store, for messages.
    """

    def __init__(self, file: ConditionalObject, where: str):
        self.file, self.where = file, where
        self._holder = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._renewals = 0
        self._version: str | None = None
        self._lost = False
        self._mutex = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Takes the lease, renews it in a thread, and gives it back.

        Raises:
            InputError: another process holds it.
        """
        self._acquire()
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self._renew():
                self.file.delete()

    def check(self) -> None:
        """Renews the lease.

        Raises:
            InputError: another process has taken it over.
        """
        if not self._renew():
            raise InputError(
                f"Expected to keep the exclusive access to {self.where} but this process did not answer for "
                f"{SECONDS:.0f} seconds and another has taken over; wait for it."
            )

    def _acquire(self) -> None:
        first, looks = self.file.read(), 0
        found = first
        while found is not None:
            if first is None or found[1] != first[1]:
                raise self._refused(found[0])
            if looks == LOOKS:
                break
            if looks == 0:
                logger.info("%s is locked: looking for %.0f s whether its holder is alive", self.where, SECONDS)
            looks += 1
            time.sleep(SECONDS / LOOKS)
            found = self.file.read()
        self._version = None if found is None else found[1]
        if not self._put():
            raise self._refused(b"{}")

    def _refused(self, content: bytes) -> InputError:
        try:
            holder = json.loads(content)
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return InputError(
            f"Expected exclusive access to {self.where} but {who} is filling it; wait for it, or choose another store."
        )

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(SECONDS / LOOKS * 2):
            try:
                if not self._renew():
                    return
            except InputError as error:  # a connection that comes back
                logger.warning("%s", error)

    def _renew(self) -> bool:
        with self._mutex:
            self._lost = self._lost or not self._put()
            return not self._lost

    def _put(self) -> bool:
        """Writes the object in place of the version that this lease knows; whether it is this lease's then."""
        self._renewals += 1
        content = json.dumps({**self._holder, "renewals": self._renewals}).encode()
        version = self.file.put(content, self._version)
        if version is None:  # unless the answer to an accepted upload was lost, and it was sent again
            found = self.file.read()
            version = found[1] if found is not None and found[0] == content else None
        self._version = version or self._version
        return version is not None
