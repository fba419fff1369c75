"""What a processor multiplies follows its flags."""

import pytest
import torch

from distil_rank.embedding.hardware import has_bf16_units, has_int8_units


@pytest.mark.parametrize(
    ("flag", "int8", "bf16"),
    [
        ("avx512_vnni", True, False),
        ("avx_vnni", True, False),
        ("amx_int8", True, False),
        ("avx512_bf16", False, True),
        ("amx_bf16", False, True),
        ("avx512_f", False, False),
    ],
)
def test_units_follow_the_hardware(flag, int8, bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert (has_int8_units(), has_bf16_units()) == (int8, bf16)
