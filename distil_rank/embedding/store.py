"""Embeddings on disk: Arrow shards, memory-mapped, and a manifest that lists them.

    store/
      manifest.json           settings, counts, and each file's size and SHA-256
      provenance.json         when and where it was computed; not part of the content
      proteins-00000.arrow    id, sequence, sha256, length, row, notes; in input order
      vectors-00000.arrow     row, embedding (embedding_LAYER, where there are several); the rows of one shard in order

A *row* numbers the distinct sequences in the order of their first appearance; proteins with the same sequence share
one. A pooled store has one vector for each row, a per-residue store as many as the sequence has residues. A row without
a vector was skipped.
"""

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, model_validator

from distil_rank.embedding.layers import split_source
from distil_rank.embedding.storage import Location, Storage, is_remote
from distil_rank.errors import InputError, examples

logger = logging.getLogger(__name__)

EMBEDDINGS, CODES = "distil-rank embeddings", "distil-rank codes"  # a manifest's `format`: what the shards hold
VERSION = 1
PROVENANCE = "provenance.json"  # {"extractions": [{"versions", "machine", "computed", "seconds", "run", …}, …], …}
# what of `VECTOR_ORIGIN` stored rows depend on, in the order in which digests take them
SETTINGS = ("weights_sha256", "dim", "layer", "pooling", "precision", "long", "max_length")


class _Table(BaseModel, strict=True):
    file: str
    bytes: int
    sha256: str


class _Shard(BaseModel, strict=True):
    file: str
    rows: tuple[int, int]
    proteins: tuple[str, int, int]
    residues: int
    bytes: int | None = None  # size and hash are there when it is finished
    sha256: str | None = None


class _Code(BaseModel, strict=True):
    sha256: str
    rank: int
    dtype: str
    bytes: int


class _Manifest(BaseModel, strict=True):
    """What a manifest must hold, whatever else it does."""

    format: str
    dim: int
    backbone: str
    fallback: str | None
    proteins: list[_Table]
    shards: list[_Shard]
    layers: list[int] = Field([1, 2], min_length=2)
    code: _Code | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        tables, row = {table.file for table in self.proteins}, 0
        for shard in self.shards:
            if not row == shard.rows[0] < shard.rows[1]:
                raise ValueError(f"shards: the one that begins with row {row}")
            if shard.proteins[0] not in tables:
                raise ValueError(f"shards: where the proteins of {shard.file} are")
            if shard.sha256 is not None and shard.bytes is None:
                raise ValueError(f"shards: the size of {shard.file}")
            row = shard.rows[1]
        if (self.format == CODES) != (self.code is not None):
            raise ValueError("code")
        return self


def vectors_of(table: pa.Table, name: str = "embedding") -> np.ndarray:
    """A column of vectors as (vectors, dim) float32, without a copy where the table is one record batch."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no chunk, or too many for one array
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    values = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(-1, column.type.list_size)


class Store:
    """A finished store, opened for reading. Files are read on first use.

    Attributes:
        content: What it holds, `EMBEDDINGS` or `CODES`.
        digest: SHA-256 over what the vectors depend on and every file's SHA-256: equal digests mean equal content.
        dim: Width of the vectors.
        layers: The layers of a store that holds several, ascending; empty for a store of one.
        layer: Which of them this is; None for a store of one.
    """

    content: ClassVar[str] = EMBEDDINGS

    def __init__(self, storage: Storage, manifest: dict[str, Any], layer: int | None = None):
        self.storage = storage
        self.manifest = manifest
        self.dim: int = manifest["dim"]
        self.layers: list[int] = manifest.get("layers", [])
        self.layer = self._pick(layer)
        files = [file["sha256"] for file in manifest["proteins"] + manifest["shards"]]
        content = [settings_of(manifest), files, *([str(self.layer)] if self.layers else [])]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _pick(self, layer: int | None) -> int | None:
        held: list[int | None] = [*self.layers] or [self.manifest.get("layer")]
        names = examples(held)
        if layer is None and self.layers:
            layer = self.layers[-1]
            logger.info("%s holds the layers %s: taking the last, %s (…:LAYER takes another)", self.path, names, layer)
        if layer not in (None, *held):
            raise InputError(f"Expected a layer out of {names}, which the store {self.path} holds, but got {layer}.")
        return layer if self.layers else None

    @property
    def path(self) -> Location:
        """Its folder, or its address in S3."""
        return self.storage.location

    @classmethod
    def open(cls, path: Location, content: str | None = None) -> Self:
        """Opens a finished store.

        Args:
            path: The folder or address; `FOLDER:LAYER` picks one of several layers, by default the last.
            content: What it must hold; by default what this class is for.

        Raises:
            InputError: it is no store, is unfinished, lacks the layer, or a file is missing or has another size.
        """
        path, layer = split_source(path)
        storage, content = open_storage(path), content or cls.content
        manifest = read_manifest(storage, content)
        if manifest is None:
            raise InputError(f"Expected {content} at {path} but it has no manifest.json; make it with embed.")
        pending = [shard for shard in manifest["shards"] if "sha256" not in shard]
        if pending:
            raise InputError(
                f"Expected a finished store at {path} but {len(pending)} of {len(manifest['shards'])} shards are "
                f"missing; run the same embed command again."
            )
        sizes = storage.entries()
        for file in manifest["proteins"] + manifest["shards"]:
            size = sizes.get(file["file"], "no file")
            if size != file["bytes"]:
                remedy = "run the same embed command" if file in manifest["shards"] else "delete it and embed"
                raise InputError(
                    f"Expected {file['bytes']} bytes in {storage.where(file['file'])} but got {size}; the store is "
                    f"damaged: {remedy} again."
                )
        return cls(storage, manifest, layer)

    def at(self, layer: int) -> Self:
        """The same store at another of its layers; raises `InputError` where it lacks it."""
        return type(self)(self.storage, self.manifest, layer)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256; raises `InputError` where one was changed."""
        for file in self.manifest["proteins"] + self.manifest["shards"]:
            if self.storage.sha256(file["file"]) != file["sha256"]:
                where = self.storage.where(file["file"])
                raise InputError(f"Expected {where} unchanged but its SHA-256 differs; embed again.")

    @cached_property
    def _all_proteins(self) -> pa.Table:
        return pa.concat_tables([self.storage.table(file["file"]) for file in self.manifest["proteins"]])

    @cached_property
    def _vector_rows(self) -> np.ndarray:
        """The row of each stored vector, (vectors,), ascending."""
        return np.concatenate(
            [self.storage.table(shard["file"], ["row"])["row"].to_numpy() for shard in self.manifest["shards"]]
        )

    @cached_property
    def _has_vectors(self) -> np.ndarray:
        return np.isin(self._all_proteins["row"].to_numpy(), self._vector_rows)

    @cached_property
    def proteins(self) -> pa.Table:
        """id, sequence, sha256, length, row and notes of each protein that has vectors, in input order."""
        return self._all_proteins if self._has_vectors.all() else self._all_proteins.filter(pa.array(self._has_vectors))

    @cached_property
    def ids(self) -> list[str]:
        """The proteins' names, in input order."""
        return self.proteins["id"].to_pylist()

    @cached_property
    def sequences(self) -> list[str]:
        """The cleaned sequences, in input order."""
        return self.proteins["sequence"].to_pylist()

    @property
    def skipped(self) -> list[str]:
        """Names of the proteins that have no vectors, because they did not fit into memory."""
        return self._all_proteins.filter(pa.array(~self._has_vectors))["id"].to_pylist()

    def __len__(self) -> int:
        return len(self.proteins)

    @cached_property
    def _extents(self) -> tuple[np.ndarray, np.ndarray]:
        """First vector and number of vectors of each protein."""
        rows = self.proteins["row"].to_numpy()
        first = np.searchsorted(self._vector_rows, rows, "left")
        return first, np.searchsorted(self._vector_rows, rows, "right") - first

    def protein_of_row(self) -> np.ndarray:
        """Which protein each line of `embeddings()` belongs to, (lines,) indices into `ids`."""
        return np.repeat(np.arange(len(self)), self._extents[1])

    def embeddings(self) -> np.ndarray:
        """All vectors in the order of `ids`, (lines, dim) float32.

        Memory-mapped and read-only when the store is one shard without repeated sequences; otherwise a copy.
        """
        parts = [self.vectors(shard)[1] for shard in self.manifest["shards"]]
        vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        first, count = self._extents
        starts = np.cumsum(count) - count
        if len(vectors) == count.sum() and np.array_equal(first, starts):
            return vectors
        within = np.arange(count.sum()) - np.repeat(starts, count)
        return vectors[np.repeat(first, count) + within]

    def vectors(self, shard: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers, (vectors,), and memory-mapped vectors, (vectors, dim), of an entry of the manifest's shards."""
        column = column_of(self.layer)
        table = self.storage.table(shard["file"], ["row", column])
        return table["row"].to_numpy(), vectors_of(table, column)


def layers_of(manifest: dict[str, Any]) -> list[int]:
    """The layers that a store holds, one or several, ascending."""
    return manifest.get("layers") or [manifest["layer"]]


def column_of(layer: int | None) -> str:
    """Name of the column with a layer's vectors; None is for a store of one layer."""
    return "embedding" if layer is None else f"embedding_{layer}"


def open_storage(location: Location) -> Storage:
    """The files at a location, which need not exist; raises `InputError` where a package for it is missing."""
    if not is_remote(location):
        return Storage(Path(location))
    from distil_rank.embedding.s3 import S3Storage  # noqa: PLC0415  (optional: the s3 extra)

    return S3Storage(str(location))


def settings_of(manifest: dict[str, Any]) -> list[Any]:
    """The values of all settings that the stored rows depend on; of codes also their encoder's hash."""
    optional = [key for key in ("layers", "calibration_sha256") if key in manifest]
    values = [manifest.get(key) for key in (*SETTINGS, *optional)]
    return [*values, manifest["code"]["sha256"]] if manifest["format"] == CODES else values


def read_manifest(storage: Storage, content: str = EMBEDDINGS) -> dict[str, Any] | None:
    """The manifest of a store, finished or not, or None; `InputError` where it is damaged, or of another content."""
    file = storage.where("manifest.json")
    try:
        text = storage.read_bytes("manifest.json")
        manifest: dict[str, Any] = json.loads(text)
        kind, version = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"Expected the manifest of a store of {content} in {file} but it cannot be read.") from error
    if (kind, version) != (content, VERSION):
        raise InputError(
            f"Expected {content} version {VERSION} in {storage.location} but it holds {kind} version {version}; make "
            "the store again, or choose another."
        )
    try:
        _Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)]
        invalid = ": ".join(names) or str(first["ctx"]["error"])
        raise InputError(
            f"Expected the manifest of a store of {content} in {file} but {invalid} is missing or wrong; restore it, "
            "or choose another store."
        ) from error
    return manifest


def read_provenance(storage: Storage) -> dict[str, Any]:
    """What is recorded, with `extractions` in order; a file that cannot be read is warned of, and taken as empty."""
    try:
        content = json.loads(storage.read_bytes(PROVENANCE))
        return {**content, "extractions": [dict(one) for one in content["extractions"]]}
    except FileNotFoundError:
        return {"extractions": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = storage.where(PROVENANCE)
        logger.warning("%s cannot be read (%s): going on without what it records", where, error)
        return {"extractions": []}


def embedding_run(storage: Storage) -> str | None:
    """The MLflow run of the last extraction; None where none is recorded."""
    runs = [one["run"] for one in read_provenance(storage)["extractions"] if one.get("run")]
    return runs[-1] if runs else None
