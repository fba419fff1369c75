"""Hits of both engines against all pairs scored one by one, and what decoys make of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_rank.codes import search as search_module
from distil_rank.codes.fit import fit_metric
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.search import Engines, Evidence
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


def dense(queries, index, alignments, evidence):
    """The score of every pair."""
    evalue = np.full((len(queries), PROTEINS), np.nan)
    evalue[alignments.query, alignments.target] = alignments.column("evalue")
    return evidence((queries @ index.decoded(np.arange(PROTEINS)).T).numpy(), evalue)


@pytest.mark.parametrize("own", [False, True])
def test_hits_are_the_best_of_all_pairs(made, own, monkeypatch):
    monkeypatch.setattr(search_module, "BLOCK", 7)
    index, queries, alignments = made
    evidence = Evidence(PROTEINS, 0.01, 0.2)
    expected = dense(queries, index, alignments, evidence)
    if own:
        expected[np.arange(QUERIES), np.arange(QUERIES)] = -np.inf
    blocks = list(Engines(evidence, index, alignments, own=own).search(queries, QUERIES, 6))
    score, query = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("score", "query"))
    rank, target = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("rank", "target"))
    assert query.tolist() == np.repeat(np.arange(QUERIES), 6).tolist() and rank.tolist() == [*range(1, 7)] * QUERIES
    assert np.allclose(score.reshape(QUERIES, 6), -np.sort(-expected, axis=1)[:, :6], atol=1e-3)
    assert np.allclose(score, expected[query, target], atol=1e-3)


def test_alignment_alone_has_its_own_evalues(made):
    _, _, alignments = made
    [hits] = Engines(Evidence(PROTEINS), None, alignments).search(None, QUERIES, PROTEINS)
    assert len(hits.query) == len(alignments.query) and np.isnan(hits.cosine).all()
    assert np.allclose(hits.evalue, np.exp(-hits.score) * PROTEINS) or (hits.evalue > PROTEINS).any()
    first = hits.where(hits.rank == 1)
    least = [alignments.column("evalue")[alignments.query == query].min() for query in first.query]
    assert np.array_equal(first.evalue, least)


def test_evidence_of_unrelated_vectors_is_their_surprise():
    dice = np.random.default_rng(0)
    rows = F.normalize(torch.from_numpy(dice.normal(size=(2000, 64))), dim=1)
    cosine = (rows @ rows.T).numpy()[np.triu_indices(2000, 1)]
    evidence = Evidence(2000, 0.0, 64**-0.5)(cosine, None)
    for share in (0.1, 0.01, 0.001):
        assert (evidence >= -np.log(share)).mean() == pytest.approx(share, rel=0.35)


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
    engines = Engines(Evidence(PROTEINS, 0.0, 0.2), index, None)
    rows = np.arange(0, PROTEINS, 3)
    family = np.arange(PROTEINS) // 5
    inside = vote_accuracy(engines, rows, member, np.arange(PROTEINS), 4, 10)
    across = vote_accuracy(engines, rows, member, family, 4, 10)
    nobody = vote_accuracy(engines, rows, member, family // 2, 4, 10)
    assert inside.right.value > 0.7 > 0.3 > across.right.value and nobody.right.value == 0
    assert (inside.groups, across.groups, nobody.groups) == (100, 60, 30) and inside.majority == pytest.approx(0.04)
    assert inside.voted == 1
