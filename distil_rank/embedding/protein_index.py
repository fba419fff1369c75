"""Equal names and equal sequences among any number of proteins, out of core.

DuckDB, an embedded database, groups and joins names and digests; what exceeds its memory limit goes to temporary files,
so that memory does not grow with the number of proteins.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa

from distil_rank.embedding.sequences import UniqueNames

MEMORY_LIMIT = "192MB"  # of DuckDB
BLOCK_ROWS = 65_536  # rows that are handed over at a time


class ProteinIndex:
    """Makes the names of new proteins unique and numbers distinct sequences, given what a store already has.

    Sequences are compared by 128 bits of their SHA-256: that two of 65 million agree by chance has probability 1e-23.
    Use it as a context manager, and in this order: `add_stored`, `add`, `resolve_names`, `drop_stored`, `rows`.

    Args:
        folder: For temporary files.
    """

    def __init__(self, folder: Path):
        self._count = 0
        self._database = duckdb.connect(str(folder / "index.duckdb"))
        self._sql("set threads = 1")  # more do not help while Python parses, and each needs memory
        self._sql(f"set memory_limit = '{MEMORY_LIMIT}'")
        self._sql("set preserve_insertion_order = false")
        self._sql("create table stored (id varchar, high ubigint, low ubigint, row bigint)")
        self._sql("create table new (number bigint, id varchar, high ubigint, low ubigint)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()

    def _sql(self, query: str) -> list[tuple[Any, ...]]:
        return self._database.execute(query).fetchall()

    def _number(self, query: str) -> int:
        """The first value of a query's result."""
        return int(self._sql(query)[0][0])

    def _insert(self, table: str, **columns: pa.Array) -> None:
        self._database.register("block", pa.table(columns))
        self._sql(f"insert into {table} select * from block")
        self._database.unregister("block")

    def add_stored(self, ids: pa.Array, sha256: pa.Array, rows: pa.Array) -> None:
        """Adds proteins of the store: names, digests of their sequences, and row numbers, (proteins,) each."""
        self._insert("stored", id=ids, **_halves(sha256), row=rows)

    def add(self, ids: pa.Array, sha256: pa.Array) -> None:
        """Adds new proteins in order: names and digests of their sequences, (proteins,) each."""
        numbers = pa.array(np.arange(self._count, self._count + len(ids)))
        self._insert("new", number=numbers, id=ids, **_halves(sha256))
        self._count += len(ids)

    def stored_sequences(self) -> int:
        """The number of distinct sequences in the store."""
        return self._number("select count(*) from (select distinct high, low from stored)")

    def resolve_names(self) -> tuple[int, int]:
        """Drops repeated proteins and numbers repeated names with another sequence, as `UniqueNames` does.

        Returns:
            The number of dropped and of renamed proteins.
        """
        self._sql(
            """create table repeated as
            select id, min(number) as first, min(high) <> max(high) or min(low) <> max(low) as ambiguous
            from new group by id having count(*) > 1"""
        )
        if not self._number("select count(*) from repeated"):
            return 0, 0
        self._sql("create table ambiguous as select id from repeated where ambiguous")
        while self._number("select count(*) from ambiguous"):  # names like those that renaming makes
            numbered = "regexp_replace(id, '_[0-9]+$', '') in (from ambiguous) and id not in (from ambiguous)"
            if not self._number(f"insert into ambiguous select distinct id from new where {numbered}"):
                break
        self._sql(
            """create table changes as select number, cast(null as varchar) as id from new join repeated using (id)
            where number > first and id not in (from ambiguous)"""
        )
        self._rename_ambiguous()
        self._sql(
            """create table named as select number, coalesce(changes.id, new.id) as id, high, low
            from new left join changes using (number) where changes.number is null or changes.id is not null"""
        )
        self._replace_new("named")
        renamed = self._number("select count(id) from changes")
        return self._number("select count(*) from changes") - renamed, renamed

    def _rename_ambiguous(self) -> None:
        """Goes through the proteins of ambiguous names in order, in Python: they are few."""
        names = UniqueNames()
        changes: dict[int, str | None] = {}
        self._sql("create table namesakes as from new where id in (from ambiguous)")
        for batch in self._pages("namesakes"):
            for number, name, *digest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                unique = names.resolve(name, tuple(digest))
                if unique != name:
                    changes[number] = unique
        numbers, ids = pa.array(changes.keys(), pa.int64()), pa.array(changes.values(), pa.string())
        self._insert("changes", number=numbers, id=ids)

    def drop_stored(self) -> str | None:
        """Drops proteins that the store has.

        Returns:
            The first protein whose name the store has for another sequence; None where there is none.
        """
        both = "from new join stored using (id)"
        same = "new.high = stored.high and new.low = stored.low"
        conflict = self._sql(f"select id {both} where not ({same}) order by number limit 1")
        if not conflict and self._number(f"select count(*) {both}"):
            self._sql("create table unstored as select * from new anti join stored using (id)")
            self._replace_new("unstored")
        return str(conflict[0][0]) if conflict else None

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Number, name and row of each remaining protein, in order; new sequences are numbered from the last row on."""
        self._sql("create table row_of as select high, low, min(row) as row from stored group by high, low")
        first = "select high, low, min(number) as first from new anti join row_of using (high, low) group by high, low"
        row = f"{self.stored_sequences()} - 1 + row_number() over (order by first)"
        self._sql(f"insert into row_of select high, low, {row} from ({first})")
        self._sql("create table joined as select number, id, row from new join row_of using (high, low)")
        self._sql("drop table row_of")
        yield from self._pages("joined")

    def _pages(self, table: str) -> Iterator[pa.RecordBatch]:
        """The rows of a table by number, in blocks: DuckDB holds a whole result in memory."""
        self._sql(f"create table sorted as from {table} order by number")
        self._sql(f"drop table {table}")
        for start in range(0, self._count, BLOCK_ROWS):
            page = f"from sorted where number >= {start} and number < {start + BLOCK_ROWS} order by number"
            yield from self._database.sql(page).to_arrow_table().to_batches()
        self._sql("drop table sorted")

    def _replace_new(self, table: str) -> None:
        self._sql("drop table new")
        self._sql(f"alter table {table} rename to new")


def _halves(sha256: pa.Array) -> dict[str, pa.Array]:
    """The first 128 bits of digests as two numbers, (proteins,) each."""
    words = np.frombuffer(sha256.buffers()[1], np.uint64).reshape(-1, 4)[sha256.offset : sha256.offset + len(sha256)]
    return {"high": pa.array(words[:, 0].copy()), "low": pa.array(words[:, 1].copy())}
