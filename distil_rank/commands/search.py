"""Search among codes and their proteins, as one MLflow run."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from distil_rank.artefact import atomic_file, check_writable, write_atomically
from distil_rank.codes.index import CodeIndex, import_faiss
from distil_rank.codes.search import Engines, Hits, decoys_of, vectors_like, with_relatives
from distil_rank.codes.store import CodeStore, manifest_of
from distil_rank.codes.votes import VoteAccuracy, members, set_cover, vote, vote_accuracy
from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.data.mmseqs import COLUMNS, MMSEQS_INSTALLATION, mmseqs_binary, mmseqs_clusters, mmseqs_search
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.evaluation.labelled import MOST_CLUSTERED
from distil_rank.evaluation.task import SEVERAL, make_target
from distil_rank.options.codes import SearchOptions
from distil_rank.report.writer import Table, number, show_notes
from distil_rank.tracking.run import start_run

log = logging.getLogger(__name__)

EVALUE = 10.0  # above which hits are listed only on request
SHOWN = 20  # hits that are printed
MAX_ARTEFACT = 64 * 2**20  # bytes of a table of hits that is kept with the run
HEAD = ("query", "target", *COLUMNS, "cosine", "score", "rank", "search_evalue")
SHOWN_HEAD = ("query", "target", "identity", "cosine", "score", "rank", "E-value")
WORDS = {"codes": "codes alone", "alignment": "alignment alone (MMseqs2)", "both": "codes and alignment (MMseqs2)"}
DATABASES = "alignments"  # folder of MMseqs2's databases in that of results
TRIED = 1000  # labelled proteins, at most, that votes are tried on


def search(options: SearchOptions) -> tuple[int, int]:
    """Write a table of the hits of proteins in a store of codes; numbers of queries and hits."""
    table = Path(options.out)
    check_writable(options.output)
    table_of_labels = read_labels(options.labels) if options.labels.source else None
    if options.engine != "alignment":
        import_faiss()
    store = CodeStore.open(options.codes)
    labels = None if table_of_labels is None else _members(table_of_labels, options, store)
    encoder, (engine, notes) = store.encoder, _engine(options, store)
    facts = {"dtype": encoder.dtype, "bytes": encoder.bytes_per_protein, "targets": len(store), "engine": engine}
    tags = {"digest": store.digest, "encoder": store.manifest["code"]["sha256"]}
    name = f"{Path(options.codes).name} {options.fasta or options.queries or 'self'}"
    with start_run("search", name, params={**asdict(options), **facts}, tags=tags) as run:
        names, queries, engines = _prepared(options, store, engine)
        least, most = engines.least, options.evalue or EVALUE
        if (lowest := min(most, options.cluster or most)) < least:
            raise InputError(
                f"Expected E-values of at least {least:.2g}, all that {options.decoys:,} decoys can tell of "
                f"{len(store):,} targets, but got {lowest:g}; raise --decoys."
            )
        first, collected = list[list[str]](), [np.empty((4, 0))]
        started, count = time.perf_counter(), 0
        with atomic_file(table) as file:
            file.write(("#" + "\t".join(HEAD) + "\n").encode())
            for block in engines.search(queries, len(names), options.hits):
                hits = block.where(~(block.evalue > most))  # without decoys it is NaN
                file.write("".join(_lines(hits, names, store.ids)).encode())
                first += _rows(hits, names, store.ids, least, SHOWN - len(first))
                count += len(hits.query)
                if labels is not None or options.cluster is not None:
                    collected.append(np.stack([hits.query, hits.target, hits.score, hits.evalue]))
        seconds, files = time.perf_counter() - started, [table]
        metrics = {
            "queries": len(names),
            "hits": count,
            "seconds": seconds,
            "recall": engines.index.recall if engines.index else 1.0,
        }
        pairs = np.concatenate(collected, axis=1)
        if options.cluster is not None:
            files.append(table.with_name("clusters.tsv"))
            metrics["clusters"] = _write_clusters(files[-1], pairs, store, options.cluster)
            notes.append(f"{metrics['clusters']:,} clusters at an E-value of {options.cluster:g}: {files[-1]}.")
        if labels is not None:
            files.append(table.with_name("votes.tsv"))
            member, classes = labels
            metrics["votes"] = _write_votes(files[-1], pairs, member, names, classes)
            accuracy = _vote_accuracy(engines, member, store, options, most)
            metrics |= {"vote_right": accuracy.right.value, "vote_majority": accuracy.majority}
            notes.append(f"{metrics['votes']:,} of {len(names):,} queries have a vote: {files[-1]}. {accuracy}")
        run.log_metrics(metrics)
        run.keep(options, [path for path in files if path.stat().st_size <= MAX_ARTEFACT], "\n".join(notes))
    log.info("Hits: %s (%s of %s queries, %.2f s)", table, f"{count:,}", f"{len(names):,}", seconds)
    limit = f" with E-values up to {most:g}" if least or engines.index is None else ""  # a hit is then no more
    shown = f", the first {len(first)} here" if count > len(first) else ""
    title = f"{count:,} targets for {len(names):,} queries by {WORDS[engine]}{limit}{shown}; all: {table}"
    Table(title, SHOWN_HEAD, first, SHOWN_HEAD[2:4]).show()
    show_notes(notes)
    return len(names), count


def _engine(options: SearchOptions, store: CodeStore) -> tuple[str, list[str]]:
    """What is searched with, and why it is less than both where nobody asked for less."""
    if options.engine == "codes":
        return "codes", []
    missing = None
    if mmseqs_binary() is None:
        missing = f"MMseqs2 is not installed: {MMSEQS_INSTALLATION}"
    elif not _has_sequences(store):
        missing = f"{store.path} has no sequences, which also means no decoys: embed the proteins again"
    if missing is None:
        return ("both" if options.engine == "auto" else options.engine), []
    if options.engine != "auto":
        raise InputError(f"Expected to align with --engine {options.engine} but {missing}, or take --engine codes.")
    return "codes", [f"NOTE: SEARCHED BY CODES ALONE: {missing}."]


def _prepared(options: SearchOptions, store: CodeStore, engine: str) -> tuple[list[str], Tensor | None, Engines]:
    """Names of the queries, what codes are searched with, and what is searched."""
    names, sequences, queries = _queries(options, store, engine != "alignment")
    index, alignments, databases = None, None, None
    if queries is not None:
        index = CodeIndex(store.embeddings(), store.encoder, options.exact, options.seed)
    if engine != "codes":
        databases = Path(options.output, DATABASES)
        alignments = mmseqs_search(sequences, store.sequences, databases, profiles=engine == "both")
        if options.self and engine == "both":
            alignments = alignments.both_ways()
        if index is not None and queries is not None:
            queries = with_relatives(queries, alignments, index, options.self)
    scores, folder = None, Path(options.output, "decoys")
    if index is not None and options.decoys and _has_sequences(store):
        scores = decoys_of(store, index, options.decoys, folder, databases, options.self, options.seed)
    return names, queries, Engines(len(store), index, alignments, scores, options.self)


def _has_sequences(store: CodeStore) -> bool:
    return all(store.sequences)


def _queries(options: SearchOptions, store: CodeStore, coded: bool) -> tuple[list[str], list[str], Tensor | None]:
    """Names and sequences of the queries, and what codes are searched with, `(Q, r)` of unit length."""
    if options.self:
        decoded = store.encoder.decode(torch.from_numpy(np.array(store.embeddings()))) if coded else None
        return store.ids, store.sequences, None if decoded is None else F.normalize(decoded, dim=1)
    if options.queries is not None:
        source = Store.open(options.queries)
        store.encoder.check_origin(manifest_of(source), options.queries)
        vectors = torch.from_numpy(np.array(source.embeddings())) if coded else None
        return source.ids, source.sequences, None if vectors is None else store.encoder(vectors)
    assert options.fasta is not None
    proteins, cleaning = read_proteins(options.fasta)
    if empty := cleaning.counts["empty"]:
        raise InputError(
            f"Expected residues in every query of {options.fasta} but {empty:,} of "
            f"{cleaning.counts['records']:,} have none; remove them."
        )
    names, sequences = [protein.id for protein in proteins], [protein.sequence for protein in proteins]
    if not coded:
        return names, sequences, None
    with TemporaryDirectory(prefix="distil-rank-") as folder:
        return names, sequences, store.encoder(vectors_like(sequences, store, Path(folder), "queries"))


def _lines(hits: Hits, names: list[str], ids: list[str]) -> Iterator[str]:
    """Lines of the table; `nan` stands where an engine has nothing to say."""
    columns = (hits.query, hits.target, hits.alignment, hits.cosine, hits.score, hits.rank, hits.evalue)
    for query, target, aligned, cosine, score, rank, evalue in zip(*columns, strict=True):
        identity, *places, own, bits = aligned
        alignment = "\t".join([f"{identity:.3f}", *(f"{place:.0f}" for place in places), f"{own:.2e}", f"{bits:.0f}"])
        yield f"{names[query]}\t{ids[target]}\t{alignment}\t{cosine:.4f}\t{score:.2f}\t{rank}\t{evalue:.2e}\n"


def _rows(hits: Hits, names: list[str], ids: list[str], least: float, most: int) -> list[list[str]]:
    """The first hits as the screen shows them."""
    rows = []
    for place in range(min(most, len(hits.query))):
        identity, evalue = hits.alignment[place, COLUMNS.index("fident")], hits.evalue[place]
        shown = f"< {least:.2g}" if evalue <= least else f"{evalue:.2g}"
        cells = [number(identity, 2), number(hits.cosine[place], 3), number(hits.score[place], 1)]
        rows.append([names[hits.query[place]], ids[hits.target[place]], *cells, str(hits.rank[place]), shown])
    return rows


def _write_clusters(path: Path, pairs: np.ndarray, store: CodeStore, evalue: float) -> int:
    """Representative and member in each line, as MMseqs2 writes them; the number of clusters."""
    first, second = pairs[:2, pairs[3] <= evalue].astype(int)
    representative = set_cover(first, second, len(store))
    rows = np.argsort(representative, kind="stable")
    write_atomically(path, "".join(f"{store.ids[representative[row]]}\t{store.ids[row]}\n" for row in rows).encode())
    return len(np.unique(representative))


def _write_votes(path: Path, pairs: np.ndarray, member: csr_array, names: list[str], classes: list[str]) -> int:
    """Query, label and the share of the vote in each line; the number of queries that have hits with labels."""
    query, target = pairs[:2].astype(int)
    best, share = vote(query, target, pairs[2], member, len(names))
    voted = np.flatnonzero(best >= 0)
    lines = [f"{names[query]}\t{classes[best[query]]}\t{share[query]:.3f}\n" for query in voted]
    write_atomically(path, "".join(["#query\tlabel\tshare\n", *lines]).encode())
    return len(voted)


def _members(labels: LabelTable, options: SearchOptions, store: CodeStore) -> tuple[csr_array, list[str]]:
    """Which labels the targets have; of levels that which counts."""
    rows, texts, _ = labels.aligned(store.ids)
    target = make_target(texts, options.labels)
    if target.kind == "regression":
        raise InputError(f"Expected classes to vote for in {labels.source} but got numbers; name another column.")
    if target.relevance is not None:
        texts = list(target.levels[target.relevance.level])
    several: list[list[str]] = [[] for _ in store.ids]
    for row, text in zip(rows, texts, strict=True):
        several[row] = text.split(SEVERAL)
    return members(several)


def _vote_accuracy(
    engines: Engines, member: csr_array, store: CodeStore, options: SearchOptions, most: float
) -> VoteAccuracy:
    """How good votes are on some labelled targets without their clusters, which profiles and joined queries know."""
    labelled = np.flatnonzero(np.diff(member.indptr))
    group = np.array(store.ids, dtype=object)
    if mmseqs_binary() is not None and _has_sequences(store) and len(labelled) <= MOST_CLUSTERED:
        sequences, ids = ([column[row] for row in labelled] for column in (store.sequences, store.ids))
        group[labelled] = mmseqs_clusters(sequences, ids)
    rows, alignments = np.sort(np.random.default_rng(options.seed).permutation(labelled)[:TRIED]), None
    if engines.alignments is not None:
        sequences = [store.sequences[row] for row in rows]
        alignments = mmseqs_search(sequences, store.sequences, Path(options.output, DATABASES), keep=True)
    engines = replace(engines, alignments=alignments, own=False)
    return vote_accuracy(engines, rows, member, np.unique(group, return_inverse=True)[1], options.hits, most)
