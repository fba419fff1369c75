"""Hits of both engines against all pairs scored one by one, and what decoys make of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

from distil_rank.codes import search as search_module
from distil_rank.codes.fit import fit_metric
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.search import Engines, decoy_evidence, evidence, with_relatives
from distil_rank.codes.votes import members, set_cover, vote_accuracy
from distil_rank.data.mmseqs import COLUMNS, Alignments

PROTEINS, QUERIES = 300, 40


@pytest.fixture(scope="module")
def made():
    """An index, float queries that are its first targets, and alignments of one pair in ten."""
    dice = np.random.default_rng(0)
    x = (np.repeat(dice.normal(size=(60, 24)), 5, axis=0) + dice.normal(size=(PROTEINS, 24)) * 0.5).astype(np.float32)
    encoder = fit_metric(x, np.ones(PROTEINS, bool), "whitened").encoder(16, "bit")
    query, target = np.nonzero(dice.random((QUERIES, PROTEINS)) < 0.1)
    columns = np.full((len(query), len(COLUMNS)), 1.0)
    columns[:, COLUMNS.index("evalue")] = 10 ** dice.uniform(-9, 4, size=len(query))
    rows = torch.from_numpy(x)
    return CodeIndex(encoder.encode(rows).numpy(), encoder), encoder(rows[:QUERIES]), Alignments(query, target, columns)


def part(alignments, chosen):
    """Some of them."""
    return Alignments(alignments.query[chosen], alignments.target[chosen], alignments.columns[chosen])


def dense(queries, index, alignments, most=np.inf):
    """The score of every pair; `most` is that of the spread."""
    evalue = np.full((len(queries), PROTEINS), np.nan)
    evalue[alignments.query, alignments.target] = alignments.column("evalue")
    z = np.arctanh((queries @ index.decoded(np.arange(PROTEINS)).T).numpy())  # the sample is all of them
    low, centre, high = np.quantile(z, (0.1, 0.5, 0.9), axis=1, keepdims=True)
    spread = np.maximum((high - low) / (2 * norm.isf(0.1)), 16**-0.5).clip(max=most)
    return -norm.logsf((z - centre) / spread) - np.log(np.minimum(np.nan_to_num(evalue, nan=np.inf) / PROTEINS, 1))


@pytest.mark.parametrize("own", [False, True])
def test_hits_are_the_best_of_all_pairs(made, own, monkeypatch):
    monkeypatch.setattr(search_module, "BLOCK", 7)
    index, queries, alignments = made
    expected = dense(queries, index, alignments)
    if own:
        expected[np.arange(QUERIES), np.arange(QUERIES)] = -np.inf
    blocks = list(Engines(PROTEINS, index, alignments, own=own).search(queries, QUERIES, 6))
    score, query = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("score", "query"))
    rank, target = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("rank", "target"))
    assert query.tolist() == np.repeat(np.arange(QUERIES), 6).tolist() and rank.tolist() == [*range(1, 7)] * QUERIES
    assert np.allclose(score.reshape(QUERIES, 6), -np.sort(-expected, axis=1)[:, :6], atol=1e-3)
    assert np.allclose(score, expected[query, target], atol=1e-3)


def test_alignment_alone_has_its_own_evalues(made):
    _, _, alignments = made
    [hits] = Engines(PROTEINS, None, alignments).search(None, QUERIES, PROTEINS)
    assert len(hits.query) == len(alignments.query) and np.isnan(hits.cosine).all()
    assert np.allclose(hits.evalue, np.exp(-hits.score) * PROTEINS) or (hits.evalue > PROTEINS).any()
    first = hits.where(hits.rank == 1)
    least = [alignments.column("evalue")[alignments.query == query].min() for query in first.query]
    assert np.array_equal(first.evalue, least)


def test_decoys_score_as_queries_do_except_with_their_originals(made):
    index, queries, alignments = made
    originals, rows = np.arange(QUERIES) + 7, np.arange(5, PROTEINS, 3)
    alignments = part(alignments, alignments.column("evalue") > search_module.SURE)  # nobody joins
    every = index.decoded(np.arange(PROTEINS))
    low, high = np.quantile(np.arctanh((every[originals] @ every.T).numpy().clip(-0.99, 0.99)), (0.1, 0.9), axis=1)
    typical = float(np.median((high - low) / (2 * norm.isf(0.1))))
    expected = dense(queries, index, alignments, typical)[:, rows]
    expected[originals[:, None] == rows] = 0
    assert np.allclose(decoy_evidence(queries, originals, index, alignments, rows), expected, atol=1e-3)


@pytest.mark.parametrize("own", [False, True])
def test_sure_relatives_join_the_query(made, own, monkeypatch):
    monkeypatch.setattr(search_module, "ROWS_AT_ONCE", 5)
    index, queries, alignments = made
    joined = with_relatives(queries, alignments, index, own)
    alone = 0
    for row, query in enumerate(queries):
        near = part(alignments, (alignments.query == row) & (alignments.column("evalue") <= search_module.SURE))
        targets = [target for target in near.target if not (own and target == row)]
        alone += not targets
        relatives = index.decoded(np.array(targets)).mean(0) if targets else torch.zeros(16)
        assert torch.allclose(joined[row], F.normalize(query + relatives, dim=0), atol=1e-5)
    assert alone < QUERIES


def test_evidence_of_unrelated_vectors_is_their_surprise():
    dice = np.random.default_rng(0)
    rows = torch.from_numpy(dice.normal(size=(2000, 64)).astype(np.float32))
    encoder = fit_metric(rows.numpy(), np.ones(2000, bool), "whitened").encoder(64, "bit")
    index, queries = CodeIndex(encoder.encode(rows).numpy(), encoder), encoder(rows[:300])
    cosine = (queries @ index.decoded(np.arange(2000)).T).numpy()[:, 300:]
    surprise = evidence(cosine, index.background(queries)[:, :, None], None, 2000)
    for share in (0.1, 0.01, 0.001):
        assert (surprise >= -np.log(share)).mean() == pytest.approx(share, rel=0.35)


def test_clusters_are_a_set_cover():
    dice = np.random.default_rng(0)
    first, second = dice.integers(80, size=(2, 150))
    near = np.eye(80, dtype=bool)
    near[first, second] = near[second, first] = True
    free, expected = np.ones(80, bool), np.full(80, -1)
    while free.any():
        sizes = np.where(free, (near & free).sum(1), -1)
        row = int(sizes.argmax())
        expected[near[row] & free] = row
        free &= ~near[row]
    representative = set_cover(first[first != second], second[first != second], 80)
    assert near[np.arange(80), representative].all() and (representative[representative] == representative).all()
    assert len(np.unique(representative)) <= 1.1 * len(np.unique(expected))


def test_votes_come_from_other_groups(made):
    index, _, _ = made
    labels = [[str(row // 10)] for row in range(PROTEINS)]  # two families of five share a label
    member, _ = members(labels)
    engines = Engines(PROTEINS, index, None)
    rows = np.arange(0, PROTEINS, 3)
    family = np.arange(PROTEINS) // 5
    inside = vote_accuracy(engines, rows, member, np.arange(PROTEINS), 4, 10)
    across = vote_accuracy(engines, rows, member, family, 4, 10)
    nobody = vote_accuracy(engines, rows, member, family // 2, 4, 10)
    assert inside.right.value > 0.7 > 0.3 > across.right.value and nobody.right.value == 0
    assert (inside.groups, across.groups, nobody.groups) == (100, 60, 30) and inside.majority == pytest.approx(0.04)
    assert inside.voted == 1
