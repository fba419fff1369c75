"""Integer products against the same in float64."""

import pytest
import torch

from distil_rank.embedding import int8_linear
from distil_rank.embedding.int8_linear import (
    LEVELS,
    UNSIGNED_LEVELS,
    ZERO_POINT,
    Int8Linear,
    has_int8_units,
    round_positive_rows,
    round_rows,
    round_weight,
)

needs_units = pytest.mark.skipif(not has_int8_units(), reason="needs a processor with int8 units (VNNI or AMX)")


@needs_units
@pytest.mark.parametrize("rows", [64, 128, 192])
def test_products_are_those_of_the_rounded_numbers(rows):
    x, weight = torch.randn(rows, 96), torch.randn(160, 96)
    integers, scales = round_weight(weight)
    signed = round_rows(x)
    expected = (signed.values.double() - ZERO_POINT) @ integers.double().T
    product = Int8Linear(integers, torch.ones_like(scales), ZERO_POINT)(signed.values)
    assert torch.equal(product.double(), expected), "exact integers"
    scaled = Int8Linear(integers, scales, ZERO_POINT)(signed.values) * signed.scales
    torch.testing.assert_close(scaled, x @ weight.T, atol=1, rtol=0)

    positive = round_positive_rows(x.abs())
    expected = positive.values.double() @ integers.double().T
    product = Int8Linear(integers, torch.ones_like(scales), 0)(positive.values)
    assert torch.equal(product.double(), expected)


def test_a_step_is_a_row_s_largest_value_over_the_levels():
    x = torch.tensor([[1.0, -2.0, 0.0], [1000.0, 10.0, -1.0], [0.0, 0.0, 0.0]])
    values, scales = round_rows(x)
    assert scales[:, 0].tolist()[:2] == pytest.approx([2 / LEVELS, 1000 / LEVELS])
    assert ((values - 128.0) * scales - x).abs().max(1).values.le(scales[:, 0] * 0.5001 + 1e-6).all()
    values, scales = round_positive_rows(torch.tensor([[0.0, 51.0, 255.0], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[0, 51, UNSIGNED_LEVELS], [0, 0, 0]]
    assert scales[0, 0] == 1


def test_rounding_is_the_same_without_torch_s_quantised_tensors(monkeypatch):
    x = torch.cat([torch.arange(-600, 600) / 4, 60 * torch.randn(2000)])[None]
    for zero_point in (0, 128):
        fast = int8_linear._bytes(x, zero_point)
        assert torch.equal(fast, int8_linear._bytes_in_steps(x, zero_point))
        with monkeypatch.context() as patch:
            patch.delattr(torch, "quantize_per_tensor")
            assert torch.equal(fast, int8_linear._bytes(x, zero_point))


def test_int8_units_follow_the_hardware(monkeypatch):
    for flag, expected in (("avx512_vnni", True), ("avx_vnni", True), ("amx_int8", True), ("avx512_bf16", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert has_int8_units() is expected
