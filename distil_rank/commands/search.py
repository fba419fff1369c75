"""Search among codes, as one MLflow run."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.artefact import check_writable
from distil_rank.codes.index import CodeIndex, import_faiss
from distil_rank.codes.search import Hit, decoy_scores, search_blocks, vectors_like
from distil_rank.codes.store import CodeStore, manifest_of
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.storage import atomic_file
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.options.codes import SearchOptions
from distil_rank.report.writer import Table
from distil_rank.tracking.run import start_run

log = logging.getLogger(__name__)

EVALUE = 10.0  # above which hits are listed only on request
SHOWN = 20  # hits that are printed
MAX_ARTEFACT = 64 * 2**20  # bytes of a table of hits that is kept with the run


def search(options: SearchOptions) -> tuple[int, int]:
    """Write a table of the hits of proteins in a store of codes; numbers of queries and hits."""
    output, table = Path(options.output), Path(options.out)
    check_writable(output)
    import_faiss()
    store = CodeStore.open(options.codes)
    encoder = store.encoder
    facts = {"dtype": encoder.dtype, "bytes": encoder.bytes_per_protein, "targets": len(store)}
    tags = {"digest": store.digest, "encoder": store.manifest["code"]["sha256"]}
    name = f"{Path(options.codes).name} {options.fasta or options.queries or 'self'}"
    with start_run("search", name, params={**asdict(options), **facts}, tags=tags) as run:
        names, queries = _queries(options, store)
        decoys = decoy_scores(store, options.decoys, output / "decoys", options.seed) if options.decoys else None
        least, most = decoys.least(len(store)) if decoys else 0.0, options.evalue or EVALUE
        if most < least:
            raise InputError(
                f"Expected --evalue of at least {least:.2g}, all that {options.decoys:,} decoys can tell of "
                f"{len(store):,} targets, but got {most:g}; raise --decoys."
            )
        index = CodeIndex(store.embeddings(), encoder, options.exact, options.seed)

        first: list[Hit] = []
        started, hits = time.perf_counter(), 0
        with atomic_file(table) as file:
            file.write(("#" + "\t".join(Hit._fields) + "\n").encode())
            for block in search_blocks(names, queries, index, store.ids, decoys, options.hits, options.self):
                lines = [hit for hit in block if not hit.evalue > most]  # without decoys it is NaN
                text = "".join(f"{q}\t{t}\t{score:.4f}\t{rank}\t{evalue:.2e}\n" for q, t, score, rank, evalue in lines)
                file.write(text.encode())
                hits += len(lines)
                first += lines[: SHOWN - len(first)]
        seconds = time.perf_counter() - started
        run.log_metrics({"queries": len(names), "hits": hits, "seconds": seconds, "recall": index.recall})
        if table.stat().st_size <= MAX_ARTEFACT:
            run.log_artifact(table)
    log.info("Hits: %s (%s of %s queries, %.2f s)", table, f"{hits:,}", f"{len(names):,}", seconds)
    rows = []
    for hit in first:
        evalue = f"< {least:.2g}" if hit.evalue <= least else f"{hit.evalue:.2g}"
        rows.append([hit.query, hit.target, f"{hit.score:.3f}", str(hit.rank), evalue])
    limit = f" with E-values up to {most:g}" if decoys else ""  # a hit is then no more than that
    shown = f", the first {len(rows)} here" if hits > len(rows) else ""
    title = f"{hits:,} targets for {len(names):,} queries{limit}{shown}; all: {table}"
    Table(title, Hit._fields, rows).show()
    return len(names), hits


def _queries(options: SearchOptions, store: CodeStore) -> tuple[list[str], Tensor]:
    """Names of the queries, and what is searched with, `(Q, r)` of unit length."""
    if options.fasta is not None:
        proteins, cleaning = read_proteins(options.fasta)
        if empty := cleaning.counts["empty"]:
            raise InputError(
                f"Expected residues in every query of {options.fasta} but {empty:,} of "
                f"{cleaning.counts['records']:,} have none; remove them."
            )
        with TemporaryDirectory(prefix="distil-rank-") as folder:
            vectors = vectors_like([protein.sequence for protein in proteins], store, Path(folder), "queries")
        return [protein.id for protein in proteins], store.encoder(vectors)
    if options.queries is not None:
        source = Store.open(options.queries)
        store.encoder.check_origin(manifest_of(source), options.queries)
        return source.ids, store.encoder(torch.from_numpy(np.array(source.embeddings())))
    decoded = store.encoder.decode(torch.from_numpy(np.array(store.embeddings())))
    return store.ids, F.normalize(decoded, dim=1)
