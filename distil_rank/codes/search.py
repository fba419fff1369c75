"""Queries against a store of codes: hits with their scores, ranks and E-values."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.codes.evalues import Tail, reversed_decoy
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.store import CodeStore, manifest_of
from distil_rank.embedding.run import OPTIONS, embed, options_like
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError

log = logging.getLogger(__name__)

COLUMNS = ("query", "target", "score", "rank", "evalue")
SAMPLED_TARGETS = 20_000  # that decoys are compared with
BLOCK = 4096  # of queries that are searched and written at once


@dataclass(frozen=True)
class Queries:
    """What is searched with.

    Attributes:
        ids: names, `(Q,)`.
        rows: float queries of unit length, `(Q, r)`.
        skip: the target that is the query itself, `(Q,)`; −1 where there is none.
    """

    ids: list[str]
    rows: Tensor
    skip: np.ndarray


def embedded_queries(fasta: str | Path, store: CodeStore) -> Queries:
    """Proteins of a file, through the backbone, layer, pooling and code map of a store of codes.

    Raises:
        InputError: the file cannot be read, a query has no residues, or the backbone cannot be had.
    """
    proteins, report = read_proteins(fasta)
    if report.counts["empty"]:
        raise InputError(
            f"Expected residues in every query of {fasta} but {report.counts['empty']:,} of "
            f"{report.counts['records']:,} have none; remove them."
        )
    with TemporaryDirectory(prefix="distil-rank-") as folder:
        vectors = embed_like([protein.sequence for protein in proteins], store, Path(folder))
    return Queries([protein.id for protein in proteins], store.encoder(vectors), np.full(len(proteins), -1))


def stored_queries(path: str | Path, store: CodeStore) -> Queries:
    """Proteins of a store of embeddings of the same backbone, layer and pooling.

    Raises:
        InputError: map and store do not belong together.
    """
    source = Store.open(path)
    store.encoder.check_origin(manifest_of(source), str(path))
    rows = store.encoder(torch.from_numpy(np.array(source.embeddings())))
    return Queries(source.ids, rows, np.full(len(source), -1))


def own_queries(store: CodeStore) -> Queries:
    """The codes themselves, each against all others."""
    decoded = store.encoder.decode(torch.from_numpy(np.array(store.embeddings())))
    return Queries(store.ids, F.normalize(decoded, dim=1), np.arange(len(store)))


def embed_like(sequences: Sequence[str], store: CodeStore, folder: Path) -> Tensor:
    """Vectors of sequences, `(N, n)`, made as those behind the codes; kept in `folder`.

    Args:
        sequences: cleaned.
        store: of codes.
        folder: for a store of them.

    Raises:
        InputError: the backbone cannot be had or has other weights, or a sequence does not fit into memory.
    """
    fasta, path = folder / "sequences.fasta", folder / "store"
    folder.mkdir(parents=True, exist_ok=True)
    # numbers for names: what came in was made unique already, and may hold what a header cannot
    fasta.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    manifest = store.manifest
    embed(fasta, path, manifest["backbone"], **options_like(manifest, store.path))
    made = Store.open(path)
    if made.manifest["weights_sha256"] != manifest["weights_sha256"]:
        raise InputError(
            f"Expected the weights {manifest['weights_sha256'][:12]}… that the codes were made with but "
            f"{manifest['backbone']} now has {made.manifest['weights_sha256'][:12]}…; restore them, or make the codes "
            "again."
        )
    if made.skipped:
        raise InputError(
            f"Expected every sequence to fit into memory but that of {len(sequences[int(made.skipped[0])]):,} residues "
            "did not; cut it, or use a machine with more."
        )
    return torch.from_numpy(np.array(made.embeddings()))


def decoy_tail(store: CodeStore, decoys: int, folder: str | Path, seed: int = 0) -> Tail:
    """The tail of the scores that reversed proteins of the store reach among its codes, their own originals left out.

    Args:
        store: of codes.
        decoys: how many proteins are reversed.
        folder: where stores of embedded decoys are kept.
        seed: of their choice.
    """
    dice = np.random.default_rng(seed)
    chosen = np.sort(dice.permutation(len(store))[:decoys])
    proteins = store.proteins.take(chosen)
    sequences = [reversed_decoy(text) for text in proteins["sequence"].to_pylist()]
    keys = ("weights_sha256", *OPTIONS, *(["calibration_sha256"] if "calibration_sha256" in store.manifest else []))
    settings = {key: store.manifest[key] for key in keys}
    name = hashlib.sha256(json.dumps([settings, sequences]).encode()).hexdigest()[:16]
    vectors = embed_like(sequences, store, Path(folder) / f"decoys-{name}")
    sampled = np.sort(dice.permutation(len(store))[:SAMPLED_TARGETS])
    codes = torch.from_numpy(store.embeddings()[sampled])
    targets = F.normalize(store.encoder.decode(codes), dim=1)
    return Tail.of(decoy_scores(store.encoder(vectors), targets, chosen[:, None] == sampled))


def decoy_scores(decoys: Tensor, targets: Tensor, own: np.ndarray) -> np.ndarray:
    """Scores of decoys among targets but for each one's own original, which has the very same composition.

    Args:
        decoys: queries, `(D, r)`.
        targets: decoded codes of unit length, `(T, r)`.
        own: which target each decoy is made of, `(D, T)` bool.

    Returns:
        `(D T - own.sum(),)`.

    >>> decoy_scores(torch.eye(2), torch.eye(2), np.eye(2, dtype=bool)).tolist()
    [0.0, 0.0]
    """
    return (decoys @ targets.T).numpy()[~own]


def search(
    queries: Queries, index: CodeIndex, ids: list[str], tail: Tail | None, k: int, max_evalue: float | None = None
) -> Iterator[list[tuple[str, str, float, int, float]]]:
    """Hits of all queries, a block of queries at a time: query, target, score, rank and E-value (NaN without decoys).

    Args:
        queries: what to search with.
        index: over the targets.
        ids: of the targets.
        tail: of the decoys' scores; None for no E-values.
        k: hits of each query at most.
        max_evalue: hits of a greater E-value are left out.
    """
    own = int((queries.skip >= 0).any())
    for start in range(0, len(queries.ids), BLOCK):
        block = slice(start, start + BLOCK)
        found = index.search(queries.rows[block], k + own)
        evalues = np.full(found.scores.shape, np.nan)
        if tail is not None:
            evalues = tail.evalues(found.scores.astype(np.float64), len(ids))
        lines = []
        columns = zip(queries.ids[block], queries.skip[block], found.rows, found.scores, evalues, strict=True)
        for query, skip, rows, scores, expected in columns:
            retained = (rows >= 0) & (rows != skip)
            if max_evalue is not None:
                retained &= expected <= max_evalue
            for rank, place in enumerate(np.flatnonzero(retained)[:k], 1):
                lines.append((query, ids[rows[place]], float(scores[place]), rank, float(expected[place])))
        yield lines


def as_tsv(lines: list[tuple[str, str, float, int, float]]) -> str:
    """Lines of the table of hits, tab separated."""
    return "".join(f"{q}\t{t}\t{score:.4f}\t{rank}\t{expected:.2e}\n" for q, t, score, rank, expected in lines)
