"""Filling a store so that being killed at any moment loses nothing but the batch in progress.

1. *Plan* (one process, under a lock): new proteins go into a table, and distinct sequences are cut into shards. The
   manifest names the shards before the first is computed.
2. *Compute* (any number of processes): each batch becomes a part file; when a shard has all its parts they are merged
   in order of the rows and removed. The batches of a shard follow from its sequences alone, so that results do not
   depend on interruptions or on the number of processes.
3. *Finish* (one process): the shards' sizes and hashes go into the manifest.

Parts and shards carry the key of what they were computed from; one with another key, or damaged, is computed again.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distil_rank.embedding.planning import PARTS, Shard, join_shards, new_shards, write_new_proteins
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import (
    EMBEDDINGS,
    PROVENANCE,
    VERSION,
    column_of,
    open_storage,
    read_manifest,
    read_provenance,
    vectors_of,
)
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

# what a store holds beside its .arrow files and the manifest
OWN_NAMES = (PARTS, PROVENANCE, "encoder", "calibration.safetensors")


class StoreWriter:
    """A store of `EMBEDDINGS` or `CODES` that is being filled; `lock` creates its folder."""

    def __init__(self, path: Location, content: str = EMBEDDINGS):
        self.storage = open_storage(path)
        self.path = self.storage.location
        self.content = content

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest on disk; empty before `plan`."""
        return read_manifest(self.storage, self.content) or {}

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        if manifest != self.manifest:
            self.storage.write("manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")

    def another(self, value: object) -> str:
        """What to type for a store beside this one, named by what is different."""
        name = f"{self.path}-{Path(str(value)).stem.replace(',', '-')[:20]}"
        return f"take another store: --store {name} (evaluate and recommend: --data {name}; make: STORE=, DATA=)"

    def plan(
        self,
        proteins: Iterable[Protein],
        settings: dict[str, Any],
        description: dict[str, Any],
        report: CleaningReport,
    ) -> int:
        """Adds the proteins that the store lacks and cuts their sequences into shards; returns how many they are.

        Args:
            proteins: Names, which may repeat, and cleaned sequences.
            settings: What the vectors depend on, at least `pooling`, `dim`, `long` and `max_length`.
            description: Further entries of a new store's manifest, such as the backbone's name.
            report: What reading `proteins` changed, for the manifest.

        Raises:
            InputError: the settings differ from the store's, or the store has a name with another sequence.
        """
        self.check_folder()
        header = {"format": self.content, "version": VERSION}
        manifest = self.manifest or {**header, **settings, **description, "proteins": [], "shards": []}
        for key, value in settings.items():
            if manifest.get(key) != value:
                raise InputError(
                    f"Expected {key} {manifest.get(key)!r}, which the store {self.path} was made with, but got "
                    f"{value!r}; {self.another(value)}."
                )
        self._record_finished(manifest)
        name = f"proteins-{len(manifest['proteins']):05d}.arrow"
        added = write_new_proteins(self.storage, name, proteins, manifest, report)
        if added:
            manifest["shards"] += new_shards(self.storage, name, manifest)
            entry = {"file": name, "rows": added, "source": Path(report.source).name, "cleaning": dict(report.counts)}
            manifest["proteins"].append({**entry, **self.storage.fingerprint(name)})
        self._write_manifest(manifest)
        return added

    def check_folder(self) -> None:
        """Raises `InputError` where there is something else than a store, or what is left of one's first files."""
        if self.manifest:
            return
        for name in self.storage.entries():
            if not (name.startswith(".") or name.endswith(".arrow") or name in OWN_NAMES):
                raise InputError(f"Expected an empty folder for the store at {self.path} but it holds {name}.")

    def record_extraction(self, **entries: Any) -> None:
        """Appends an extraction to the provenance; the caller holds the lock."""
        content = read_provenance(self.storage)
        content["extractions"].append(entries)
        self.storage.write(PROVENANCE, json.dumps(content, indent=1).encode() + b"\n")

    def pending(self, together: int = 0) -> list[Shard]:
        """The shards that the manifest does not list as finished, in order.

        Joined, as many as have `together` residues, whether finished or not: what is computed together stays the same.
        """
        manifest = self.manifest
        unfinished = {entry["file"] for entry in manifest["shards"] if "sha256" not in entry}
        joined = join_shards((Shard.of(entry, manifest) for entry in manifest["shards"]), together)
        return [shard for shard in joined if unfinished.intersection(part.file for part in shard.members or [shard])]

    def sequences(self, shard: Shard) -> dict[int, str]:
        """Row and sequence of the shard's distinct sequences, in order of the rows."""
        table = self.storage.lines(*shard.proteins, ["row", "sequence"])
        sequence_of: dict[int, str] = {}
        for row, sequence in zip(table["row"].to_pylist(), table["sequence"].to_pylist(), strict=True):
            if shard.rows[0] <= row < shard.rows[1]:
                sequence_of.setdefault(row, sequence)
        return sequence_of

    def ids(self, shard: Shard, rows: Sequence[int]) -> list[str]:
        """Names of the shard's proteins that have these rows."""
        table = self.storage.lines(*shard.proteins, ["row", "id"])
        return table.filter(pc.is_in(table["row"], pa.array(rows, pa.int64())))["id"].to_pylist()

    def is_sealed(self, shard: Shard) -> bool:
        """Whether the shard's files are complete."""
        return all(self._computed(part.file, part.key, ["row"]) is not None for part in shard.members or [shard])

    def _parts(self, shard: Shard) -> list[pa.Table]:
        """Its finished batches."""
        names = [
            f"{shard.parts}/{name}" for name in sorted(self.storage.entries(shard.parts)) if name.endswith(".arrow")
        ]
        return [table for name in names if (table := self._computed(name, shard.key)) is not None]

    def done(self, shard: Shard) -> set[int]:
        """The rows of finished batches, including skipped sequences."""
        return {row for part in self._parts(shard) for row in _rows_of(part)}

    def write_part(self, shard: Shard, rows: list[int], counts: list[int], vectors: np.ndarray) -> None:
        """Writes one batch.

        Args:
            shard: The batch's shard.
            rows: Of its sequences.
            counts: Vectors of each; 0 for a skipped one.
            vectors: (sum of counts, dim) float32; (layers, sum of counts, dim) for a store of several.
        """
        columns = dict(zip(self._columns(), vectors if vectors.ndim == 3 else vectors[None], strict=True))
        table = _table(np.repeat(rows, counts), columns, {"key": shard.key, "rows": json.dumps(rows)})
        self.storage.write(f"{shard.parts}/{rows[0]}.arrow", table)

    def _columns(self) -> list[str]:
        return [column_of(layer) for layer in self.manifest.get("layers", [])] or [column_of(None)]

    def seal(self, shard: Shard) -> None:
        """Merges the shard's parts into its file, in order of the rows, and removes them; `InputError` if one lacks."""
        parts = self._parts(shard)
        if not {row for part in parts for row in _rows_of(part)}.issuperset(range(*shard.rows)):
            if self.is_sealed(shard):  # by an earlier run, or by the process that took the shard over from this one
                return
            raise InputError(
                f"Expected all parts of {shard.file} in {self.path}/{PARTS} but some are missing; run again."
            )
        rows = np.concatenate([part["row"].to_numpy() for part in parts])
        vectors = {name: np.concatenate([vectors_of(part, name) for part in parts]) for name in self._columns()}
        order = np.argsort(rows, kind="stable")  # stable: the residues of a sequence stay in order
        rows = rows[order]
        for one in reversed(shard.members or [shard]):  # the first, in whose folder the parts are, when all others are
            if shard.members and self.is_sealed(one):  # by an earlier run
                continue
            own = slice(*np.searchsorted(rows, one.rows))
            columns = {name: column[order[own]] for name, column in vectors.items()}
            self.storage.write(one.file, _table(rows[own], columns, {"key": one.key}))
        self.storage.delete_folder(shard.parts)

    def _record_finished(self, manifest: dict[str, Any]) -> None:
        """Sets size and hash of complete shards, clears those of damaged ones."""
        sizes = self.storage.entries()
        for entry in manifest["shards"]:
            file, shard = entry["file"], Shard.of(entry, manifest)
            if "sha256" in entry:
                if sizes.get(file) != entry["bytes"]:
                    logger.warning("%s is missing or damaged: it is computed again", self.storage.where(file))
                    self.storage.delete(file)
                    for key in ("vectors", "skipped", "bytes", "sha256"):
                        entry.pop(key, None)
            elif file in sizes and (table := self._computed(file, shard.key, ["row"])) is not None:
                rows = table["row"].to_numpy()
                skipped = shard.rows[1] - shard.rows[0] - len(np.unique(rows))
                entry.update(vectors=len(rows), skipped=skipped, **self.storage.fingerprint(file))
                self.storage.delete_folder(shard.parts)

    def _computed(self, name: str, key: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """What was computed for this key; a file with another key, or a damaged one, is deleted."""
        if self.storage.size(name) is None:
            return None
        with suppress(InputError):
            table = self.storage.table(name, columns)
            if (table.schema.metadata or {}).get(b"key") == key.encode():
                return table
        where = self.storage.where(name)
        logger.warning("%s is damaged or of other proteins, settings or batches: it is computed again", where)
        self.storage.delete(name)
        return None

    def finish(self) -> None:
        """Records complete shards; when none is pending, deletes the folder of parts (not a store of that name)."""
        manifest = self.manifest
        self._record_finished(manifest)
        self._write_manifest(manifest)
        if (
            all("sha256" in shard for shard in manifest["shards"])
            and self.storage.size(f"{PARTS}/manifest.json") is None
        ):
            self.storage.delete_folder(PARTS)


def _rows_of(part: pa.Table) -> list[int]:
    """The rows of a finished batch, including skipped sequences."""
    return list(json.loads(part.schema.metadata[b"rows"]))


def _table(rows: np.ndarray, columns: Mapping[str, np.ndarray], metadata: dict[str, str]) -> pa.Table:
    """The table of a shard or part: row numbers, `(vectors,)`, and columns of vectors or codes, `(vectors, width)`."""
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
        for name, vectors in columns.items()
    }
    return pa.table({"row": pa.array(rows, pa.int64()), **arrays}, metadata=metadata)
