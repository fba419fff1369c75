"""Places of stores as users name them: a folder, or `s3://BUCKET/NAME`."""

from __future__ import annotations

import re
from pathlib import Path

from distil_rank.embedding.storage import S3, Location, Storage
from distil_rank.errors import InputError

_SCHEME = re.compile(r"[a-z0-9+]+:/")  # also of an address that `Path` has shortened


def is_remote(location: Location) -> bool:
    """Whether a location is in an object storage.

    Raises:
        InputError: in one of another kind than S3.

    >>> is_remote("s3://bucket/store"), is_remote("embeddings/store")
    (True, False)
    """
    if _SCHEME.match(str(location)) and not str(location).startswith(S3):
        raise InputError(f"Expected a folder or {S3}BUCKET/NAME but got {location}.")
    return str(location).startswith(S3)


def absolute(location: Location) -> Location:
    """The same place for a process with another working directory."""
    return location if is_remote(location) else Path(location).absolute()


def open_storage(location: Location) -> Storage:
    """The files at a location, which need not exist.

    Raises:
        InputError: an address of another kind of storage, or a package for this one is missing.
    """
    if not is_remote(location):
        return Storage(Path(location))
    from distil_rank.embedding.s3 import S3Storage  # noqa: PLC0415  (optional: the s3 extra)

    return S3Storage(str(location))
