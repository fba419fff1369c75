"""faiss's candidates against a search in full, for every type of code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_rank.codes import index as index_module
from distil_rank.codes.fit import fit_metric
from distil_rank.codes.index import CodeIndex
from distil_rank.lowrank.encoder import CODE_TYPES


def made(dtype, rank=12, count=900):
    dice = np.random.default_rng(0)
    centres = dice.normal(size=(count // 6, 20))
    x = (np.repeat(centres, 6, axis=0) + dice.normal(size=(count, 20)) * 0.4).astype(np.float32)
    encoder = fit_metric(x, np.ones(count, bool), "whitened").encoder(rank, dtype)
    rows = torch.from_numpy(x)
    return encoder, encoder.encode(rows), encoder(rows[:50])


def in_full(encoder, codes, queries, k):
    scores = queries @ F.normalize(encoder.decode(codes), dim=1).T
    return scores.topk(k)


@pytest.mark.parametrize("rank", [12, 16])  # faiss has its own ways for multiples of 16
@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_every_code_is_looked_at(dtype, rank):
    encoder, codes, queries = made(dtype, rank)
    scores, rows = CodeIndex(codes.numpy(), encoder).search(queries, 10)
    expected = in_full(encoder, codes, queries, 10)
    assert np.allclose(scores, expected.values, atol=1e-5)
    own = F.normalize(encoder.decode(codes), dim=1)[torch.from_numpy(rows)]
    assert np.allclose(scores, torch.einsum("qr,qkr->qk", queries, own), atol=1e-5)
    assert all(len(set(one)) == 10 for one in rows.tolist())


@pytest.mark.parametrize("rank", [12, 16])
@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_inverted_lists_find_most(dtype, rank):
    encoder, codes, queries = made(dtype, rank)
    index = CodeIndex(codes.numpy(), encoder, exact=False)
    assert 1 <= index.visited <= index.lists and index.recall >= index_module.RECALL
    (scores, rows), expected = index.search(queries, 5), in_full(encoder, codes, queries, 5)
    assert (scores >= expected.values[:, -1:].numpy() - 1e-5).mean() > 0.8
    again = CodeIndex(codes.numpy(), encoder, exact=False).search(queries, 5)
    assert np.array_equal(rows, again[1])


def test_more_hits_than_codes():
    encoder, codes, queries = made("bit")
    _, rows = CodeIndex(codes[:4].numpy(), encoder).search(queries, 10)
    assert rows.shape == (50, 4) and set(rows[0]) == {0, 1, 2, 3}


def test_faiss_is_missing(monkeypatch):
    import sys

    from distil_rank.errors import InputError

    monkeypatch.setitem(sys.modules, "faiss", None)
    encoder, codes, _ = made("bit")
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        CodeIndex(codes.numpy(), encoder)
