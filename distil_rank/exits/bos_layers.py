"""The BOS token alone through further layers behind an exit.

Where only the BOS token's vector is wanted, layers behind the exit need not compute the residues: the token goes on
alone and attends to the residues as they are behind the exit. Such a layer needs their keys and values, a sixth of its
arithmetic. What comes out is a further feature for the map to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distil_rank.embedding.backbones import Backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows
from distil_rank.exits.exit_map import PooledStates

MAX_STATES = 3  # of these layers that are features
CHUNK = 256  # sequences


@dataclass(frozen=True)
class _Chunk:
    texts: list[str]


def bos_states(layer: int, count: int, depth: int) -> tuple[State, ...]:
    """The states of the BOS token alone that are features, the last one among them.

    Args:
        layer: The last that all tokens run.
        count: Layers behind it that the BOS token runs alone.
        depth: Layers of the whole model.

    Raises:
        InputError: more layers than there are.

    >>> [str(state) for state in bos_states(3, 3, 6)], [str(state) for state in bos_states(22, 11, 33)]
    (['4', '5', '6'], ['23', '28', '33'])
    """
    if not 1 <= count <= depth - layer:
        raise InputError(f"Expected --bos_layers from 0 to {depth - layer} behind layer {layer} but got {count}.")
    numbers = np.linspace(layer + 1, layer + count, min(count, MAX_STATES)).round().astype(int)
    return tuple(State(int(number)) for number in numbers)


def with_bos_layers(
    backbone: Backbone, store: Store, rows: PooledStates, copies: AugmentedRows | None, layer: int, count: int
) -> tuple[PooledStates, AugmentedRows | None]:
    """Rows of an exit with the further features, and those of the copies.

    Args:
        backbone: The whole model.
        store: Of the sequences, BOS vectors.
        rows: Of the exit.
        copies: Its copies.
        layer: The last that all tokens run.
        count: Layers that the BOS token runs alone.

    Raises:
        InputError: another pooling, or more layers than there are.
    """
    states = bos_states(layer, count, backbone.depth)
    if store.manifest["pooling"] != "bos":
        raise InputError(
            f"Expected a store of BOS vectors (--pooling bos) for --bos_layers but {store.path} has "
            f"{store.manifest['pooling']}; leave --bos_layers out."
        )
    longest = store.manifest["max_length"]
    texts = store.sequences
    if store.manifest["long"] == "truncate":
        texts = [text[:longest] for text in texts]
    rows = rows.extended(states, _embedded(backbone, texts, layer, states, longest))
    if copies is not None:
        more = _embedded(backbone, copies.sequences, layer, states, longest)
        copies = replace(copies, x=torch.cat([copies.x, more], dim=1))
    return rows, copies


def _embedded(
    backbone: Backbone, sequences: Sequence[str], layer: int, states: Sequence[State], longest: int
) -> Tensor:
    """Those states of every sequence, `(N, states × C)`."""
    encoder = FusedEncoder(backbone.model, layer=states[-1].layer, bos_only_after=layer)
    embedder = Embedder(backbone, "bos", layers=states, window=longest, encoder=encoder)
    chunks = (_Chunk(list(sequences[start : start + CHUNK])) for start in range(0, len(sequences), CHUNK))
    return torch.cat([done.layers.transpose(0, 1).flatten(1) for _, done in embedder.stream(chunks)])
