"""Shards of a store: what its manifest says of each, and the tables that hold their vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distil_rank.embedding.store import settings_of

PARTS = "parts"  # the folder of finished batches


@dataclass(frozen=True)
class Shard:
    """Consecutive distinct sequences that are computed and stored together.

    Attributes:
        file: Name of its Arrow file in the store.
        rows: First row and the one behind the last.
        proteins: Where in the table of proteins these rows first appear: file, first line, line behind the last.
        residues: Residues to compute.
        key: Digest of what determines its vectors.
    """

    file: str
    rows: tuple[int, int]
    proteins: tuple[str, int, int]
    residues: int
    key: str

    @property
    def parts(self) -> str:
        """Folder of its finished batches."""
        return f"{PARTS}/{self.file.removesuffix('.arrow')}"


def shard_of(entry: dict[str, Any], manifest: dict[str, Any]) -> Shard:
    """The shard of an entry in the manifest."""
    rows, proteins = tuple(entry["rows"]), tuple(entry["proteins"])
    return Shard(entry["file"], rows, proteins, entry["residues"], key_of(entry, manifest))


def reopen(entry: dict[str, Any]) -> None:
    """Makes a shard's entry in the manifest one that is pending."""
    for key in ("vectors", "skipped", "bytes", "sha256"):
        entry.pop(key, None)


def key_of(shard: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Digest of what determines the shard's vectors: the settings, and its lines of a table of proteins."""
    name = shard["proteins"][0]
    table = next(file["sha256"] for file in manifest["proteins"] if file["file"] == name)
    inputs = [settings_of(manifest), table, shard["proteins"], shard["rows"]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def vector_table(rows: np.ndarray, columns: Mapping[str, np.ndarray], metadata: dict[str, str]) -> pa.Table:
    """The table of a shard or part: row numbers, `(vectors,)`, and columns of vectors or codes, `(vectors, width)`."""
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
        for name, vectors in columns.items()
    }
    return pa.table({"row": pa.array(rows, pa.int64()), **arrays}, metadata=metadata)
