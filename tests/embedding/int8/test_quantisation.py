"""Integer products against the same in float64."""

import pytest
import torch

from distil_rank.embedding.int8.quantisation import ZERO_POINT, Int8Linear, has_int8_units, round_weight


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "avx512_f"])
def test_units_follow_the_hardware(flag, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert has_int8_units() == (flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


@pytest.mark.skipif(not has_int8_units(), reason="needs a processor with int8 units (VNNI or AMX)")
@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("zero_point", [ZERO_POINT, 0])
def test_products_are_those_of_the_integers(rows, zero_point):
    x, weight = torch.randint(0, 256, (rows, 96), dtype=torch.uint8), torch.randn(160, 96)
    integers, scales = round_weight(weight)
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    expected = (x.double() - zero_point) @ integers.double().T
    assert torch.equal(Int8Linear(integers, torch.ones_like(scales), zero_point)(x).double(), expected)
    scaled = Int8Linear(integers, scales, zero_point)(x)
    torch.testing.assert_close(scaled.double(), expected * scales, rtol=1e-5, atol=1e-5)
    low = Int8Linear(integers, scales, zero_point, torch.bfloat16)(x)
    assert torch.equal(low, scaled.bfloat16())
