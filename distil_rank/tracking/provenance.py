"""Versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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
