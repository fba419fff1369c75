"""Files that are there whole or not at all, and the hashed folder: files beside a manifest that knows what is in them.

Reading a folder checks every hash before anything is handed out, and nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from distil_rank.errors import InputError

MANIFEST = "manifest.json"
VERSION = 1  # of the manifest's layout
UNFINISHED = ".unfinished-"  # prefix of temporary files and folders, which a killed process leaves behind


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write atomically: temporary file, fsync, rename, fsync of the folder; `InputError` where it fails."""
    temporary = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}")  # which does not end in .arrow
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


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file of which readers see all or nothing; see `atomic_file`."""
    with atomic_file(Path(path)) as file:
        file.write(content)


def json_text(value: Any, indent: int | None = 1) -> str:
    """A value as JSON; NaN and infinity become null, numbers of numpy and torch plain ones.

    >>> json_text({"r2": float("nan"), "ranks": (1, 2)}, indent=None)
    '{"r2": null, "ranks": [1, 2]}'
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(f"Expected JSON values to save but got a {type(value).__name__}.")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: str | Path, format: str | None = None) -> None:
    """Raise `InputError` if no folder can be written there, or it holds anything but a manifest of that format."""
    path = folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    problem = None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = f"{folder} cannot be written to" if folder.is_dir() else f"{folder} is a file"
    elif format is not None and any(not file.name.startswith(".") for file in path.glob("*")):
        content = _former_manifest(path).get("format")
        if content != format:
            problem = "it holds other files" if content is None else f"it holds {content!r}"
    if problem is not None:
        raise InputError(f"Expected a folder to save to at {path} but {problem}; name another place.")


def write_folder(path: str | Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Write files and the manifest that names their sizes and hashes; what the former manifest named is replaced.

    The manifest, whose `format` says what kind of folder it is, comes last. Whatever fails before leaves the folder as
    it was; in between the hashes do not fit, so a mixture is never read.

    Raises:
        InputError: values that are no JSON, or a place that cannot be written or holds something else.
    """
    path = Path(path)
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    content = _plain({"version": VERSION, **manifest, "files": entries})
    check_writable(path, content["format"])
    content["sha256"] = _manifest_digest(content)
    everything = {**files, MANIFEST: f"{json_text(content)}\n".encode()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        former = {name for name in _former_manifest(path).get("files", ()) if Path(name).name == name}
        for name, data in everything.items():
            write_atomically(path / f".{name}.new", data)
        for name in everything:
            (path / f".{name}.new").replace(path / name)
        for name in former - everything.keys():
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"Expected to write to {path} but: {error.strerror}; name another place.") from error
    return path


def read_folder(path: str | Path, format: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest of a folder and its files by name, after its own hash and theirs were checked.

    Raises:
        InputError: no such folder, one of another format or a later version, or one that was changed or cut short.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        kind, version, files = manifest["format"], manifest["version"], dict(manifest["files"])
        entries = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
    except FileNotFoundError as error:
        raise InputError(f"Expected a saved folder at {path} but it has no {MANIFEST}; check the path.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"Expected a manifest in {path / MANIFEST} but it cannot be read; save it again.") from error
    if kind != format or not isinstance(version, int) or version < 1:
        raise InputError(f"Expected {format!r} in {path} but its manifest is of {kind!r} {version!r}.")
    if version > VERSION:
        raise InputError(f"Expected a folder of version {VERSION} but {path} has {version}; upgrade distil-rank.")
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise InputError(f"Expected {path / MANIFEST} as it was saved but its hash differs; get or save it again.")
    for name, (size, digest) in entries.items():
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"Expected files in {path} alone but its manifest lists {name!r}; get or save it again.")
        if not (path / name).is_file():
            raise InputError(f"Expected {name} in {path} but it is missing; get or save it again.")
        if (path / name).stat().st_size != size or sha256_of(path / name) != digest:
            raise InputError(f"Expected {path / name} as it was saved but its hash differs; get or save it again.")
    return manifest, {name: path / name for name in entries}


def _former_manifest(path: Path) -> dict[str, Any]:
    """What a folder's manifest says of itself, unchecked; empty where there is none."""
    try:
        return dict(json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
