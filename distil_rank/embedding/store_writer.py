"""Filling a store so that being killed at any moment loses nothing but the batch in progress.

Three steps, each of which writes files atomically:

1. *Plan* (one process, under a lock): new proteins go into a table, and distinct sequences are cut into shards of
   about equal work. The manifest names the shards before the first is computed.
2. *Compute* (any number of processes): each batch becomes a part file; when a shard has all its parts they are merged
   in order of the rows and removed. The batches of a shard follow from its sequences alone, so that a resumed run
   computes the same ones, and results do not depend on interruptions or on the number of processes.
3. *Finish* (one process): the shards' sizes and hashes go into the manifest.

Parts and shards carry the key of what they were computed from. A file with another key, or one that cannot be read, is
deleted and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distil_rank.embedding.locking import exclusive_lock
from distil_rank.embedding.planning import TEMPORARY, new_shards, write_new_proteins
from distil_rank.embedding.provenance import FORMERLY_IN_MANIFEST, read_provenance, write_provenance
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.store import (
    EMBEDDINGS,
    VERSION,
    column_of,
    layers_of,
    read_manifest,
    read_table,
    settings_of,
    sha256_of,
    size_of,
    vectors_of,
    write_atomically,
)
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

MORE_MEMORY = 1.05  # times the memory of the device that skipped a sequence: retry; a machine's own varies a little
# what a store holds beside its .arrow files and the manifest
OWN_NAMES = ("parts", "provenance.json", "code_map", "calibration.safetensors")


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


class StoreWriter:
    """A store that is being filled.

    Args:
        path: The folder; created by `lock`.
        content: What the store holds, `EMBEDDINGS` or `CODES`.
    """

    def __init__(self, path: str | Path, content: str = EMBEDDINGS):
        self.path = Path(path)
        self.content = content

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest on disk; empty before `plan`."""
        return read_manifest(self.path, self.content) or {}

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        if manifest != self.manifest:
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")

    def lock(self) -> AbstractContextManager[None]:
        """Takes the store's exclusive lock.

        Raises:
            InputError: another process holds it, or the folder cannot be made.
        """
        return exclusive_lock(self.path)

    def plan(
        self,
        proteins: Iterable[Protein],
        settings: dict[str, Any],
        description: dict[str, Any],
        report: CleaningReport,
    ) -> int:
        """Adds the proteins that the store lacks and cuts their sequences into shards.

        Args:
            proteins: Names, which may repeat, and cleaned sequences.
            settings: What the vectors depend on; must equal the store's. Needs `pooling`, `dim`, and `long`, what
                happens to proteins above `max_length` residues.
            description: Further entries of a new store's manifest, such as the backbone's name.
            report: What reading `proteins` changed; kept in the manifest.

        Returns:
            The number of added proteins.

        Raises:
            InputError: the settings differ from the store's, or the store has a name with another sequence.
        """
        manifest = self._begin(settings, description)
        self._move_provenance(manifest)
        self._record_finished(manifest)
        name = f"proteins-{len(manifest['proteins']):05d}.arrow"
        added = write_new_proteins(self.path, name, proteins, manifest, report)
        if added:
            manifest["shards"] += new_shards(self.path, name, manifest)
            entry = {"file": name, "rows": added, "source": Path(report.source).name, "cleaning": dict(report.counts)}
            manifest["proteins"].append({**entry, **_fingerprint(self.path / name)})
        self._write_manifest(manifest)
        return added

    def _begin(self, settings: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
        """The manifest of a store with these settings; a new one where there is none.

        Raises:
            InputError: a folder of something else, or a store of other settings.
        """
        manifest = self.manifest
        if not manifest:
            unexpected = [entry.name for entry in self.path.iterdir() if not _belongs_to_store(entry)]
            if unexpected:
                raise InputError(f"Expected an empty folder for the store at {self.path} but it holds {unexpected[0]}.")
            header = {"format": self.content, "version": VERSION}
            manifest = {**header, **settings, **description, "proteins": [], "shards": []}
        for key, value in settings.items():
            if manifest.get(key) != value:
                raise InputError(
                    f"Expected {key} {manifest.get(key)!r}, which the store {self.path} was made with, but got "
                    f"{value!r}; choose another store."
                )
        return manifest

    def _move_provenance(self, manifest: dict[str, Any]) -> None:
        """Moves what manifests held up to version 0.1 into the file for provenance."""
        former = {key: manifest.pop(key) for key in FORMERLY_IN_MANIFEST if key in manifest}
        if former:
            provenance = read_provenance(self.path)
            first = {"versions": former.get("versions"), "run": former.get("embedding_run")}
            first = {key: value for key, value in first.items() if value}
            if first not in provenance["extractions"]:  # as after a kill before the manifest is written
                provenance["extractions"].insert(0, first)
            provenance |= {key: value for key, value in former.items() if key == "bf16_cosine"}
            write_provenance(self.path, provenance)

    def update(self, **entries: Any) -> None:
        """Sets entries of the manifest."""
        self._write_manifest({**self.manifest, **entries})

    def record(self, **entries: Any) -> None:
        """Sets entries of the provenance."""
        write_provenance(self.path, {**read_provenance(self.path), **entries})

    def record_extraction(self, **entries: Any) -> None:
        """Appends an extraction to the provenance."""
        self.record(extractions=[*read_provenance(self.path)["extractions"], entries])

    def record_run(self, run: str) -> None:
        """Names the MLflow run of the last extraction in the provenance."""
        *before, last = read_provenance(self.path)["extractions"] or [{}]
        self.record(extractions=[*before, {**last, "run": run}])

    def pending(self) -> list[Shard]:
        """The shards that the manifest does not list as finished, in order."""
        manifest = self.manifest
        return [_shard(entry, manifest) for entry in manifest["shards"] if "sha256" not in entry]

    def retry_skipped(self, memory: int, every: bool = False) -> int:
        """Makes skipped sequences pending again where the device has more memory than the one that skipped them.

        The caller holds the lock. Killed at any moment, it loses no vector.

        Args:
            memory: Bytes of memory of the device that computes next.
            every: Retry regardless of the memory.

        Returns:
            The number of sequences to retry.
        """
        manifest = self.manifest
        reopened: list[Path] = []
        retried = 0
        for entry in manifest["shards"]:
            file = self.path / entry["file"]
            if not entry.get("skipped") or not _retries(table := read_table(file), memory, every):
                continue
            rows, counts = np.unique(table["row"].to_numpy(), return_counts=True)
            if len(rows):
                vectors = np.stack([vectors_of(table, name) for name in self._columns()])
                self.write_part(_shard(entry, manifest), rows.tolist(), counts.tolist(), vectors)
            retried += entry["skipped"]
            _clear(entry)
            reopened.append(file)
        self._write_manifest(manifest)
        for file in reopened:
            file.unlink()
        for part in self.path.glob("parts/*/*.arrow"):  # of shards in progress
            table = read_table(part)
            missing = len(json.loads(table.schema.metadata[b"rows"])) - len(np.unique(table["row"].to_numpy()))
            if missing and _retries(table, memory, every):
                retried += missing
                part.unlink()
        return retried

    def sequences(self, shard: Shard) -> dict[int, str]:
        """Row and sequence of the shard's distinct sequences, in order of the rows."""
        name, start, stop = shard.proteins
        table = read_table(self.path / name).slice(start, stop - start).select(["row", "sequence"])
        sequence_of: dict[int, str] = {}
        for batch in table.to_batches():
            for row, sequence in zip(batch["row"].to_pylist(), batch["sequence"].to_pylist(), strict=True):
                if shard.rows[0] <= row < shard.rows[1]:
                    sequence_of.setdefault(row, sequence)
        return sequence_of

    def ids(self, shard: Shard, rows: Sequence[int]) -> list[str]:
        """Names of the shard's proteins that have these rows."""
        name, start, stop = shard.proteins
        table = read_table(self.path / name).slice(start, stop - start)
        return table.filter(pc.is_in(table["row"], pa.array(rows, pa.int64())))["id"].to_pylist()

    def is_sealed(self, shard: Shard) -> bool:
        """Whether the shard's file is complete."""
        return _computed(self.path / shard.file, shard.key) is not None

    def _parts(self, shard: Shard) -> Path:
        return self.path / "parts" / shard.file.removesuffix(".arrow")

    def done(self, shard: Shard) -> set[int]:
        """The rows of finished batches, including skipped sequences."""
        rows: set[int] = set()
        for part in sorted(self._parts(shard).glob("*.arrow")):
            table = _computed(part, shard.key)
            if table is not None:
                rows.update(json.loads(table.schema.metadata[b"rows"]))
        return rows

    def write_part(
        self, shard: Shard, rows: list[int], counts: list[int], vectors: np.ndarray, memory: int | None = None
    ) -> None:
        """Writes one batch.

        Args:
            shard: The batch's shard.
            rows: Rows of the batch's sequences.
            counts: Number of vectors of each; 0 for a skipped one.
            vectors: (sum of counts, dim) float32; (layers, sum of counts, dim) for a store of several.
            memory: Bytes of memory of the device; recorded where it skipped a sequence.
        """
        metadata = {"key": shard.key, "rows": json.dumps(rows)}
        if memory is not None and 0 in counts:
            metadata["memory"] = str(memory)
        columns = dict(zip(self._columns(), vectors if vectors.ndim == 3 else vectors[None], strict=True))
        table = vector_table(np.repeat(rows, counts), columns, metadata)
        write_atomically(self._parts(shard) / f"{rows[0]}.arrow", table)

    def _columns(self) -> list[str]:
        return [column_of(layer) for layer in layers_of(self.manifest)] or [column_of(None)]

    def seal(self, shard: Shard) -> None:
        """Merges the shard's parts into its file, in order of the rows, and removes them."""
        parts = [read_table(part) for part in sorted(self._parts(shard).glob("*.arrow"))]
        rows = np.concatenate([part["row"].to_numpy() for part in parts])
        order = np.argsort(rows, kind="stable")  # stable: the residues of a sequence stay in order
        metadata = {"key": shard.key}
        memories = [int(part.schema.metadata[b"memory"]) for part in parts if b"memory" in part.schema.metadata]
        if memories:
            metadata["memory"] = str(min(memories))
        columns = {name: np.concatenate([vectors_of(part, name) for part in parts])[order] for name in self._columns()}
        write_atomically(self.path / shard.file, vector_table(rows[order], columns, metadata))
        shutil.rmtree(self._parts(shard))

    def _record_finished(self, manifest: dict[str, Any]) -> None:
        """Sets size and hash of complete shards, clears those of damaged ones; deletes killed runs' temporary files."""
        for shard in manifest["shards"]:
            file = self.path / shard["file"]
            if "sha256" in shard and size_of(file) != shard["bytes"]:
                logger.warning("%s is missing or damaged: it is computed again", file)
                file.unlink(missing_ok=True)
                _clear(shard)
            table = None if "sha256" in shard else _computed(file, _key(shard, manifest))
            if table is not None:
                rows = table["row"].to_numpy()
                shard["vectors"] = len(rows)
                shard["skipped"] = shard["rows"][1] - shard["rows"][0] - len(np.unique(rows))
                shard.update(_fingerprint(file))
                shutil.rmtree(self.path / "parts" / file.stem, ignore_errors=True)
        for temporary in [*self.path.glob(".*.arrow*"), *self.path.glob(".*.json.*")]:
            temporary.unlink(missing_ok=True)
        for folder in self.path.glob(f"{TEMPORARY}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Records complete shards in the manifest; deletes the folder of parts when no shard is pending.

        The manifest then depends on the proteins and the settings only.
        """
        manifest = self.manifest
        self._record_finished(manifest)
        self._write_manifest(manifest)
        finished = all("sha256" in shard for shard in manifest["shards"])
        if finished and not (self.path / "parts" / "manifest.json").exists():  # unless a store of that name
            shutil.rmtree(self.path / "parts", ignore_errors=True)


def _shard(entry: dict[str, Any], manifest: dict[str, Any]) -> Shard:
    """The shard of an entry in the manifest."""
    rows, proteins = tuple(entry["rows"]), tuple(entry["proteins"])
    return Shard(entry["file"], rows, proteins, entry["residues"], _key(entry, manifest))


def _clear(entry: dict[str, Any]) -> None:
    """Makes a shard's entry in the manifest one that is pending."""
    for key in ("vectors", "skipped", "bytes", "sha256"):
        entry.pop(key, None)


def _retries(table: pa.Table, memory: int, every: bool) -> bool:
    """Whether to retry the sequences that a shard or part lacks; without a recorded memory only on request."""
    recorded = table.schema.metadata.get(b"memory")
    return every or (recorded is not None and memory > MORE_MEMORY * int(recorded))


def _key(shard: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Digest of what determines the shard's vectors: the settings, and its lines of a table of proteins."""
    name = shard["proteins"][0]
    table = next(file["sha256"] for file in manifest["proteins"] if file["file"] == name)
    inputs = [settings_of(manifest), table, shard["proteins"], shard["rows"]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _computed(file: Path, key: str) -> pa.Table | None:
    """The vectors computed for this key; a file with another key, or a damaged one, is deleted."""
    if not file.exists():
        return None
    with suppress(InputError):
        table = read_table(file)
        if (table.schema.metadata or {}).get(b"key") == key.encode():
            return table
    logger.warning("%s is damaged or of other proteins or settings: it is computed again", file)
    file.unlink()
    return None


def _belongs_to_store(entry: Path) -> bool:
    """Whether an entry of a store's folder may be there before its manifest; another store in a sub-folder may, too."""
    own = entry.name.startswith(".") or entry.suffix == ".arrow" or entry.name in OWN_NAMES
    return own or (entry / "manifest.json").exists()


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def vector_table(rows: np.ndarray, columns: Mapping[str, np.ndarray], metadata: dict[str, str]) -> pa.Table:
    """The table of a shard or part: row numbers, `(vectors,)`, and columns of vectors or codes, `(vectors, width)`."""
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
        for name, vectors in columns.items()
    }
    return pa.table({"row": pa.array(rows, pa.int64()), **arrays}, metadata=metadata)
