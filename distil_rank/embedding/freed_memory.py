"""What becomes of freed memory: glibc keeps some of it, and by default neither enough nor little enough for us.

Without glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

# glibc's M_MMAP_THRESHOLD (at most 32), M_TRIM_THRESHOLD and M_TOP_PAD, in MiB
MALLOC_OPTIONS = {-3: 32, -1: 1024, -2: 64}


@cache
def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones, for the whole process.

    By default it returns most of it to the kernel after every batch and requests it again for the next.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        for option, mebibytes in MALLOC_OPTIONS.items():
            mallopt(option, mebibytes << 20)


def return_freed_memory() -> None:
    """Returns to the kernel what lies between tensors that stay, as after the conversion of a layer's weights."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
