"""What needs no embedding: amino-acid composition, and MMseqs2 search among the evaluated sequences."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from distil_rank.data.mmseqs import MMSEQS_INSTALLATION, mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.representations import Representation, Rows
from distil_rank.evaluation.retrieval import Scores

COMPOSITION, ALIGNMENT = "composition", "MMseqs2"
NO_MMSEQS = f"MMseqs2 is not installed, so not compared with it: {MMSEQS_INSTALLATION}."
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
SEARCH = ["--dbtype", "1", "-s", "7.5", "--max-seqs", "500", "-e", "10000"]  # as sensitive as it gets


def composition(sequences: Sequence[str]) -> Representation:
    """Shares of the twenty amino acids and the logarithm of the length, each standardised on the fit rows."""

    def make(fit: np.ndarray) -> Rows:
        counts = np.array([[sequence.upper().count(letter) for letter in AMINO_ACIDS] for sequence in sequences])
        lengths = np.maximum([len(sequence) for sequence in sequences], 1)[:, None]
        features = np.hstack([counts / lengths, np.log(lengths)])
        spread = features[fit].std(axis=0)
        features = (features - features[fit].mean(axis=0)) / np.where(spread > 0, spread, 1)
        rows = F.normalize(torch.from_numpy(features).float())
        return rows, rows

    return Representation(COMPOSITION, "baseline", 4.0 * (len(AMINO_ACIDS) + 1), make)


def alignment_scores(sequences: Sequence[str]) -> Scores:
    """Scores of every sequence against every other by MMseqs2's bit score; −∞ where no alignment was found."""
    binary = mmseqs_binary()
    if binary is None:
        raise InputError(f"Expected MMseqs2 to search with but there is none: {MMSEQS_INSTALLATION}.")
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as name:
        folder = Path(name)
        fasta, hits = folder / "sequences.fasta", folder / "hits.tsv"
        fasta.write_text("".join(f">{row}\n{sequence}\n" for row, sequence in enumerate(sequences)))
        files: list[str | Path] = [fasta, fasta, hits, folder / "tmp"]
        options = ["-v", "1", *SEARCH, "--format-output", "query,target,bits"]
        result = subprocess.run([binary, "easy-search", *files, *options], capture_output=True, text=True, check=False)
        if result.returncode:
            message = (result.stdout + result.stderr).strip().splitlines() or ["no message"]
            raise InputError(f"Expected MMseqs2 to search but it ended with status {result.returncode}: {message[-1]}")
        table = np.loadtxt(hits, dtype=np.float64, ndmin=2, delimiter="\t") if hits.stat().st_size else np.empty((0, 3))
    pairs = table[:, 0].astype(int), table[:, 1].astype(int)
    bits = csr_array((table[:, 2].astype(np.float32), pairs), shape=(len(sequences), len(sequences)))

    def scores(queries: np.ndarray, targets: np.ndarray) -> Tensor:
        block = bits[queries][:, targets].toarray()
        return torch.from_numpy(np.where(block > 0, block, -np.inf).astype(np.float32))

    return scores
