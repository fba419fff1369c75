"""More rows to fit an exit to: perturbed copies of the proteins, which the rest of the backbone labels.

The target of an exit is what the backbone itself makes of a sequence, so any sequence can be labelled. Copies of the
proteins that are fitted to stay on their side of the split; nothing is made of those that are measured on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil_rank.codes.copies import embed_copies_by_layer
from distil_rank.codes.perturbation import Perturbations
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.store import Store

log = logging.getLogger(__name__)

MAX_PROTEINS = 5000  # that are copied: with many more there are rows enough
WINDOW, SUBSTITUTIONS = 0.7, 0.2  # share of a protein that a copy keeps, and of its residues that are substituted


@dataclass(frozen=True)
class AugmentedRows:
    """Copies as rows of features and targets.

    Attributes:
        x: Features, `(C, n)`.
        y: Targets, `(C, m)`.
        owner: Row of the protein that each is a copy of, `(C,)`.
        sequences: The copies, C.
        weight: Of a copy beside a protein: those of one protein weigh as much as it does.
    """

    x: Tensor
    y: Tensor
    owner: np.ndarray
    sequences: Sequence[str]
    weight: float

    def of(self, proteins: np.ndarray) -> np.ndarray:
        """Numbers of the copies of some proteins."""
        return np.flatnonzero(np.isin(self.owner, proteins))


def augment(
    store: Store,
    features: Sequence[State],
    proteins: np.ndarray,
    copies: int,
    folder: Path,
    target: Callable[[Tensor], Tensor] | None = None,
) -> AugmentedRows:
    """Embed perturbed copies of proteins, unless that was done before, at the states of an exit and at the end.

    Args:
        store: Of the proteins.
        features: Of the exit.
        proteins: Rows of those to copy; the first `MAX_PROTEINS` are.
        copies: Of each.
        folder: For the stores of copies.
        target: From the last layer's vectors to what is to be estimated.

    Raises:
        InputError: the store's backbone cannot be had.
    """
    if len(proteins) > MAX_PROTEINS:
        log.info("Copying %s of %s proteins.", f"{MAX_PROTEINS:,}", f"{len(proteins):,}")
    chosen = np.sort(proteins[:MAX_PROTEINS])
    how = Perturbations(len(chosen), copies, WINDOW, SUBSTITUTIONS)
    about = [{**store.manifest, "layer": state.entry} for state in (*features, store.layers[-1])]
    *states, last = embed_copies_by_layer(store.sequences, chosen, how, about, folder)
    x = torch.from_numpy(np.concatenate([state.x for state in states], axis=1))
    y = torch.from_numpy(np.array(last.x))
    return AugmentedRows(x, y if target is None else target(y), last.owner, last.sequences, 1 / copies)
