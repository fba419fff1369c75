"""Codes on disk: a store like that of the embeddings, with the encoder beside the shards.

codes/
  manifest.json, proteins-00000.arrow, vectors-00000.arrow   as in a store of embeddings; `code` names the encoder
  encoder/                                                  the artefact that made the codes
"""

import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from distil_rank.artefact import MANIFEST
from distil_rank.compression.saved import load, save
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.precision import CALIBRATION, NOTES, read_calibration
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.storage import Location
from distil_rank.embedding.store import CODES, SETTINGS, Store, open_storage
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder

ENCODER = "encoder"  # its folder in that of the codes
ROWS_AT_ONCE = 16_384  # of encoding


class CodeStore(Store):
    """A finished store of codes, opened for reading; `embeddings` and `shards` give codes."""

    content: ClassVar[str] = CODES

    @cached_property
    def encoder(self) -> CodeEncoder:
        """What made the codes; `InputError` where it is missing, damaged or another one."""
        encoder = own_encoder(self.path)
        if encoder is None or encoder.digest != self.manifest["code"]["sha256"]:
            raise InputError(
                f"Expected in {self.storage.where(ENCODER)} the encoder that made the codes beside it but it is "
                "missing or another; restore it, or make the codes again."
            )
        return encoder


def load_encoder(path: str | Path) -> CodeEncoder:
    """An encoder from its folder; `InputError` where that holds none."""
    encoder = load(path)
    if not isinstance(encoder, CodeEncoder):
        raise InputError(f"Expected an encoder in {path} but it holds a student layer; make one with `code`.")
    return encoder


def own_encoder(store: Location) -> CodeEncoder | None:
    """The encoder in a store of codes, finished or not; None where there is none."""
    with open_storage(store).local_copy(ENCODER) as folder:
        return load_encoder(folder) if (folder / MANIFEST).exists() else None


def write_encoder(encoder: CodeEncoder, store: Location, **about: Any) -> None:
    """Puts an encoder into a store of codes, if it has none; `about` is what `save` takes of its data and its metrics.

    Raises:
        InputError: the store has another one.
    """
    if (present := own_encoder(store)) is not None:
        if present.digest != encoder.digest:
            raise InputError(f"Expected codes of this encoder in {store} but they are of another; name another folder.")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(save(encoder, folder, **about).iterdir(), key=lambda file: file.name == MANIFEST)
        for file in files:  # the manifest last
            open_storage(store).write(f"{ENCODER}/{file.name}", file.read_bytes())


def manifest_of(source: Store) -> dict[str, Any]:
    """The manifest of a store of embeddings, with the one layer that is read of several."""
    manifest = {key: value for key, value in source.manifest.items() if key != "layers"}
    return manifest if source.layer is None else {**manifest, "layer": source.layer}


def write_codes(source: Store, path: Location, encoder: CodeEncoder) -> CodeStore:
    """Encode a store of embeddings, shard after shard; what is there already stays.

    Args:
        source: pooled embeddings.
        path: folder or address of the codes, which holds the encoder.
        encoder: fitted to vectors of the same backbone, layer and pooling.

    Raises:
        InputError: encoder and store do not belong together, or the folder holds other codes.
    """
    manifest = manifest_of(source)
    encoder.check_origin(manifest, str(source.path))
    if manifest["pooling"] == "residue":
        raise InputError(f"Expected one vector for each protein in {source.path} but it has one for each residue.")
    writer = StoreWriter(path, CODES)
    settings = {key: manifest[key] for key in SETTINGS}
    settings |= {"dim": encoder.code_width, "code": encoder.entry}
    description = {key: manifest[key] for key in ("backbone", "fallback", *NOTES) if key in manifest}
    calibration = None
    if "calibration_sha256" in manifest:  # queries are to be computed with it too
        settings["calibration_sha256"], calibration = manifest["calibration_sha256"], read_calibration(source.path)
    with writer.storage.lock():
        if calibration is not None and not writer.manifest:
            writer.storage.write(CALIBRATION, calibration.content())
        writer.plan(_proteins(source), settings, description, CleaningReport(str(source.path)))
        for shard in tqdm(writer.pending(), desc="encode", unit="shard", disable=None):
            _encode_shard(writer, shard, source, encoder)
        writer.finish()
        return CodeStore.open(path)


def _proteins(source: Store) -> Iterator[Protein]:
    """Every protein of a store, those without a vector included: rows then have the same numbers in both stores."""
    for file in source.manifest["proteins"]:
        for batch in source.storage.batches(file["file"], ["id", "sequence"]):
            for name, sequence in zip(batch["id"].to_pylist(), batch["sequence"].to_pylist(), strict=True):
                yield Protein(name, sequence)


def _encode_shard(writer: StoreWriter, shard: Shard, source: Store, encoder: CodeEncoder) -> None:
    if writer.is_sealed(shard):
        return
    low, high = shard.rows
    counts = np.zeros(high - low, int)
    parts = [np.empty((0, encoder.code_width), torch.empty(0, dtype=encoder.code_dtype).numpy().dtype)]
    for entry in source.manifest["shards"]:
        if entry["rows"][0] >= high or low >= entry["rows"][1]:
            continue
        rows, vectors = source.vectors(entry)
        first, last = np.searchsorted(rows, [low, high])
        rows, vectors = rows[first:last], vectors[first:last]
        counts[rows - low] += 1
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            block = torch.from_numpy(vectors[start : start + ROWS_AT_ONCE].copy())
            parts.append(encoder.encode(block).numpy())
    writer.write_part(shard, list(range(low, high)), counts.tolist(), np.concatenate(parts))
    writer.seal(shard)
