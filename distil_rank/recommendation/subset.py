"""A stated part of many proteins: whole classes where there are labels, so that there is something to find."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distil_rank.embedding.sequences import Protein, read_proteins
from distil_rank.errors import InputError
from distil_rank.tasks.labels import LabelSource, read_labels


def subset_of(fasta: str, labels: LabelSource, proteins: int, seed: int, folder: Path) -> tuple[str, str | None]:
    """The file itself where it has few proteins enough, else a file of some of them, and a note that says so.

    Args:
        fasta: FASTA or a table of sequences.
        labels: where labels come from.
        proteins: at most so many.
        seed: of the draw.
        folder: where the smaller file goes.

    Raises:
        InputError: fewer than one protein is asked for, or the files cannot be read.
    """
    if proteins < 1:
        raise InputError(f"Expected --proteins of at least 1 but got {proteins}.")
    everything, _ = read_proteins(fasta)
    if len(everything) <= proteins:
        return fasta, None
    chosen = [everything[row] for row in _chosen(everything, labels, proteins, seed)]
    text = "".join(f">{one.id}\n{one.sequence}\n" for one in chosen)
    path = folder / f"subset-{hashlib.sha256(text.encode()).hexdigest()[:12]}.fasta"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    how = "whole classes at random" if labels.source is not None else "at random"
    return str(path), f"FEWER PROTEINS: {len(chosen):,} of {len(everything):,}, {how} (--proteins takes more)"


def _chosen(everything: Sequence[Protein], labels: LabelSource, proteins: int, seed: int) -> list[int]:
    """Rows in the order of the file."""
    dice = np.random.default_rng(seed)
    if labels.source is None:
        return sorted(dice.permutation(len(everything))[:proteins].tolist())
    source = labels.source.split(",")[0] if not Path(labels.source).is_file() else labels.source
    table = read_labels(LabelSource(source, labels.column, labels.field, labels.separator)).labels
    rows = [row for row, one in enumerate(everything) if one.id in table]
    if not rows:
        raise InputError(f"Expected labels of the proteins in the FASTA file but {source} has none of them.")
    number = np.unique([table[everything[row].id] for row in rows], return_inverse=True)[1]
    order = dice.permutation(number.max() + 1)
    total = np.cumsum(np.bincount(number)[order])
    kept = np.isin(number, order[total <= proteins])
    return [row for row, wanted in zip(rows, kept, strict=True) if wanted]
