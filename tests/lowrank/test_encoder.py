"""Codes against what NumPy and an exhaustive search make of the same vectors."""

import numpy as np
import pytest
import torch

from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CODE_TYPES, CodeEncoder


def encoder(dtype="float32", rank=12, width=20) -> CodeEncoder:
    torch.manual_seed(0)
    return CodeEncoder.of(
        torch.randn(width),
        torch.randn(rank, width),
        dtype,
        torch.rand(rank) / 100 + 0.005 if dtype in ("int8", "bit") else None,
    )


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_shapes_and_bytes(dtype):
    found, x = encoder(dtype), torch.randn(30, 20)
    code = found.encode(x)
    assert code.shape == (30, found.code_width) and code.dtype == found.code_dtype
    assert code[0].numel() * code.element_size() == found.bytes_per_protein
    assert found.bytes_per_protein == {"float32": 48, "int8": 12, "bit": 2}[dtype]
    assert found.decode(code).shape == found(x).shape == (30, 12)
    assert torch.allclose(found(x).norm(dim=1), torch.ones(30))


def test_what_is_stored_is_near_the_query():
    x = torch.randn(200, 20)
    for dtype, cosine in (("float32", 1.0), ("int8", 0.999), ("bit", 0.7)):
        found = encoder(dtype)
        found.scale = None if found.scale is None else found(x).abs().amax(0) / (127 if dtype == "int8" else 1)
        near = torch.cosine_similarity(found(x), found.decode(found.encode(x)))
        assert near.mean() > cosine - 1e-6


@pytest.mark.parametrize("rank", [8, 12, 16])
def test_bits_are_packed_as_numpy_packs_them(rank):
    found, x = encoder("bit", rank), torch.randn(50, 20)
    signs = (found(x) > 0).numpy()
    assert np.array_equal(found.encode(x).numpy(), np.packbits(signs, axis=1, bitorder="little"))
    assert np.array_equal(found.decode(found.encode(x)).numpy() > 0, signs)


@pytest.mark.parametrize("dtype", ["float32", "bit"])
def test_nested_ranks(dtype):
    large, x = encoder(dtype), torch.randn(30, 20)
    small = large.truncate(8)
    expected = CodeEncoder.of(large.mean, large.weight[:8], dtype, None if large.scale is None else large.scale[:8])
    assert torch.equal(small.encode(x), expected.encode(x)) and small.digest == expected.digest != large.digest
    if dtype == "bit":
        assert torch.equal(small.encode(x), large.encode(x)[:, :1])


def test_what_is_refused():
    for call, message in [
        (lambda: CodeEncoder(4, 5), "[1, 4]"),
        (lambda: CodeEncoder(4, 2, "int4"), "int4"),
        (lambda: encoder().truncate(13), "[1, 12]"),
        (lambda: encoder("int8").truncate(4), "fit it at 4"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)


def test_vectors_of_another_origin():
    found = encoder()
    found.provenance = {"weights_sha256": "a" * 64, "layer": 4}
    same = {"dim": 20, "weights_sha256": "a" * 64, "layer": 4, "pooling": "bos"}  # what is not known is not compared
    found.check_origin(same, "a store")
    for key, value in (("dim", 21), ("weights_sha256", "b" * 64), ("layer", None)):
        with pytest.raises(InputError, match=f"those of a store differ .{key} "):
            found.check_origin({**same, key: value}, "a store")
