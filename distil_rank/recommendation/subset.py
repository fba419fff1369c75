"""A stated part of many proteins: whole classes where there are labels, so that there is something to find.

Of classes too large for that, a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distil_rank.data.labels import read_labels
from distil_rank.embedding.sequences import Protein, read_proteins
from distil_rank.errors import InputError
from distil_rank.options.evaluation import LabelOptions

LARGE = 10  # a class gets at most this share of the proteins, or, where there are fewer classes, as much as others


def subset_of(fasta: str, labels: LabelOptions, proteins: int, seed: int, folder: Path) -> tuple[str, str | None]:
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
    how = "classes at random, the largest in part" if labels.source is not None else "at random"
    return str(path), f"FEWER PROTEINS: {len(chosen):,} of {len(everything):,}, {how} (--proteins takes more)"


def _chosen(everything: Sequence[Protein], labels: LabelOptions, proteins: int, seed: int) -> list[int]:
    """Rows in the order of the file."""
    dice = np.random.default_rng(seed)
    if labels.source is None:
        return sorted(dice.permutation(len(everything))[:proteins].tolist())
    source = labels.source.split(",")[0] if not Path(labels.source).is_file() else labels.source
    table = read_labels(LabelOptions(source, labels.column, labels.field, labels.separator)).labels
    rows = [row for row, one in enumerate(everything) if one.id in table]
    if not rows:
        raise InputError(f"Expected labels of the proteins in the FASTA file but {source} has none of them.")
    classes = list(np.unique([table[everything[row].id] for row in rows], return_inverse=True)[1])
    most = max(proteins // (max(classes) + 1), proteins // LARGE, 1)
    members: dict[int, list[int]] = {}
    for row in dice.permutation(len(rows)):
        if len(part := members.setdefault(classes[row], [])) < most:
            part.append(rows[row])
    retained: list[int] = []
    for number in dice.permutation(list(members)):
        if len(retained) + len(members[number]) <= proteins:
            retained += members[number]
    return sorted(retained)
