"""Out-of-core planning against plain dictionaries."""

import hashlib
import json

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil_rank.embedding import planning
from distil_rank.embedding.planning import Shard, new_shards, write_new_proteins
from distil_rank.embedding.sequences import CleaningReport, Protein, UniqueNames
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

MANIFEST = {"proteins": [], "shards": [], "pooling": "mean", "dim": 3, "long": "window", "max_length": 3}
names = st.sampled_from(["a", "a_2", "a_2_2", "a_3", "b", "b_2"])
records = st.lists(st.tuples(names, st.text("AC", min_size=1, max_size=4)), min_size=1, max_size=30)


def plan(store, proteins, manifest=MANIFEST):
    report = CleaningReport("in.fasta")
    report.counts["kept"] = len(proteins)
    name = f"proteins-{len(manifest['proteins']):05d}.arrow"
    storage = Storage(store)
    added = write_new_proteins(storage, name, proteins, manifest, report)
    shards = new_shards(storage, name, manifest) if added else []
    tables = [*manifest["proteins"], {"file": name}] if added else manifest["proteins"]
    return report, {**manifest, "proteins": tables, "shards": manifest["shards"] + shards}


def stored(store, manifest):
    return [line for file in manifest["proteins"] for line in Storage(store).table(file["file"]).to_pylist()]


def expected(stored_lines, proteins):
    """Lines that are added, by dictionaries; None where a name is refused."""
    row_of, unique, lines = {line["sequence"]: line["row"] for line in stored_lines}, UniqueNames(), []
    sequence_of = {line["id"]: line["sequence"] for line in stored_lines}
    for protein in proteins:
        name = unique.resolve(protein.id, protein.sequence)
        if name is None or sequence_of.get(name) == protein.sequence:
            continue
        if name in sequence_of:
            return None
        row = row_of.setdefault(protein.sequence, len(row_of))
        digest, length = hashlib.sha256(protein.sequence.encode()).digest(), len(protein.sequence)
        note = "window" if length > 3 else ""
        line = {"id": name, "sequence": protein.sequence, "sha256": digest, "length": length, "row": row, "notes": note}
        lines.append(line)
    return lines


@settings(max_examples=20)  # each plans twice
@given(records, records, st.integers(1, 7))
def test_names_and_rows_are_those_of_dictionaries(tmp_path_factory, first, second, batch):
    store = tmp_path_factory.mktemp("s")
    manifest = MANIFEST
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BATCH_ROWS", batch)
        for given_records in (first, second):
            proteins = [Protein(*record) for record in given_records]
            before = stored(store, manifest)
            lines = expected(before, proteins)
            if lines is None:
                with pytest.raises(InputError, match=r"Expected [ab][_0-9]* with the sequence that"):
                    plan(store, proteins, manifest)
                return
            report, manifest = plan(store, proteins, manifest)
            assert stored(store, manifest) == before + lines
            assert report.counts["kept"] + report.counts["repeated"] == len(proteins)
            sizes = {
                len(part)
                for file in manifest["proteins"]
                for part in Storage(store).table(file["file"]).to_batches()[:-1]
            }
            assert sizes <= {batch}
    assert not list(store.glob(".unfinished-*"))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_shards_are_those_of_a_loop_over_lines(tmp_path_factory, lines, size, batch):
    """Lines of a length, which are new sequences or repeat the last one."""
    store = tmp_path_factory.mktemp("s")
    lengths = [length for length, _ in lines]
    fresh = [True, *(new for _, new in lines[1:])]
    rows = np.cumsum(fresh) - 1
    with pa.ipc.new_file(store / "t.arrow", pa.schema([("length", pa.int32()), ("row", pa.int64())])) as writer:
        writer.write_table(pa.table({"length": pa.array(lengths, pa.int32()), "row": rows}), batch)
    cuts, residues = [0], 0
    for line, (length, new) in enumerate(zip(lengths, fresh, strict=True)):
        if residues + length * new > size and line > cuts[-1]:
            cuts.append(line)
            residues = 0
        residues += length * new
        if residues > size:  # one sequence alone
            cuts.append(line + 1)
            residues = 0
    wanted = [
        (start, stop) for start, stop in zip(cuts, [*cuts[1:], len(lines)], strict=True) if any(fresh[start:stop])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_RESIDUES", (size, size))
        shards = new_shards(Storage(store), "t.arrow", MANIFEST)
    assert [tuple(shard["proteins"][1:]) for shard in shards] == wanted
    work = [sum(n * new for n, new in zip(lengths[a:b], fresh[a:b], strict=True)) for a, b in wanted]
    assert [shard["residues"] for shard in shards] == work
    bounds = [shard["rows"] for shard in shards]
    assert bounds == [[sum(fresh[:start]), sum(fresh[:stop])] for start, stop in wanted]


def test_more_than_the_memory_limit_goes_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "MEMORY_LIMIT", "40MB")
    number = 200_000
    texts = [f"M{i % (number - 5)}" for i in range(number)]
    report, manifest = plan(
        tmp_path, [Protein(f"a rather long name of protein {i}", text) for i, text in enumerate(texts)]
    )
    table = Storage(tmp_path).table("proteins-00000.arrow")
    assert table["row"].to_pylist() == [*range(number - 5), *range(5)] and table["sequence"].to_pylist() == texts
    assert report.counts["kept"] == number and manifest["shards"][-1]["rows"][1] == number - 5


def test_what_duckdb_cannot_do_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise duckdb.IOException("could not write: No space left on device")

    monkeypatch.setattr(planning, "_resolve_names", full)
    with pytest.raises(
        InputError, match=r"Expected to plan the store .* No space left on device; free disk space there"
    ):
        plan(tmp_path, [Protein("a", "MK")])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_plan_leaves_nothing_behind_the_next(tmp_path):
    (tmp_path / "s" / ".unfinished-killed").mkdir(parents=True)
    writer = StoreWriter(tmp_path / "s")
    settings = {"dim": 3, "pooling": "mean", "long": "window", "max_length": 9}
    with writer.storage.lock():
        writer.plan([Protein("a", "MK")], settings, {"backbone": "x", "fallback": None}, CleaningReport("in.fasta"))
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["manifest.json", "proteins-00000.arrow"]
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["shards"][0]["rows"] == [0, 1]


ENTRY = {"file": "vectors-00001.arrow", "rows": [4, 9], "proteins": ["proteins-00000.arrow", 4, 11], "residues": 300}
SHARDED = {
    "format": "distil-rank embeddings",
    "layer": 6,
    "pooling": "mean",
    "dim": 3,
    "proteins": [{"file": "proteins-00000.arrow", "sha256": "ab"}],
}


def test_a_shard_is_what_its_entry_says():
    shard = Shard.of(ENTRY, SHARDED)
    assert (shard.file, shard.rows, shard.proteins) == (ENTRY["file"], (4, 9), ("proteins-00000.arrow", 4, 11))
    assert (shard.residues, shard.parts) == (300, "parts/vectors-00001")
    assert shard.key == "a36ee5a7c918e8bd6dcaa3183bd517e7be445ea289e6780d19e80586ad21a718", "keys of stores that exist"
    assert Shard.of({**ENTRY, "vectors": 5, "bytes": 900, "sha256": "ef"}, SHARDED).key == shard.key


@pytest.mark.parametrize(
    ("entry", "manifest"),
    [
        ({"rows": [4, 10]}, {}),
        ({"proteins": ["proteins-00000.arrow", 4, 12]}, {}),
        ({}, {"layer": 5}),
        ({}, {"proteins": [{"file": "proteins-00000.arrow", "sha256": "cd"}]}),
    ],
)
def test_another_content_has_another_key(entry, manifest):
    assert Shard.of(ENTRY | entry, SHARDED | manifest).key != Shard.of(ENTRY, SHARDED).key
