"""Search among codes, as one MLflow run."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from distil_rank.artefact import check_writable
from distil_rank.codes.exports import export_codes
from distil_rank.codes.index import CodeIndex
from distil_rank.codes.quantisers import import_faiss
from distil_rank.codes.search import (
    COLUMNS,
    Queries,
    as_tsv,
    decoy_tail,
    embedded_queries,
    own_queries,
    search,
    stored_queries,
)
from distil_rank.codes.store import CodeStore
from distil_rank.embedding.storage import atomic_file
from distil_rank.errors import InputError
from distil_rank.tracking.run import start_run

log = logging.getLogger(__name__)

SHOWN = 20  # hits that are printed
MAX_ARTEFACT = 64 * 2**20  # bytes of a table of hits that is kept with the run


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        table: the file of hits.
        exported: the file of an export.
        queries: how many.
        hits: how many.
        seconds: of the search itself, without embedding.
        first: the first hits, in the order of the table's columns.
    """

    table: Path | None = None
    exported: Path | None = None
    queries: int = 0
    hits: int = 0
    seconds: float = 0.0
    first: tuple[tuple[str, str, float, int, float], ...] = ()


def search_codes(
    codes: str = "codes",
    fasta: str | None = None,
    queries: str | None = None,
    all_against_all: bool = False,
    hits: int = 10,
    evalue: float | None = None,
    decoys: int = 200,
    exact: bool | None = None,
    out: str = "results/search/hits.tsv",
    export: str | None = None,
    seed: int = 0,
    output: str = "results",
) -> SearchResult:
    """Search a store of codes with proteins, and write a table of hits.

    Args:
        codes: Folder of the store of codes.
        fasta: Queries; embedded as the proteins behind the codes were.
        queries: Queries that are embedded already, a store of the same backbone, layer and pooling.
        all_against_all: Search with the codes themselves, each against all others.
        hits: Of each query at most.
        evalue: Hits of a greater E-value are left out.
        decoys: Reversed proteins that E-values are estimated with; 0 for none.
        exact: Whether every query looks at every code; by default where there are not too many.
        out: The table, tab separated: query, target, score, rank, E-value.
        export: Also, or only, write the codes to a .faiss, .npy, .npz or .h5 file.
        seed: Of the choice of decoys and of the index.
        output: Folder for results.
    """
    given = [name for name, value in (("--fasta", fasta), ("--queries", queries), ("--self", all_against_all)) if value]
    if len(given) > 1 or not (given or export):
        raise InputError(
            f"Expected one of --fasta, --queries and --self to search with, or --export, but got "
            f"{' and '.join(given) or 'none'}."
        )
    if hits < 1 or decoys < 0:
        raise InputError(f"Expected hits of at least 1 and decoys of at least 0 but got {hits} and {decoys}.")
    if evalue is not None and not (evalue > 0 and decoys):
        raise InputError(
            f"Expected an E-value above 0, and decoys to estimate it with, but got {evalue} and {decoys} decoys."
        )
    check_writable(Path(output))
    import_faiss()
    store = CodeStore.open(codes)
    exported = None if export is None else export_codes(store, export)
    if not given:
        return SearchResult(exported=exported)
    params = {"codes": codes, "queries": fasta or queries or "self", "hits": hits, "evalue": evalue, "decoys": decoys}
    params |= {"dtype": store.encoder.dtype, "bytes": store.encoder.bytes_per_protein, "targets": len(store)}
    tags = {"digest": store.digest, "encoder": store.manifest["code"]["sha256"]}
    with start_run("search", f"{Path(codes).name} {given[0].removeprefix('--')}", params=params, tags=tags) as run:
        made = _queries(store, fasta, queries)
        head = decoy_tail(store, decoys, Path(output) / "decoys", seed) if decoys else None
        index = CodeIndex.build(store.embeddings(), store.encoder, exact, seed)
        started = time.perf_counter()
        first: list[tuple[str, str, float, int, float]] = []
        found = 0
        with atomic_file(Path(out)) as file:
            file.write(("#" + "\t".join(COLUMNS) + "\n").encode())
            for lines in search(made, index, store.ids, head, hits, evalue):
                file.write(as_tsv(lines).encode())
                found += len(lines)
                first += lines[: SHOWN - len(first)]
        seconds = time.perf_counter() - started
        run.log_metrics({"queries": len(made.ids), "hits": found, "seconds": seconds, "recall": index.recall})
        if Path(out).stat().st_size <= MAX_ARTEFACT:
            run.log_artifact(Path(out))
    log.info("Hits: %s (%s of %s queries, %.2f s)", out, f"{found:,}", f"{len(made.ids):,}", seconds)
    return SearchResult(Path(out), exported, len(made.ids), found, seconds, tuple(first))


def _queries(store: CodeStore, fasta: str | None, queries: str | None) -> Queries:
    if fasta is not None:
        return embedded_queries(fasta, store)
    return own_queries(store) if queries is None else stored_queries(queries, store)
