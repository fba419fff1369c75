"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores, GPU if there is one, and the version of torch, on one line.

    >>> "torch" in machine()
    True
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    parts = [", ".join(sorted(names)) or platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*parts, f"torch {torch.__version__}"])
