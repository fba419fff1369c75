"""Codebooks by faiss: trained here, kept as tensors, so that encoding and decoding need torch alone."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CENTROIDS

BITS = 8  # a byte for each book
OPQ_ROUNDS = 25
MAX_ROWS = 65_536  # to train on; 256 for each centroid, which is what faiss takes itself


class Codebooks(NamedTuple):
    """Centroids and the basis that they are written in.

    Attributes:
        rotation: `(r', r)`, orthonormal rows; the rotated vector is `y @ rotation.T`. r' is the multiple of M next
            below r.
        centroids: `(M, 256, r' / M)`, of blocks of rotated vectors.
    """

    rotation: Tensor
    centroids: Tensor


def has_faiss() -> bool:
    """Whether faiss, an extra, is installed."""
    return importlib.util.find_spec("faiss") is not None


def import_faiss() -> ModuleType:
    """faiss, an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Expected faiss for search and pq codes but it is missing; pip install faiss-cpu.") from error
    return faiss


def train_product_quantiser(y: Tensor, books: int, seed: int = 0) -> Codebooks:
    """Optimised product quantisation (Ge, He, Ke and Sun, TPAMI 2014): a rotation, and centroids in blocks of it.

    Args:
        y: rows to train on, `(N, r)`, N ≥ 256.
        books: M, bytes of a code, at most r. Where r is no multiple of M the last few of the r numbers are left out.
        seed: of the centroids' start.

    Raises:
        InputError: fewer rows than centroids, more bytes than dimensions, or no faiss.
    """
    faiss = import_faiss()
    rank = y.shape[1]
    if not 1 <= books <= rank:
        raise InputError(f"Expected bytes in [1, {rank}], the rank of the code, but got {books}.")
    if len(y) < CENTROIDS:
        raise InputError(
            f"Expected at least {CENTROIDS} proteins to train {CENTROIDS} centroids on but got {len(y)}; give more, or "
            "another dtype."
        )
    used = rank - rank % books
    order = np.random.default_rng(seed).permutation(len(y))[:MAX_ROWS]
    rows = np.ascontiguousarray(y[torch.from_numpy(order), :used].numpy())
    inner, quantiser = (faiss.ProductQuantizer(used, books, BITS) for _ in range(2))
    for one in (inner, quantiser):
        one.cp.seed = seed + 1
        one.cp.min_points_per_centroid = 1  # or faiss warns, once for each book and round, past our own output
    opq = faiss.OPQMatrix(used, books)
    opq.niter, opq.pq = OPQ_ROUNDS, inner
    opq.train(rows)
    rotation = faiss.vector_to_array(opq.A).reshape(used, used)
    quantiser.train(np.ascontiguousarray(rows @ rotation.T))
    centroids = faiss.vector_to_array(quantiser.centroids).reshape(books, CENTROIDS, used // books)
    full = np.zeros((used, rank), np.float32)
    full[:, :used] = rotation
    return Codebooks(torch.from_numpy(full), torch.from_numpy(centroids.copy()))
