"""What this processor multiplies natively."""

from __future__ import annotations

import torch


def has_int8_units() -> bool:
    """Whether there are units for int8 (VNNI or AMX); without them oneDNN's sums can saturate."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8")


def has_bf16_units() -> bool:
    """Whether there are units for bfloat16 (AVX512-BF16 or AMX)."""
    return _has("avx512_bf16", "amx_bf16")


def _has(*names: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in names)
