"""Which embeddings `auto` means, and clusters out of a file; without Lightning, which takes seconds to import."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distil_rank.embedding.run import STORES
from distil_rank.embedding.store import stores_in
from distil_rank.errors import InputError
from distil_rank.samples import LABELLED, UNLABELLED, sample

log = logging.getLogger(__name__)

SYNTHETIC = "synthetic"


def read_clusters(path: Path, ids: Sequence[str]) -> list[str]:
    """The cluster of each row, read from lines of representative, tab, member.

    Raises:
        InputError: the file has another format, or a protein is missing from it.
    """
    try:
        lines = path.read_text().splitlines()
        cluster_of = {member: representative for representative, member in (line.split("\t") for line in lines if line)}
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


def find_source(source: str) -> str:
    """Resolves `source: auto`; any other source is returned unchanged.

    Where there are no embeddings it is synthetic data, with a warning in capitals.
    """
    if source != "auto":
        return source
    stores = stores_in(STORES)
    if len(stores) > 1:
        others = ", ".join(map(str, stores[1:]))
        log.warning("Several stores in %s: using %s, which changed last, not %s.", STORES, stores[0], others)
    candidates = [*stores[:1], *filter(_has_embeddings, (STORES, Path(), Path(sample(UNLABELLED, LABELLED))))]
    if candidates:
        log.info("Using the embeddings in %s.", candidates[0].resolve())
        return str(candidates[0])
    log.warning("NO EMBEDDINGS FOUND: USING SYNTHETIC DATA. Its numbers say nothing about proteins.")
    return SYNTHETIC


def _has_embeddings(folder: Path) -> bool:
    """Whether a folder is a store or holds the original project's pair of files."""
    return any((folder / name).exists() for name in ("manifest.json", "embeddings_train.pt"))
