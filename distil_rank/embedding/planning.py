"""Planning a store: which proteins are new, which sequences are distinct, and how they are cut into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distil_rank.embedding.compact_map import CompactMap
from distil_rank.embedding.sequences import Protein
from distil_rank.embedding.store import atomic_file, read_table
from distil_rank.errors import InputError

SHARD_COUNT = 256  # enough to balance a cluster, few enough for any file system
SHARD_RESIDUES = (2**16, 2**22)  # bounds of a shard's size
SHARD_BYTES = 2**28  # of vectors: limits the memory that merging a shard takes
BATCH_ROWS = 4096  # proteins in one record batch of the table

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


def write_new_proteins(store: Path, name: str, proteins: Iterable[Protein], manifest: dict[str, Any]) -> int:
    """Writes the table of the proteins that the store lacks; writes nothing if there is none.

    Args:
        store: The folder.
        name: File name of the table.
        proteins: Names and cleaned sequences.
        manifest: The store's manifest.

    Returns:
        The number of new proteins.

    Raises:
        InputError: the store has a protein of one of the names with another sequence.
    """
    rows = _new_rows(store, proteins, manifest)
    block = list(islice(rows, BATCH_ROWS))
    added = len(block)
    if added:
        with atomic_file(store / name) as file, pa.ipc.new_file(file, PROTEINS) as writer:
            while block:
                writer.write_batch(_record_batch(block))
                block = list(islice(rows, BATCH_ROWS))
                added += len(block)
    return added


def _new_rows(store: Path, proteins: Iterable[Protein], manifest: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Table rows of the new proteins; new sequences are numbered from the last one on."""
    row_of, row_of_name = CompactMap(), CompactMap()
    for file in manifest["proteins"]:
        for batch in read_table(store / file["file"]).to_batches():
            columns = (batch[column].to_pylist() for column in ("id", "sequence", "row"))
            for name, sequence, row in zip(*columns, strict=True):
                row_of.setdefault(sequence, row)
                row_of_name.setdefault(name, row)
    sharded = max((shard["rows"][1] for shard in manifest["shards"]), default=0)
    if sharded != len(row_of):
        raise InputError(
            f"Expected shards for {len(row_of)} sequences in {store}/manifest.json but got shards for "
            f"{sharded}; it was changed by hand: restore it, or choose another store."
        )
    for protein in proteins:
        stored_row = row_of_name.get(protein.id)
        row = row_of.setdefault(protein.sequence, len(row_of))
        if stored_row == row:
            continue
        if stored_row is not None:
            raise InputError(
                f"Expected {protein.id} with the sequence that {store} has for it but got another; "
                "rename it, or choose another store."
            )
        digest, length = hashlib.sha256(protein.sequence.encode()).digest(), len(protein.sequence)
        note = manifest["long"] if length > manifest["max_length"] else ""
        yield protein.id, protein.sequence, digest, length, row, note


def new_shards(store: Path, name: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Manifest entries for shards of about equal work that hold the new rows.

    Args:
        store: The folder.
        name: File name of the table of new proteins.
        manifest: The store's manifest, which does not list that table yet.
    """
    table = read_table(store / name)
    lengths, rows = table["length"].to_numpy(), table["row"].to_numpy()
    first_new = max((shard["rows"][1] for shard in manifest["shards"]), default=0)
    highest = np.maximum.accumulate(np.concatenate([[first_new - 1], rows]))
    first_seen = rows > highest[:-1]
    work = np.where(first_seen, lengths, 0)
    low, high = SHARD_RESIDUES
    size = min(max(int(work.sum()) // SHARD_COUNT, low), high)
    if manifest["pooling"] == "residue":
        size = min(size, SHARD_BYTES // (4 * manifest["dim"] * max(len(manifest.get("layers", [])), 1)))
    cumulative = np.cumsum(work)
    shards: list[dict[str, Any]] = []
    start = 0
    while start < len(work):
        before = int(cumulative[start - 1]) if start else 0
        stop = max(int(np.searchsorted(cumulative, before + size, "right")), start + 1)
        if first_seen[start:stop].any():
            shards.append(
                {
                    "file": f"vectors-{len(manifest['shards']) + len(shards):05d}.arrow",
                    "rows": [int(highest[start]) + 1, int(highest[stop]) + 1],
                    "proteins": [name, start, stop],
                    "residues": int(work[start:stop].sum()),
                }
            )
        start = stop
    return shards


def _record_batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = [pa.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), PROTEINS, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=PROTEINS)
