"""What this machine multiplies natively, and what becomes of the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch

# glibc's M_MMAP_THRESHOLD (at most 32), M_TRIM_THRESHOLD and M_TOP_PAD, in MiB
MALLOC_OPTIONS = {-3: 32, -1: 1024, -2: 64}


def has_int8_units() -> bool:
    """Whether this processor has units for int8 (VNNI or AMX); without them oneDNN's sums can saturate."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_vnni", "avx_vnni", "amx_int8")))


def has_bf16_units() -> bool:
    """Whether this processor has units for bfloat16 (AVX512-BF16 or AMX)."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))


@cache
def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones, instead of returning it after every batch."""
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
