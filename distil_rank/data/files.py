"""Embeddings in common file formats: one function to read them all, and which data `auto` is.

Nothing here unpickles: `.pt` files load with `weights_only=True`, NumPy files with `allow_pickle=False`.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from distil_rank.embedding.extraction import STORES
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.sequences import accession, name_in_header
from distil_rank.embedding.storage import Location, is_remote
from distil_rank.embedding.store import Store, embedding_run, open_storage, read_manifest
from distil_rank.errors import DAMAGE, InputError, examples

log = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
CHECKOUT = Path("data")  # the proteins that ship, as seen from the root of a checkout, where make runs
PACKAGED = Path(__file__).parents[1] / "sample_data"  # pyproject.toml has the wheel carry these
EDITABLE = Path(__file__).parents[2] / "data"  # of the checkout that an editable installation runs from
LABELLED = "functions"  # 706 proteins, their vectors, names as labels, and clusters
UNLABELLED = "sample"  # 2,000 unrelated proteins and their vectors; in a checkout only
FINITE_CHECK_ROWS = 65_536  # rows checked at a time, so that a file may be larger than memory
OWN_LABELS = "labels.tsv"  # in the folder of a store
COLUMNS = ("ids", "sequences", "labels", "clusters")
LAYER_GROUP = re.compile(r"\D*(\d+)")  # of an HDF5 file: layer_12, 12
FAIR_ESM_KEYS = ("mean_representations", "bos_representations", "representations")


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
    set per protein, UniProt's convention, or a group of them for each layer), a folder of fair-esm's per-protein `.pt`
    files, a folder with `embeddings_train.pt` and `embeddings_val.pt`, or a store made by `distil-rank embed`
    (`STORE:LAYER` for one of several layers). In `.npz`, `.pt` and `.safetensors` the matrix is `embeddings`, or the
    only 2-d array; `ids`, `sequences`, `labels` and `clusters` are optional. A matrix of several layers is
    (layers, N, d), and `layers` may name them: `FILE:LAYER` is one of them, by default the last. Ids such as
    `sp|P69905|HBA_HUMAN` become `P69905`, as from FASTA.

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
    source, layer = split_source(path)
    file = Path(source)
    if not file.exists():
        raise InputError(f"Expected embeddings at {path} but it does not exist; make them with `distil-rank embed`.")
    reader = _folder_reader(file) if file.is_dir() else READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(
            f"Expected embeddings as {', '.join(READERS)} or a folder of them but got {file.name}; convert it first, "
            "FASTA by embed."
        )
    try:
        embeddings = _read_store(path) if reader is _read_store else _layer_of(reader(file), layer, file)
    except (*DAMAGE, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        # NumPy takes any other file for a pickle, and tells how to load it unsafely; torch tells where it got stuck
        reason = " ".join(str(error).split())[:160]
        reason = "no arrays" if "pickle" in reason or not reason or isinstance(error, LookupError) else reason
        raise InputError(f"Expected embeddings in {path} but it cannot be read ({reason}); make it again.") from error
    return _validated(embeddings, path)


def layer_names(source: Location) -> list[str]:
    """The layers that a store or a file has several of; none where it has one."""
    path, layer = split_source(source)
    if layer is not None:
        return []
    if is_remote(path) or (Path(path) / "manifest.json").is_file():
        return [str(name) for name in (read_manifest(open_storage(path)) or {}).get("layers", [])]
    return list(load_matrix(str(path)).provenance.get("layers", []))


def _layer_of(embeddings: Embeddings, layer: int | None, path: Path) -> Embeddings:
    """One layer of a matrix (layers, N, d), by default the last; a matrix (N, d) as it is."""
    if embeddings.x.ndim != 3:
        if layer is not None:
            raise InputError(f"Expected several layers before :{layer} but {path} has one; name the file alone.")
        return embeddings
    names = embeddings.provenance.get("layers") or [str(number + 1) for number in range(len(embeddings.x))]
    if len(set(names)) != len(embeddings.x) or (layer is not None and str(layer) not in names):
        raise InputError(
            f"Expected one of {len(embeddings.x)} different layers of {path} but got {layer or examples(names)}, of "
            f"{examples(names)}."
        )
    wanted = names[-1] if layer is None else str(layer)
    if layer is None:
        log.info("%s holds the layers %s: taking the last, %s (…:LAYER takes another)", path, examples(names), wanted)
    x = embeddings.x[names.index(wanted)]
    return replace(embeddings, x=x, provenance={**embeddings.provenance, "layers": names, "layer": wanted})


def _validated(embeddings: Embeddings, path: Location) -> Embeddings:
    """Checks shapes, lengths and finite values, and converts the matrix to float32."""
    x = embeddings.x
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind != "f":
        raise InputError(f"Expected a float matrix (N, d) in {path} but got {x.dtype} {x.shape}; convert it first.")
    for name in COLUMNS:
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
    ids = [accession(name) for name in embeddings.ids]
    if long := next((name for name, short in zip(embeddings.ids, ids, strict=True) if name != short), None):
        log.info("Ids in %s are shortened to accessions: %s to %s.", path, long, accession(long))
    x = x if x.dtype == np.float32 else x.astype(np.float32)  # a memory-mapped matrix stays one
    return replace(embeddings, ids=ids, x=x, provenance={"source": str(path), **embeddings.provenance})


def _from_mapping(arrays: dict[str, Any], path: Path, kind: str) -> Embeddings:
    """Selects the matrix and the columns from named arrays."""
    matrices = [name for name, value in arrays.items() if getattr(value, "ndim", 0) in (2, 3)]
    name = "embeddings" if "embeddings" in arrays else matrices[0] if len(matrices) == 1 else None
    if name is None:
        raise InputError(
            f"Expected `embeddings` or one matrix in {path} but got {examples(arrays)}; name one of them `embeddings`."
        )
    x = np.asarray(arrays[name])
    columns = {key: [str(value) for value in arrays[key]] for key in COLUMNS if arrays.get(key) is not None}
    ids = columns.pop("ids", None) or [str(row) for row in range(x.shape[-2] if x.ndim > 1 else 0)]
    named = {"layers": [str(name) for name in arrays["layers"]]} if arrays.get("layers") is not None else {}
    return Embeddings(ids, x, provenance={"format": kind, **named}, **columns)


def _read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as archive:
        return _from_mapping(dict(archive), path, "npz")


def _to_numpy(value: Any) -> Any:
    return value.float().numpy() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, framework="pt") as file:
        arrays: dict[str, Any] = {name: _to_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        arrays |= {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in COLUMNS}
    return _from_mapping(arrays, path, "safetensors")


def _read_pt(path: Path) -> Embeddings:
    """A tensor, a mapping with `embeddings`, or what fair-esm writes: vectors by layer, of which the last is taken."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        content = {"embeddings": content}
    if not isinstance(content, dict):
        raise InputError(f"Expected a tensor or a mapping in {path} but got {type(content).__name__}.")
    kind = next((key for key in FAIR_ESM_KEYS if content.get(key)), None)
    if kind is None:
        return _from_mapping({key: _to_numpy(value) for key, value in content.items()}, path, "pt")
    last = max(content[kind])
    x = np.atleast_2d(_to_numpy(content[kind][last]))
    provenance = {"format": "fair-esm", "layer": int(last), "pooling": kind.partition("_")[0]}
    return Embeddings([name_in_header(str(content.get("label", path.stem)))] * len(x), x, provenance=provenance)


def _concatenated(parts: list[Embeddings], provenance: dict[str, Any], path: Path) -> Embeddings:
    widths = {part.x.shape[-1] for part in parts}
    if len(widths) > 1:
        raise InputError(f"Expected vectors of one width in {path} but got {examples(sorted(widths))}; separate them.")
    columns = {
        name: [value for part in parts for value in getattr(part, name)]
        for name in COLUMNS
        if all(getattr(part, name) is not None for part in parts)
    }
    return Embeddings(x=np.concatenate([part.x for part in parts]), provenance=provenance, **columns)


def _read_fair_esm_folder(path: Path) -> Embeddings:
    files = sorted(path.glob("**/*.pt"))  # fair-esm makes sub-folders of a label with slashes
    parts = [_read_pt(file) for file in files]
    first = parts[0].provenance
    for file, other in zip(files, (part.provenance for part in parts), strict=True):
        if other["format"] != "fair-esm":
            raise InputError(f"Expected {', '.join(FAIR_ESM_KEYS)} in {file}, as fair-esm writes them; separate it.")
        if other != first:
            raise InputError(
                f"Expected one layer and pooling in {path} but got {first['pooling']} of layer {first['layer']} in "
                f"{files[0].name} and {other['pooling']} of layer {other['layer']} in {file.name}; separate them."
            )
    return _concatenated(parts, {**first, "files": len(files)}, path)


def _read_pair(path: Path) -> Embeddings:
    """`embeddings_train.pt` followed by `embeddings_val.pt`; prefixes of the rows' names distinguish them."""
    halves = {half: _read_pt(path / f"embeddings_{half}.pt") for half in ("train", "val")}
    named = [replace(one, ids=[f"{half}:{name}" for name in one.ids]) for half, one in halves.items()]
    counts = {f"rows_{half}": len(one.ids) for half, one in halves.items()}
    return _concatenated(named, {"format": "pt pair", **counts}, path)


def _read_hdf5(path: Path) -> Embeddings:
    """One data set per protein, (d,) pooled or (L, d) per residue, named by its `original_id` attribute or its key.

    Groups that hold the same proteins and whose names end in a number (`layer_12/P69905`) are layers.
    """
    try:
        import h5py  # noqa: PLC0415  (optional: for HDF5 only)
    except ImportError as error:
        raise InputError("Expected h5py for HDF5 files but it is missing; pip install h5py.") from error
    proteins: dict[str, Embeddings] = {}

    def collect(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            vectors = np.atleast_2d(node[()])
            proteins[name] = Embeddings([str(node.attrs.get("original_id", name))] * len(vectors), vectors)

    with h5py.File(path, "r") as file:
        file.visititems(collect)
    if not proteins:
        raise InputError(f"Expected one data set for each protein in {path} but it holds none.")
    layers: dict[int, dict[str, Embeddings]] = {}
    for name, one in proteins.items():
        number, key = LAYER_GROUP.fullmatch(name.rpartition("/")[0]), name.rpartition("/")[2]
        own = [key if full == name else full for full in one.ids]
        layers.setdefault(int(number[1]) if number else -1, {})[key] = replace(one, ids=own)
    if -1 in layers or len({tuple(layer) for layer in layers.values()}) > 1:
        return _concatenated(list(proteins.values()), {"format": "hdf5"}, path)
    parts = [_concatenated(list(layers[number].values()), {}, path) for number in sorted(layers)]
    facts = {"format": "hdf5", "layers": [str(number) for number in sorted(layers)]}
    return Embeddings(parts[0].ids, np.stack([part.x for part in parts]), provenance=facts)


def _read_store(path: Location) -> Embeddings:
    store = Store.open(path)
    run = embedding_run(store.storage)
    owner = store.protein_of_row()
    ids, sequences = store.ids, store.sequences
    description = {key: value for key, value in store.manifest.items() if key not in ("proteins", "shards")}
    if store.layer is not None:
        description["layer"] = store.layer
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
    ".npy": lambda path: _from_mapping({"embeddings": np.load(path, "r", allow_pickle=False)}, path, "npy"),
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_pt,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}


def read_clusters(path: Path, ids: Sequence[str]) -> list[str]:
    """The cluster of each row, read from lines of representative, tab, member.

    Raises:
        InputError: the file has another format, or a protein is missing from it.
    """
    try:
        lines = path.read_text().splitlines()
        pairs = (line.split("\t") for line in lines if line)
        cluster_of = {accession(member): representative for representative, member in pairs}
    except (OSError, ValueError) as error:
        raise InputError(
            f"Expected lines of representative, tab, member in {path} but it cannot be parsed: {error}"
        ) from error
    missing = [name for name in ids if name not in cluster_of]
    if missing:
        raise InputError(
            f"Expected a cluster for every protein in {path} but {missing[0]} has none; cluster all of them."
        )
    return [cluster_of[name] for name in ids]


def sample(*names: str) -> str:
    """Where the first of these samples is that can be found, as a path to show and to open.

    In a checkout that is `data/NAME`; elsewhere the package's own copy, which has `LABELLED` and its FASTA file, or
    what lies beside an editable installation.
    """
    places = [folder / name for name in names for folder in (CHECKOUT, PACKAGED, EDITABLE)]
    return str(next((place for place in places if place.exists()), places[0]))


def find_source(source: str, *shipped: str, labelled: bool = False) -> str:
    """What `auto` means; another source is unchanged.

    That is the user's own embeddings under `embeddings/` or here, where there is one finished set of them and no more.
    Otherwise it is what ships, or synthetic data with a loud warning where nothing is found.

    Args:
        source: A path, or `auto`.
        shipped: Names of the samples to take, the first that is there.
        labelled: Whether the user's embeddings count only where they bring labels.
    """
    if source != "auto":
        return source
    stores = [folder for folder in (Path(), STORES, *sorted(STORES.glob("*"))) if _is_own(folder)]
    own = [*stores, *(folder for folder in (STORES, Path()) if (folder / "embeddings_train.pt").exists())]
    own = [folder for folder in own if not labelled or (folder / OWN_LABELS).is_file()]
    ours = Path(sample(*(shipped or (UNLABELLED, LABELLED))))
    other = f"{'--data' if shipped else '--data.source'}, with make DATA=, names another"
    if len(own) == 1:
        log.info("Taking the embeddings in %s, the only finished ones of yours (%s).", own[0], other)
        return str(own[0])
    if ours.exists():
        several = f", as there are several of yours ({examples(own)})" if own else ""
        log.info("Taking the proteins that ship, %s%s (%s).", ours, several, other)
        return str(ours)
    log.warning("NO EMBEDDINGS FOUND: USING SYNTHETIC DATA. Its numbers say nothing about proteins.")
    return SYNTHETIC


def _is_own(folder: Path) -> bool:
    """Whether a store is finished and of other proteins than those that ship."""
    places = [str(folder), *(sample(name) for name in (UNLABELLED, LABELLED))]
    try:
        manifests = [read_manifest(open_storage(place)) or {"proteins": [], "shards": [{}]} for place in places]
    except InputError:
        return False
    own, *shipped = ({file["sha256"] for file in manifest["proteins"]} for manifest in manifests)
    return own not in shipped and all("sha256" in shard for shard in manifests[0]["shards"])
