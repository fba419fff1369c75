"""The provenance of a result: versions, git commit, user and command."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("distil-rank", "torch", "lightning", "torchmetrics", "mlflow", "fair-esm")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; `"not installed"` where one is missing.

    >>> "torch" in versions()
    True
    """
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


@cache
def commit() -> tuple[str, bool] | None:
    """The git commit of the repository that holds this package, and whether files differ from it; None outside one."""
    head = _git("rev-parse", "HEAD")
    return (head, bool(_git("status", "--porcelain"))) if head else None


def user() -> str:
    """Who runs this; containers may have users without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def command() -> str:
    """The program or module that runs, without its folder."""
    program = Path(sys.argv[0])
    return program.parent.name if program.name == "__main__.py" else program.name or "python"


def _git(*arguments: str) -> str:
    """The output of git for this package's folder; empty without git or a repository."""
    try:
        called = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(called, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
