"""Augmented copies of proteins, embedded as the proteins themselves were.

A copy is what a function should survive: a window of the sequence, with substitutions that evolution allows. What
changes between a protein and its copies is noise for whoever looks for homologues. Its covariance stands in for the
covariance within families where nobody has labelled any.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.embedding.run import OPTIONS, embed, options_like
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.options.codes import AugmentationOptions

log = logging.getLogger(__name__)

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
# BLOSUM62 in half bits, lower triangle, and its background frequencies (Henikoff and Henikoff, PNAS 89, 1992).
BLOSUM62 = """4
-1 5
-2 0 6
-2 -2 1 6
0 -3 -3 -3 9
-1 1 0 0 -3 5
-1 0 0 2 -4 2 5
0 -2 0 -1 -3 -2 -2 6
-2 0 1 -1 -3 0 0 -2 8
-1 -3 -3 -3 -1 -3 -3 -4 -3 4
-1 -2 -3 -4 -1 -2 -3 -4 -3 2 4
-1 2 0 -1 -3 1 1 -2 -1 -3 -2 5
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1 5
-2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7
1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7
0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1 4"""
BACKGROUND = np.array(
    [74, 52, 45, 54, 25, 34, 54, 74, 26, 68, 99, 58, 25, 47, 39, 57, 51, 13, 32, 73], dtype=np.float64
)
LAMBDA = np.log(2) / 2  # of scores in half bits


def substitution_probabilities() -> np.ndarray:
    """What an amino acid is replaced by when it is, `(20, 20)` in the order of `AMINO_ACIDS`; rows sum to 1.

    `P(b | a) ∝ p_b exp(λ s_ab)` for `b ≠ a`: the target frequencies behind the scores (Karlin and Altschul 1990).

    >>> table = substitution_probabilities()
    >>> AMINO_ACIDS[table[AMINO_ACIDS.index("I")].argmax()], bool(np.allclose(table.sum(1), 1))
    ('V', True)
    """
    scores = np.zeros((20, 20))
    for row, line in enumerate(BLOSUM62.splitlines()):
        values = np.array(line.split(), dtype=np.float64)
        scores[row, : row + 1] = values
        scores[: row + 1, row] = values
    table = BACKGROUND * np.exp(LAMBDA * scores)
    np.fill_diagonal(table, 0.0)
    return table / table.sum(axis=1, keepdims=True)


_CUMULATIVE = substitution_probabilities().cumsum(axis=1)


@dataclass(frozen=True)
class Copies:
    """Embedded copies `(C, d)`, and the index of the protein that each is a copy of, `(C,)`."""

    x: np.ndarray
    owner: np.ndarray


def augmented(sequence: str, how: AugmentationOptions) -> list[str]:
    """The copies of one sequence.

    >>> [len(copy) for copy in augmented("MKVLAAGICW", AugmentationOptions(copies=3))]
    [7, 7, 7]
    """
    dice = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{how.seed} {sequence}".encode()).digest()[:8]))
    copies = []
    for _ in range(how.copies):
        length = max(1, round(how.window * len(sequence)))
        start = int(dice.integers(len(sequence) - length + 1))
        letters = list(sequence[start : start + length])
        for place in dice.permutation(length)[: round(how.substitutions * length)]:
            known, draw = AMINO_ACIDS.find(letters[place]), dice.random()
            if known >= 0:  # X and the like stay
                letters[place] = AMINO_ACIDS[min(int(np.searchsorted(_CUMULATIVE[known], draw, "right")), 19)]
        copies.append("".join(letters))
    return copies


def embed_copies(
    sequences: Sequence[str],
    chosen: np.ndarray,
    how: AugmentationOptions,
    layers: Sequence[Mapping[str, Any]],
    folder: str | Path,
) -> list[Copies]:
    """Copies of some proteins at one or several layers of their backbone, in one pass, unless that was done before.

    Args:
        sequences: of all proteins.
        chosen: indices of those to copy.
        how: rates and seed.
        layers: what the proteins' own store tells of each of its layers.
        folder: where stores of copies are kept.
    """
    about = layers[-1]
    if about.get("weights_sha256") is None or about.get("backbone") is None:
        raise InputError(
            "Expected vectors of a known backbone to embed augmented copies with but these do not tell theirs; give a "
            "store made by embed, or another source of noise (--noise labels)."
        )
    texts = [text for row in chosen for text in augmented(sequences[row], how)]
    names = [str(one["layer"]) for one in layers]
    log.info("Embedding %s augmented copies of %s proteins", f"{len(texts):,}", f"{len(chosen):,}")
    several = {"layer": ",".join(names)} if len(names) > 1 else {}
    key = [asdict(how), chosen.tolist()]
    store = embed_like(texts, {**about, **several}, about.get("source"), Path(folder), "copies", key)
    copied = np.array([int(name) for name in store.ids])
    stores = [store.at(int(name)) for name in names] if several else [store]
    owner = np.repeat(chosen, how.copies)[copied]
    return [Copies(one.embeddings(), owner) for one in stores]


def embed_like(
    sequences: Sequence[str], about: Mapping[str, Any], like: Any, folder: Path, kind: str, key: Any = None
) -> Store:
    """A store of these sequences, named by their numbers, whose vectors are made as others were.

    Args:
        sequences: cleaned.
        about: the manifest of the others: backbone, weights, layer, pooling, precision.
        like: the store of the others, or its address; in int8 it is needed.
        folder: where the store is kept, and found again.
        kind: of sequences, for its name.
        key: what the store depends on beside its sequences and settings, for its name.
    """
    settings = {name: about.get(name) for name in ("weights_sha256", *OPTIONS, "calibration_sha256")}
    content = json.dumps([settings, key, list(sequences)])
    path = folder / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    fasta = path.with_suffix(".fasta")
    fasta.parent.mkdir(parents=True, exist_ok=True)
    # numbers for names: what came in was made unique already, and may hold what a header cannot
    fasta.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(sequences)))
    embed(fasta, path, about["backbone"], **options_like(about, like))
    store = Store.open(path)
    if store.manifest["weights_sha256"] != about["weights_sha256"]:
        raise InputError(
            f"Expected the weights {about['weights_sha256'][:12]}… of the vectors but {about['backbone']} now has "
            f"{store.manifest['weights_sha256'][:12]}…; restore them, or embed the proteins again."
        )
    return store
