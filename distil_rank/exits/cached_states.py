"""Hidden states before the last kept layer, computed once and kept in memory for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from distil_rank.embedding.backbones import Backbone
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from distil_rank.errors import InputError
from distil_rank.training.exit_training import CachedBatch

CACHE_BYTES = 2**31  # of hidden states in float16
BATCH_TOKENS = 4096


def cache_states(
    backbone: Backbone,
    layer: int,
    sequences: Sequence[str],
    earlier: Tensor,
    target: Tensor,
    pooling: str,
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int = 64,
) -> list[CachedBatch]:
    """Batches of similar length with the states behind the layer before `layer`.

    Args:
        backbone: The whole model.
        layer: The one that is to be trained; before the first are the tokens' embeddings.
        sequences: Whole ones, N.
        earlier: Pooled states of the layers before it, `(N, n)`.
        target: `(N, m)`.
        pooling: `mean` or `bos`.
        batch_tokens: In a batch, padding included.
        batch_size: Sequences in a batch at most.

    Raises:
        InputError: More states than fit into `CACHE_BYTES`.
    """
    needed = 2 * backbone.model.embed_dim * sum(len(sequence) + 2 for sequence in sequences)
    if needed > CACHE_BYTES:
        raise InputError(
            f"Expected at most {CACHE_BYTES / 2**30:.0f} GiB of hidden states to train on but {len(sequences):,} "
            f"sequences have {needed / 2**30:.1f}; train on fewer."
        )
    encoder = FusedEncoder(backbone.model, layer=layer - 1)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    batches = []
    for group in tqdm(_groups(order, sequences, batch_tokens, batch_size), desc="cache states", disable=None):
        tokens, lengths = tokenise([sequences[index] for index in group], backbone.alphabet)
        *_, hidden = encoder.states(tokens, lengths)
        parts = hidden.half().split(lengths)
        weights = [_weights(length, pooling) for length in lengths]
        batches.append(
            CachedBatch(
                torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
                torch.nn.utils.rnn.pad_sequence(weights, batch_first=True),
                torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None],
                earlier[group],
                target[group],
                torch.tensor(group),
            )
        )
    return batches


def _groups(order: Sequence[int], sequences: Sequence[str], tokens: int, size: int) -> list[list[int]]:
    """Neighbours in length, together no more than so many tokens with their padding."""
    groups: list[list[int]] = []
    for index in order:
        longest = len(sequences[index]) + 2
        if not groups or len(groups[-1]) == size or (len(groups[-1]) + 1) * longest > tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def _weights(length: int, pooling: str) -> Tensor:
    """Of each token of a sequence in its pooled vector, BOS and EOS included."""
    weights = torch.zeros(length)
    if pooling == "bos":
        weights[0] = 1
    else:
        weights[1:-1] = 1 / (length - 2)
    return weights
