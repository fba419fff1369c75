"""Embeddings in common file formats: one function to read them all, and one to write them.

Nothing here unpickles: `.pt` files load with `weights_only=True`, NumPy files with `allow_pickle=False`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distil_rank.embedding.layers import split_source
from distil_rank.embedding.location import is_remote
from distil_rank.embedding.provenance import embedding_run
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError

FINITE_CHECK_ROWS = 65_536  # rows checked at a time, so that a file may be larger than memory


@dataclass(frozen=True)
class Embeddings:
    """A matrix of embeddings and the annotations of its rows.

    Attributes:
        ids: The protein of each row, (N,). A protein's name repeats for each of its residues in per-residue data.
        x: The vectors, (N, d) float32; memory-mapped when the file allows it.
        sequences: The amino-acid sequence of each row's protein, where available.
        labels: A class for each row, where available.
        clusters: The sequence cluster of each row, where available.
        provenance: Where the matrix comes from: file, format, and the entries of a store's manifest.
    """

    ids: list[str]
    x: np.ndarray
    sequences: list[str] | None = None
    labels: list[str] | None = None
    clusters: list[str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def load_matrix(path: str | Path) -> Embeddings:
    """Reads embeddings from any supported file or folder.

    `.npy`, `.npz`, `.safetensors`, `.pt` (a tensor, or a mapping with the key `embeddings`), `.h5`/`.hdf5` (one data
    set per protein, UniProt's convention), a folder of fair-esm's per-protein `.pt` files, a folder with
    `embeddings_train.pt` and `embeddings_val.pt`, or a store made by `distil-rank embed` (`STORE:LAYER` for one of
    several layers). In `.npz`, `.pt` and
    `.safetensors` the matrix is `embeddings`, or the only 2-d array; `ids`, `sequences`, `labels` and `clusters` are
    optional.

    Raises:
        InputError: the path is missing, damaged, of an unknown format, or holds no finite (N, d) matrix.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(Path(folder) / "x.npy", np.eye(3, 5, dtype=np.float32))
    ...     embeddings = load_matrix(Path(folder) / "x.npy")
    >>> embeddings.x.shape, embeddings.ids
    ((3, 5), ['0', '1', '2'])
    """
    if is_remote(path):
        return _validated(_read_store(path), path)
    given, (source, layer) = path, split_source(path)
    path = Path(source)
    if not path.exists():
        raise InputError(f"Expected embeddings at {given} but it does not exist; make them with `distil-rank embed`.")
    reader = _folder_reader(path) if path.is_dir() else READERS.get(path.suffix.lower())
    if layer is not None:
        if reader is not _read_store:
            raise InputError(f"Expected a store of embeddings before :{layer} but {path} is none; name the file alone.")
        path = Path(given)
    if reader is None:
        raise InputError(
            f"Expected embeddings as {', '.join(READERS)} or a folder of them but got {path.name}; convert it first."
        )
    try:
        embeddings = reader(path)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from error
    return _validated(embeddings, path)


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:160]
    return InputError(f"Expected embeddings in {path} but it cannot be read ({reason}); make it again.")


def _validated(embeddings: Embeddings, path: Location) -> Embeddings:
    """Checks shapes, lengths and finite values, and converts the matrix to float32."""
    x = embeddings.x
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind != "f":
        raise InputError(f"Expected a float matrix (N, d) in {path} but got {x.dtype} {x.shape}; convert it first.")
    for name in ("ids", "sequences", "labels", "clusters"):
        column = getattr(embeddings, name)
        if column is not None and len(column) != len(x):
            raise InputError(f"Expected {len(x)} {name} in {path}, one for each row, but got {len(column)}.")
    for start in range(0, len(x), FINITE_CHECK_ROWS):
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
            finite = np.isfinite(x[start : start + FINITE_CHECK_ROWS].astype(np.float32, copy=False)).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise InputError(
                f"Expected finite float32 numbers in {path} but row {row} ({embeddings.ids[row]}) holds NaN or inf."
            )
    if x.dtype != np.float32:
        x = x.astype(np.float32)
    return replace(embeddings, x=x, provenance={"source": str(path), **embeddings.provenance})


def _from_mapping(arrays: dict[str, Any], path: Path, kind: str) -> Embeddings:
    """Selects the matrix and the columns from named arrays."""
    matrices = [name for name, value in arrays.items() if getattr(value, "ndim", 0) == 2]
    name = "embeddings" if "embeddings" in arrays else matrices[0] if len(matrices) == 1 else None
    if name is None:
        raise InputError(
            f"Expected `embeddings` or one 2-d array in {path} but got {', '.join(arrays) or 'nothing'}; name one of "
            "them `embeddings`."
        )
    x = np.asarray(arrays[name])
    columns = {
        key: [str(value) for value in arrays[key]]
        for key in ("ids", "sequences", "labels", "clusters")
        if arrays.get(key) is not None
    }
    ids = columns.pop("ids", None) or [str(row) for row in range(len(x) if x.ndim else 0)]
    return Embeddings(ids, x, provenance={"format": kind}, **columns)


def _read_npy(path: Path) -> Embeddings:
    x = np.load(path, mmap_mode="r", allow_pickle=False)
    return _from_mapping({"embeddings": x}, path, "npy")


def _read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    if "sequence_ends" in arrays:
        text, ends = arrays["sequences"].tobytes().decode(), arrays.pop("sequence_ends").tolist()
        arrays["sequences"] = [text[start:stop] for start, stop in pairwise([0, *ends])]
    return _from_mapping(arrays, path, "npz")


def _to_numpy(value: Any) -> Any:
    return value.float().numpy() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, framework="pt") as file:
        arrays: dict[str, Any] = {name: _to_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        arrays |= {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in COLUMNS}
    return _from_mapping(arrays, path, "safetensors")


def _torch_load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_pt(path: Path) -> Embeddings:
    content = _torch_load(path)
    if isinstance(content, torch.Tensor):
        content = {"embeddings": content}
    if not isinstance(content, dict):
        raise InputError(f"Expected a tensor or a mapping in {path} but got {type(content).__name__}.")
    if any(key in content for key in FAIR_ESM_KEYS):
        return _read_fair_esm_file(path)
    return _from_mapping({key: _to_numpy(value) for key, value in content.items()}, path, "pt")


FAIR_ESM_KEYS = ("mean_representations", "bos_representations", "representations")
COLUMNS = ("ids", "sequences", "labels", "clusters")


def _read_fair_esm_file(path: Path) -> Embeddings:
    content = _torch_load(path)
    kind = next((key for key in FAIR_ESM_KEYS if isinstance(content, dict) and content.get(key)), None)
    if kind is None:
        raise InputError(f"Expected one of {', '.join(FAIR_ESM_KEYS)} in {path}, as fair-esm writes them.")
    layers = content[kind]
    vectors = _to_numpy(layers[max(layers)])
    x = vectors if vectors.ndim == 2 else vectors[None]
    label = str(content.get("label", path.stem))
    provenance = {"format": "fair-esm", "layer": int(max(layers)), "pooling": kind.partition("_")[0]}
    return Embeddings([label] * len(x), x, provenance=provenance)


def _concatenated(parts: list[Embeddings], provenance: dict[str, Any], path: Path) -> Embeddings:
    widths = {part.x.shape[-1] for part in parts}
    if len(widths) > 1:
        raise InputError(f"Expected vectors of one width in {path} but got {sorted(widths)}; separate them.")
    columns: dict[str, list[str]] = {}
    for name in ("sequences", "labels", "clusters"):
        if all(getattr(part, name) is not None for part in parts):
            columns[name] = [value for part in parts for value in getattr(part, name)]
    ids = [name for part in parts for name in part.ids]
    return Embeddings(ids, np.concatenate([part.x for part in parts]), provenance=provenance, **columns)


def _read_fair_esm_folder(path: Path) -> Embeddings:
    files = sorted(path.glob("**/*.pt"))  # fair-esm makes sub-folders of a label with slashes
    parts = [_read_fair_esm_file(file) for file in files]
    kinds = [f"{part.provenance['pooling']} of layer {part.provenance['layer']}" for part in parts]
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(
                f"Expected one layer and pooling in {path} but got {kinds[0]} in {files[0].name} and {kind} in "
                f"{file.name}; separate them."
            )
    return _concatenated(parts, {**parts[0].provenance, "files": len(files)}, path)


def _read_pair(path: Path) -> Embeddings:
    """`embeddings_train.pt` followed by `embeddings_val.pt`; prefixes of the rows' names distinguish them."""
    halves = {part: _read_pt(path / f"embeddings_{part}.pt") for part in ("train", "val")}
    named = [
        Embeddings([f"{part}:{name}" for name in half.ids], half.x, half.sequences, half.labels, half.clusters)
        for part, half in halves.items()
    ]
    counts = {f"rows_{part}": len(half.ids) for part, half in halves.items()}
    return _concatenated(named, {"format": "pt pair", **counts}, path)


def _read_hdf5(path: Path) -> Embeddings:
    """One data set per protein, (d,) pooled or (L, d) per residue, named by its `original_id` attribute or its key."""
    h5py = _h5py()
    ids: list[str] = []
    rows: list[np.ndarray] = []
    with h5py.File(path, "r") as file:

        def collect(name: str, node: Any) -> None:
            if not isinstance(node, h5py.Dataset):
                return
            vectors = np.atleast_2d(node[()])
            label = str(node.attrs.get("original_id", name))
            ids.extend([label] * len(vectors))
            rows.append(vectors)

        file.visititems(collect)
    if not rows:
        raise InputError(f"Expected one data set for each protein in {path} but it holds none.")
    if len({vectors.shape[-1] for vectors in rows}) > 1:
        raise InputError(f"Expected data sets of one width in {path}; separate the models first.")
    return Embeddings(ids, np.concatenate(rows), provenance={"format": "hdf5"})


def _h5py() -> Any:
    try:
        import h5py  # noqa: PLC0415  (optional: for HDF5 only)
    except ImportError as error:
        raise InputError("Expected h5py for HDF5 files but it is missing; pip install h5py.") from error
    return h5py


def _read_store(path: Location) -> Embeddings:
    store = Store.open(path)
    run = embedding_run(store.storage)
    owner = store.protein_of_row()
    ids, sequences = store.ids, store.sequences
    description = {key: value for key, value in store.manifest.items() if key not in ("proteins", "shards")}
    if store.layer is not None:
        description["layer"] = store.layer.entry
    return Embeddings(
        [ids[i] for i in owner],
        store.embeddings(),
        [sequences[i] for i in owner],
        provenance={**description, "format": "store", "digest": store.digest, "embedding_run": run},
    )


def _folder_reader(path: Path) -> Callable[[Path], Embeddings] | None:
    if (path / "manifest.json").exists():
        return _read_store
    if all((path / f"embeddings_{part}.pt").exists() for part in ("train", "val")):
        return _read_pair
    return _read_fair_esm_folder if next(path.glob("**/*.pt"), None) else None


READERS: dict[str, Callable[[Path], Embeddings]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_pt,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}


# ------------------------------------------------------------------------------------------------------------- writing


def save_matrix(embeddings: Embeddings, path: str | Path, val_fraction: float = 0.2) -> None:
    """Writes embeddings in the format of the path's suffix; without one, as the original project's folder.

    `.npz` and `.safetensors` hold ids, sequences, labels and clusters, `.npz` the sequences as one text with the end of
    each; `.npy` holds the matrix only; `.h5` one data set for each protein, (d,) or per residue (L, d). A folder gets
    `embeddings_train.pt` and `embeddings_val.pt`, tensors (N, d), with no sequence in both.

    Args:
        embeddings: What to write.
        path: Destination; overwritten if it exists.
        val_fraction: Share of the proteins in `embeddings_val.pt`.

    Raises:
        InputError: the suffix is unknown, or a name is not unique (`.h5`).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITERS and suffix:
        raise InputError(f"Expected a path that ends in {', '.join(WRITERS)} or a folder but got {path.name}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not suffix:
        _write_pair(embeddings, path, val_fraction)
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        WRITERS[suffix](embeddings, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a failure the old file stays


def _columns(embeddings: Embeddings) -> dict[str, list[str]]:
    return {name: getattr(embeddings, name) for name in COLUMNS if getattr(embeddings, name) is not None}


def _write_npz(embeddings: Embeddings, path: Path) -> None:
    texts = _columns(embeddings)
    sequences = texts.pop("sequences", None)
    columns = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
    if sequences is not None:  # an array of strings would pad each to the longest
        columns["sequences"] = np.frombuffer("".join(sequences).encode(), np.uint8)
        columns["sequence_ends"] = np.cumsum([len(sequence) for sequence in sequences])
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, embeddings=embeddings.x, **columns)


def _write_npy(embeddings: Embeddings, path: Path) -> None:
    np.save(path, embeddings.x, allow_pickle=False)


def _write_safetensors(embeddings: Embeddings, path: Path) -> None:
    metadata = {name: json.dumps(values) for name, values in _columns(embeddings).items()}
    save_file({"embeddings": np.ascontiguousarray(embeddings.x)}, path, metadata=metadata)


def _write_hdf5(embeddings: Embeddings, path: Path) -> None:
    starts = [row for row, name in enumerate(embeddings.ids) if row == 0 or name != embeddings.ids[row - 1]]
    if len(starts) != len(set(embeddings.ids)):
        raise InputError("Expected each protein once, its residues together, for HDF5; rename the repeated ones.")
    per_residue = embeddings.provenance.get("pooling") == "residue" or len(starts) < len(embeddings.ids)
    names = set(embeddings.ids)
    with _h5py().File(path, "w") as file:
        for start, stop in pairwise([*starts, len(embeddings.ids)]):
            name = embeddings.ids[start]
            key = name
            if set(name) & set("/\0") or not name.strip("."):  # HDF5 would interpret it as a path
                key = f"protein_{start}"
                while key in names:
                    key += "_"
            data = file.create_dataset(key, data=embeddings.x[start:stop] if per_residue else embeddings.x[start])
            data.attrs["original_id"] = name


def _write_pair(embeddings: Embeddings, folder: Path, val_fraction: float) -> None:
    keys = embeddings.sequences or embeddings.ids
    share = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64 for key in keys]
    held_out = np.array(share) < val_fraction
    folder.mkdir(exist_ok=True)
    for part, rows in (("train", ~held_out), ("val", held_out)):
        torch.save(torch.from_numpy(embeddings.x[rows]), folder / f"embeddings_{part}.pt")


WRITERS: dict[str, Callable[[Embeddings, Path], None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
}
