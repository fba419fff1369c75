"""Planning a store: which proteins are new, which sequences are distinct, and how they are cut into shards.

Out of core: proteins go into DuckDB, which groups and joins names and digests within a memory limit, on disk beyond it.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from distil_rank.artefact import UNFINISHED
from distil_rank.embedding.sequences import CleaningReport, Protein, UniqueNames
from distil_rank.embedding.storage import BATCH_ROWS, Storage, is_remote
from distil_rank.embedding.store import settings_of
from distil_rank.errors import InputError

SHARD_COUNT = 256  # enough to balance a cluster, few enough for any file system
SHARD_RESIDUES = (2**16, 2**22)  # bounds of a shard's size
SHARD_BYTES = 2**28  # of vectors: limits the memory that merging a shard takes
MEMORY_LIMIT = "192MB"  # of DuckDB

PARTS = "parts"  # the folder of finished batches

_TEXT = pa.string()
PROTEINS = pa.schema(
    {"id": _TEXT, "sequence": _TEXT, "sha256": pa.binary(32), "length": pa.int32(), "row": pa.int64(), "notes": _TEXT}
)


@dataclass(frozen=True)
class Shard:
    """Consecutive distinct sequences that are computed and stored together."""

    file: str
    rows: tuple[int, int]  # the first, and the one behind the last
    proteins: tuple[str, int, int]  # the table and its lines where these rows first appear
    residues: int
    key: str  # digest of what determines its vectors: the settings, and its lines
    members: tuple[Self, ...] = ()  # of several that are computed together; its parts are in the first one's folder

    @classmethod
    def of(cls, entry: dict[str, Any], manifest: dict[str, Any]) -> Self:
        """The shard of an entry in the manifest."""
        table = next(file["sha256"] for file in manifest["proteins"] if file["file"] == entry["proteins"][0])
        inputs = [settings_of(manifest), table, entry["proteins"], entry["rows"]]
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        return cls(entry["file"], tuple(entry["rows"]), tuple(entry["proteins"]), entry["residues"], key)

    @classmethod
    def joined(cls, members: Sequence[Self]) -> Self:
        """Consecutive shards of one table, to be computed together."""
        first, last = members[0], members[-1]
        if first is last:
            return first
        table, start, _ = first.proteins
        key = hashlib.sha256("".join(shard.key for shard in members).encode()).hexdigest()
        rows, lines = (first.rows[0], last.rows[1]), (table, start, last.proteins[2])
        return cls(first.file, rows, lines, sum(shard.residues for shard in members), key, tuple(members))

    @property
    def parts(self) -> str:
        """Folder of its finished batches."""
        return f"{PARTS}/{self.file.removesuffix('.arrow')}"


def join_shards(shards: Iterable[Shard], residues: int) -> list[Shard]:
    """Joins consecutive shards of one table, as many as have so many residues together, but at least one."""
    groups: list[list[Shard]] = []
    free = 0
    for shard in shards:
        if shard.residues > free or shard.proteins[0] != groups[-1][-1].proteins[0]:
            groups.append([])
            free = residues
        groups[-1].append(shard)
        free -= shard.residues
    return [Shard.joined(group) for group in groups]


def write_new_proteins(
    store: Storage, name: str, proteins: Iterable[Protein], manifest: dict[str, Any], report: CleaningReport
) -> int:
    """Writes the table of the proteins that the store lacks, if there are any; returns their number.

    Counts of repeated and renamed proteins go into the report.

    Raises:
        InputError: the store has a protein of one of the names with another sequence, or the disk is full.
    """
    try:
        place = None if is_remote(store.location) else store.location
        folder = tempfile.TemporaryDirectory(dir=place, prefix=UNFINISHED)
        with folder as scratch, duckdb.connect(str(Path(scratch) / "index.duckdb")) as database:
            database.execute(f"set threads = 1; set memory_limit = '{MEMORY_LIMIT}'")  # Python parses meanwhile
            database.execute("set preserve_insertion_order = false")
            _read(database, store, proteins, manifest)
            report.count_names(*_resolve_names(database))
            conflict = database.execute(
                """select id from named join stored using (id)
                where named.sha256 <> stored.sha256 order by number limit 1"""
            ).fetchall()
            if conflict:
                raise InputError(
                    f"Expected {conflict[0][0]} with the sequence that {store.location} has for it but got another; "
                    "rename it, or choose another store."
                )
            database.execute(  # `added`: new proteins in order; new sequences are numbered by their first appearance
                """create table unstored as from named anti join stored using (id);
                create table row_of as select sha256, min(row) as row from stored group by sha256;
                insert into row_of
                select sha256, (select count(*) from row_of) - 1 + row_number() over (order by first) from
                (select sha256, min(number) as first from unstored anti join row_of using (sha256) group by sha256);
                create table added as
                select number, id, row from unstored join row_of using (sha256) order by number"""
            )
            count = _number(database, "select count(*) from added")
            if count:
                with store.writing(name) as file, pa.ipc.new_file(file, PROTEINS) as writer:
                    for start in range(0, count, BATCH_ROWS):
                        page = database.sql(
                            f"""select added.id, sequence, sha256, length, row, notes
                            from added join new using (number)
                            where added.rowid >= {start} and added.rowid < {start + BATCH_ROWS} order by number"""
                        )
                        writer.write_table(page.to_arrow_table().cast(PROTEINS).combine_chunks(), BATCH_ROWS)
            return count
    except (duckdb.Error, OSError) as error:
        raise InputError(
            f"Expected to plan the store {store.location} but got: {' '.join(str(error).split())[:160]}; free disk "
            "space there, or memory, and run the same command again."
        ) from error


def _number(database: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(database.execute(query).fetchall()[0][0])


def _insert(database: duckdb.DuckDBPyConnection, table: str, rows: pa.Table | pa.RecordBatch | dict[str, Any]) -> None:
    database.register("block", pa.table(rows))
    database.execute(f"insert into {table} by name from block")


def _read(
    database: duckdb.DuckDBPyConnection, store: Storage, proteins: Iterable[Protein], manifest: dict[str, Any]
) -> None:
    """Fills the tables `stored` and `new`, whose `number` counts from 0."""
    database.execute("create table stored (id varchar, sha256 blob, row bigint)")
    for file in manifest["proteins"]:
        for batch in store.batches(file["file"], ["id", "sha256", "row"]):
            _insert(database, "stored", batch)
    if (sequences := _number(database, "select count(distinct sha256) from stored")) != (last := _next_row(manifest)):
        where = store.where("manifest.json")
        raise InputError(f"Expected shards for {sequences} sequences in {where} but got shards for {last}; restore it.")
    database.execute(
        "create table new (number bigint, id varchar, sequence varchar, sha256 blob, length int, notes varchar)"
    )
    count = 0
    rest = iter(tqdm(proteins, desc="plan", unit="protein", unit_scale=True, disable=None))
    while block := list(islice(rest, BATCH_ROWS)):
        texts = [protein.sequence for protein in block]
        rows = {
            "number": np.arange(count, count + len(block)),
            "id": [protein.id for protein in block],
            "sequence": texts,
            "sha256": [hashlib.sha256(text.encode()).digest() for text in texts],
            "length": [len(text) for text in texts],
            "notes": [manifest["long"] if len(text) > manifest["max_length"] else "" for text in texts],
        }
        _insert(database, "new", rows)
        count += len(block)


def _resolve_names(database: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Makes the view `named`, as `UniqueNames` does; returns the number of dropped and of renamed proteins."""
    database.execute(
        """create table repeated as
        select id, min(number) as first, min(sha256) <> max(sha256) as ambiguous
        from new group by id having count(*) > 1"""
    )
    database.execute("create table ambiguous as select id from repeated where ambiguous")
    while _number(database, "select count(*) from ambiguous"):  # names like those that renaming makes
        alike = "regexp_replace(id, '_[0-9]+$', '') in (from ambiguous) and id not in (from ambiguous)"
        if not _number(database, f"insert into ambiguous select distinct id from new where {alike}"):
            break
    database.execute(
        """create table changes as select number, cast(null as varchar) as id from new join repeated using (id)
        where number > first and id not in (from ambiguous)"""
    )
    names = UniqueNames()
    changes: dict[int, str | None] = {}
    namesakes = database.execute("select number, id, sha256 from new where id in (from ambiguous) order by number")
    for number, name, digest in namesakes.fetchall():  # in Python: they are few
        if (unique := names.resolve(name, digest)) != name:
            changes[number] = unique
    numbers, ids = pa.array(changes.keys(), pa.int64()), pa.array(changes.values(), pa.string())
    _insert(database, "changes", {"number": numbers, "id": ids})
    database.execute(
        """create view named as select number, coalesce(changes.id, new.id) as id, sha256
        from new left join changes using (number) where changes.number is null or changes.id is not null"""
    )
    renamed = _number(database, "select count(id) from changes")
    return _number(database, "select count(*) from changes") - renamed, renamed


def _next_row(manifest: dict[str, Any]) -> int:
    return max((shard["rows"][1] for shard in manifest["shards"]), default=0)


def new_shards(store: Storage, name: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Manifest entries for shards of about equal work that hold the rows of a table that it does not list yet."""
    row = _next_row(manifest)
    low, high = SHARD_RESIDUES
    size = min(max(sum(_work(store, name, row)) // SHARD_COUNT, low), high)
    if manifest["pooling"] == "residue":
        size = min(size, SHARD_BYTES // (4 * manifest["dim"] * max(len(manifest.get("layers", [])), 1)))
    shards: list[dict[str, Any]] = []
    start = rows = residues = 0  # of the shard that is being filled: its first line, distinct sequences, their residues
    for line, work in enumerate(chain(_work(store, name, row), [None])):
        if work is None or (residues + work > size and line > start):
            if rows:  # not repeated sequences alone
                file = f"vectors-{len(manifest['shards']) + len(shards):05d}.arrow"
                extent = {"rows": [row, row + rows], "proteins": [name, start, line], "residues": residues}
                shards.append({"file": file, **extent})
            start, row, rows, residues = line, row + rows, 0, 0
        rows, residues = rows + bool(work), residues + (work or 0)
    return shards


def _work(store: Storage, name: str, row: int) -> Iterator[int]:
    """For each line of a table: residues of a sequence at its first appearance, where `row` goes on, 0 otherwise."""
    for batch in store.batches(name, ["length", "row"]):
        for length, number in zip(batch["length"].to_pylist(), batch["row"].to_pylist(), strict=True):
            yield length if number == row else 0
            row += number == row
