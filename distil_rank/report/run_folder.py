"""A folder for the results of each run, with a link `latest` beside it."""

from __future__ import annotations

import logging
import os
import shutil
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)


def run_folder(parent: Path, run_id: str) -> Path:
    """Make `<parent>/<date>-<time>-<start of the run's id>`, which no other run has.

    Args:
        parent: of all runs of one kind.
        run_id: MLflow's.
    """
    folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{run_id[:8]}"
    folder.mkdir(parents=True)
    return folder


def set_latest(folder: Path) -> Path:
    """Point `latest`, beside a run's folder, to it; returns the link."""
    return link(folder.parent / "latest", folder)


def publish(folder: Path, place: Path) -> None:
    """Point `latest` to a run's folder, and at `place` every name in it to the latest run's."""
    latest = set_latest(folder)
    for entry in sorted(folder.iterdir()):
        link(place / entry.name, latest / entry.name)


def link(path: Path, target: Path) -> Path:
    """Make `path` a relative symbolic link to `target`, or a copy of it where the file system has no links.

    Whatever link or copy is there is replaced; returns `path`.
    """
    new = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(os.path.relpath(target, path.parent))
    except OSError as error:
        log.warning("No symbolic links here (%s): %s is a copy of %s.", error.strerror, path, target)
        shutil.copytree(target, new) if target.is_dir() else shutil.copy2(target, new)
    if path.is_dir() and not path.is_symlink():  # an earlier copy; a folder cannot be replaced in one step
        shutil.rmtree(path)
    new.replace(path)
    return path
