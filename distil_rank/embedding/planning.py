"""Planning a store: which proteins are new, which sequences are distinct, and how they are cut into shards.

Out of core: proteins go into a temporary table while they are read, are compared by `ProteinIndex`, and are copied to
the store with the row numbers of their sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from distil_rank.embedding.protein_index import ProteinIndex
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.storage import BATCH_ROWS, Storage, read_batches
from distil_rank.errors import InputError

SHARD_COUNT = 256  # enough to balance a cluster, few enough for any file system
SHARD_RESIDUES = (2**16, 2**22)  # bounds of a shard's size
SHARD_BYTES = 2**28  # of vectors: limits the memory that merging a shard takes

PROTEINS = pa.schema(
    [
        ("id", pa.string()),
        ("sequence", pa.string()),
        ("sha256", pa.binary(32)),
        ("length", pa.int32()),
        ("row", pa.int64()),
        ("notes", pa.string()),
    ]
)


STAGED = pa.schema([PROTEINS.field(name) for name in ("id", "sequence", "sha256", "length", "notes")])


def write_new_proteins(
    store: Storage, name: str, proteins: Iterable[Protein], manifest: dict[str, Any], report: CleaningReport
) -> int:
    """Writes the table of the proteins that the store lacks; writes nothing if there is none.

    Args:
        store: Where its files are.
        name: File name of the table.
        proteins: Names, which may repeat, and cleaned sequences.
        manifest: The store's manifest.
        report: Gets the counts of repeated and renamed proteins.

    Returns:
        The number of new proteins.

    Raises:
        InputError: the store has a protein of one of the names with another sequence, or the disk is full.
    """
    try:
        with (
            store.scratch() as folder,
            ProteinIndex(Path(folder)) as index,
        ):
            for file in manifest["proteins"]:
                for batch in store.batches(file["file"], ["id", "sha256", "row"]):
                    index.add_stored(*batch.columns)
            _check_shards(store, manifest, index.stored_sequences())
            staged = Path(folder) / "proteins.arrow"
            with pa.ipc.new_file(staged, STAGED) as writer:
                for batch in _staged_batches(proteins, manifest):
                    writer.write_batch(batch)
                    index.add(batch["id"], batch["sha256"])
            report.count_names(*index.resolve_names())
            conflict = index.drop_stored()
            if conflict is not None:
                raise InputError(
                    f"Expected {conflict} with the sequence that {store.location} has for it but got another; "
                    "rename it, or choose another store."
                )
            return _write_table(store, name, staged, index.rows())
    except (duckdb.Error, OSError) as error:
        raise InputError(
            f"Expected to plan the store {store.location} but got: {' '.join(str(error).split())[:160]}; free disk "
            "space there, or memory, and run the same command again."
        ) from error


def _check_shards(store: Storage, manifest: dict[str, Any], sequences: int) -> None:
    sharded = _next_row(manifest)
    if sharded != sequences:
        raise InputError(
            f"Expected shards for {sequences} sequences in {store.where('manifest.json')} but got shards for "
            f"{sharded}; it was changed by hand: restore it, or choose another store."
        )


def _next_row(manifest: dict[str, Any]) -> int:
    return max((shard["rows"][1] for shard in manifest["shards"]), default=0)


def _staged_batches(proteins: Iterable[Protein], manifest: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    """The proteins as read, in batches of the temporary table."""
    rest = iter(tqdm(proteins, desc="plan", unit="protein", unit_scale=True, disable=None))
    while block := list(islice(rest, BATCH_ROWS)):
        sequences = [protein.sequence for protein in block]
        lengths = [len(sequence) for sequence in sequences]
        yield pa.record_batch(
            [
                pa.array([protein.id for protein in block], pa.string()),
                pa.array(sequences, pa.string()),
                pa.array([hashlib.sha256(sequence.encode()).digest() for sequence in sequences], pa.binary(32)),
                pa.array(lengths, pa.int32()),
                pa.array([manifest["long"] if n > manifest["max_length"] else "" for n in lengths], pa.string()),
            ],
            schema=STAGED,
        )


def _write_table(store: Storage, name: str, staged: Path, rows: Iterator[pa.RecordBatch]) -> int:
    """Writes the proteins that have a row, in batches of `BATCH_ROWS`; no file if there is none."""
    batches = _rechunked(_with_rows(staged, rows))
    first = next(batches, None)
    if first is None:
        return 0
    written = 0
    with store.writing(name) as file, pa.ipc.new_file(file, PROTEINS) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)
            written += len(batch)
    return written


def _with_rows(staged: Path, rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Joins the temporary table with number, name and row of the proteins to keep; both are in order."""
    blocks = read_batches(staged)
    block, first = next(blocks, None), 0
    for retained in rows:
        numbers = retained["number"].to_numpy()
        start = 0
        while block is not None and start < len(numbers):
            stop = int(np.searchsorted(numbers, first + len(block)))
            if start < stop:
                columns = block.take(pa.array(numbers[start:stop] - first))
                ids, row = retained["id"].slice(start, stop - start), retained["row"].slice(start, stop - start)
                values = [ids.cast(pa.string()), columns["sequence"], columns["sha256"], columns["length"], row]
                yield pa.record_batch([*values, columns["notes"]], schema=PROTEINS)
            start = stop
            if start < len(numbers):
                first += len(block)
                block = next(blocks, None)


def _rechunked(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `BATCH_ROWS`, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= BATCH_ROWS:
            table = pa.Table.from_batches(waiting).combine_chunks()
            (block,) = table.slice(0, BATCH_ROWS).to_batches()
            yield block
            waiting = table.slice(BATCH_ROWS).to_batches()
    if waiting:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()


def new_shards(store: Storage, name: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Manifest entries for shards of about equal work that hold the new rows.

    Args:
        store: Where its files are.
        name: File name of the table of new proteins.
        manifest: The store's manifest, which does not list that table yet.
    """
    first = _next_row(manifest)
    size = _shard_size(sum(int(work.sum()) for work, _ in _work(store, name, first)), manifest)
    shards: list[dict[str, Any]] = []
    for (start, row, before), (stop, next_row, after) in pairwise(_boundaries(store, name, first, size)):
        if row < next_row:  # not repeated sequences alone
            file = f"vectors-{len(manifest['shards']) + len(shards):05d}.arrow"
            shards.append(
                {"file": file, "rows": [row, next_row], "proteins": [name, start, stop], "residues": after - before}
            )
    return shards


def _boundaries(store: Storage, name: str, first: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Line of the table, next new row and residues before it, where a shard begins and at the end of the table."""
    line = start = residues = 0  # `start`: the line where the current shard begins
    row, limit = first, size  # `limit`: residues that the current shard must not exceed
    yield start, row, residues
    for work, rows in _work(store, name, first):
        cumulative = residues + np.cumsum(work)
        while (stop := int(np.searchsorted(cumulative, limit, "right"))) < len(work):
            stop += line + stop == start  # a shard has at least one protein
            if stop:
                residues, row = int(cumulative[stop - 1]), int(rows[stop - 1])
            start, limit = line + stop, residues + size
            yield start, row, residues
        line, residues, row = line + len(work), int(cumulative[-1]), int(rows[-1])
    if start < line:
        yield line, row, residues


def _work(store: Storage, name: str, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each batch of a table: residues of each sequence at its first appearance, and the next new row after it."""
    for batch in store.batches(name, ["length", "row"]):
        after = np.maximum.accumulate(np.concatenate([[first], batch["row"].to_numpy() + 1]))
        yield np.where(np.diff(after) > 0, batch["length"].to_numpy(), 0), after[1:]
        first = int(after[-1])


def _shard_size(residues: int, manifest: dict[str, Any]) -> int:
    """Residues in a shard."""
    low, high = SHARD_RESIDUES
    size = min(max(residues // SHARD_COUNT, low), high)
    if manifest["pooling"] == "residue":
        size = min(size, SHARD_BYTES // (4 * manifest["dim"] * max(len(manifest.get("layers", [])), 1)))
    return size
