"""Codes in files that other tools read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distil_rank.codes.index import CodeIndex
from distil_rank.codes.quantisers import import_faiss
from distil_rank.codes.store import CodeStore
from distil_rank.data.files import Embeddings, save_matrix
from distil_rank.embedding.storage import atomic_file
from distil_rank.errors import InputError

FORMATS = (".faiss", ".npy", ".npz", ".h5", ".hdf5")


def export_codes(store: CodeStore, path: str | Path) -> Path:
    """Write the codes of a store, one for each protein in its order.

    `.npy` is the matrix of codes; `.npz` has the ids too; `.h5` has one data set for each protein; `.faiss` is an index
    that looks at every code, for `faiss.read_index`: its queries are what the code map gives, for bits with zeros
    up to a multiple of eight.

    Raises:
        InputError: another ending, or repeated ids in HDF5.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"Expected a file that ends in {', '.join(FORMATS)} to export to but got {path.name}.")
    codes = np.array(store.embeddings())
    if path.suffix != ".faiss":
        save_matrix(Embeddings(store.ids, codes), path)
        return path
    faiss = import_faiss()
    index = CodeIndex.build(codes, store.encoder, exact=True)
    with atomic_file(path) as file:
        file.write(faiss.serialize_index(index.index).tobytes())
    return path
