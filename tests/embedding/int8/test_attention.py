"""Attention of two products and a compiled softmax, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from distil_rank.embedding.int8 import encoder
from distil_rank.embedding.int8.encoder import MULTIPLE, attend

HEADS, WIDTH = 3, 16


def packed(total: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(total)
    qkv = size * torch.randn(total + MULTIPLE, 3 * HEADS, WIDTH, generator=generator)
    qkv[total:] = 0
    return qkv.bfloat16()


def attended(qkv: torch.Tensor, start: int, length: int, heads: slice = slice(0, HEADS)) -> torch.Tensor:
    out = torch.zeros(len(qkv) - MULTIPLE, HEADS, WIDTH, dtype=torch.bfloat16)
    attend(qkv.unflatten(1, (3, -1)).permute(1, 2, 0, 3), start, length, heads, out)
    return out


def exact(qkv: torch.Tensor, start: int, length: int) -> torch.Tensor:
    q, k, v = qkv[start : start + length].double().transpose(0, 1).chunk(3)
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


@pytest.mark.parametrize("scores", [encoder.SCORES, 2000])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 16), (0, 47), (30, 170), (3, 197)])
def test_it_is_softmax_attention(start, length, scores, monkeypatch):
    monkeypatch.setattr(encoder, "SCORES", scores)
    qkv = packed(200)
    result, expected = attended(qkv, start, length), exact(qkv, start, length)
    rows = slice(start, start + length)
    assert (result[rows] - expected).norm() < 0.01 * expected.norm()
    result[rows] = 0
    assert not result.any(), "other rows are left as they are"


def test_scores_far_apart_leave_one_key():
    qkv = packed(40, size=1.0)
    qkv[:, HEADS : 2 * HEADS] = 0
    qkv[:, :HEADS], qkv[7, HEADS : 2 * HEADS] = 30, 30
    torch.testing.assert_close(attended(qkv, 0, 40), qkv[7, 2 * HEADS :].expand(40, -1, -1))


@pytest.mark.parametrize("offset", [-28.0, 28.0])
def test_a_part_of_all_scores_has_no_effect(offset):
    """Softmax does not change with it, and the powers of scores alone would be 0 or infinite."""
    qkv = packed(60, size=0.5)
    qkv[:, :HEADS, 0], qkv[:, HEADS : 2 * HEADS, 0] = 16, 0
    expected = attended(qkv, 0, 60)
    qkv[:, HEADS : 2 * HEADS, 0] = offset
    result = attended(qkv, 0, 60)
    assert (result - expected).norm() < 0.2 * expected.norm()  # scores of 448 are rounded to even numbers


def test_rows_behind_a_sequence_have_no_effect():
    qkv = packed(100)
    expected = attended(qkv, 10, 50)
    qkv[60:], qkv[:10] = 1000, -1000
    assert torch.equal(attended(qkv, 10, 50), expected)


def test_bytes_depend_neither_on_the_heads_nor_on_the_queries_beside(monkeypatch):
    qkv = packed(200)
    expected = attended(qkv, 0, 200)
    one = sum(attended(qkv, 0, 200, slice(head, head + 1)) for head in range(HEADS))
    assert torch.equal(one, expected)
    monkeypatch.setattr(encoder, "SCORES", 208 * 64)
    assert torch.equal(attended(qkv, 0, 200), expected)
