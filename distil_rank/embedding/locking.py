"""One process at a time fills a store."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distil_rank.errors import InputError


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds a folder's exclusive lock; the kernel releases it when the process dies.

    Args:
        folder: Created if missing, and deleted again if it is empty at the end.

    Raises:
        InputError: another process holds it, or the folder cannot be made.
    """
    path = folder / ".lock"
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise InputError(
            f"Expected a folder that can be written at {folder} but got: {error.strerror}; choose another store."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a lock file that its last holder has just deleted excludes nobody
            locked = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            locked = False
        if not locked:
            raise InputError(
                f"Expected exclusive access to {folder} but another process is filling it; wait for it, or "
                "choose another store."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # a refused request leaves no empty folder
                    folder.rmdir()
