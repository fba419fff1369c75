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
    encoder = fit_metric(x, np.ones(count, bool), "whitened").encoder(rank, dtype, rank // 4 if dtype == "pq" else None)
    rows = torch.from_numpy(x)
    return encoder, encoder.encode(rows), encoder(rows[:50])


def in_full(encoder, codes, queries, k):
    scores = queries @ F.normalize(encoder.decode(codes), dim=1).T
    return scores.topk(k)


@pytest.mark.parametrize("rank", [12, 16])  # faiss has its own ways for multiples of 16
@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_every_code_is_looked_at(dtype, rank):
    encoder, codes, queries = made(dtype, rank)
    found = CodeIndex.build(codes.numpy(), encoder).search(queries, 10)
    expected = in_full(encoder, codes, queries, 10)
    assert np.allclose(found.scores, expected.values, atol=1e-5)
    own = F.normalize(encoder.decode(codes), dim=1)[torch.from_numpy(found.rows)]
    assert np.allclose(found.scores, torch.einsum("qr,qkr->qk", queries, own), atol=1e-5)
    assert all(len(set(rows)) == 10 for rows in found.rows.tolist())


@pytest.mark.parametrize("rank", [12, 16])
@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_inverted_lists_find_most(dtype, rank):
    encoder, codes, queries = made(dtype, rank)
    index = CodeIndex.build(codes.numpy(), encoder, exact=False)
    assert 1 <= index.visited <= index.lists and index.recall >= index_module.RECALL
    found, expected = index.search(queries, 5), in_full(encoder, codes, queries, 5)
    assert (found.scores >= expected.values[:, -1:].numpy() - 1e-5).mean() > 0.8
    again = CodeIndex.build(codes.numpy(), encoder, exact=False).search(queries, 5)
    assert np.array_equal(found.rows, again.rows)


def test_more_hits_than_codes():
    encoder, codes, queries = made("bit")
    found = CodeIndex.build(codes[:4].numpy(), encoder).search(queries, 10)
    assert found.rows.shape == (50, 4) and set(found.rows[0]) == {0, 1, 2, 3}


def test_faiss_is_missing(monkeypatch):
    import sys

    from distil_rank.errors import InputError

    monkeypatch.setitem(sys.modules, "faiss", None)
    encoder, codes, _ = made("bit")
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        CodeIndex.build(codes.numpy(), encoder)
