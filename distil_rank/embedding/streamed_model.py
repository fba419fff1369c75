"""A model whose layers are read from its file one at a time, for encoders that keep smaller copies of the weights.

Weights are mapped into memory, not read: what was used of a mapping stays resident while any tensor of it exists. Each
layer therefore comes through a mapping of its own, which ends with the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from esm.model.esm2 import ESM2
from esm.modules import TransformerLayer
from torch import Tensor

from distil_rank.embedding.freed_memory import return_freed_memory

Source = Callable[[], Mapping[str, Tensor]]  # maps the weights' files anew; tensors by fair-esm's names


def inverse_frequencies(number: int) -> Tensor:
    """The rotary embedding's frequencies, (number,), where a file lacks them.

    >>> inverse_frequencies(2)
    tensor([1.0000, 0.0100])
    """
    return 1.0 / 10_000 ** (torch.arange(0, 2 * number, 2).float() / (2 * number))


class StreamedModel:
    """What encoders use of fair-esm's `ESM2`, with layers that exist while they are used.

    Args:
        model: The same model, mapped; its layers are not touched.
        source: Where they come from.
    """

    def __init__(self, model: ESM2, source: Source):
        self.num_layers: int = model.num_layers
        self.attention_heads: int = model.attention_heads
        self.embed_dim: int = model.embed_dim
        self.token_dropout: bool = model.token_dropout
        self.embed_tokens = model.embed_tokens
        self.emb_layer_norm_after = model.emb_layer_norm_after
        self.layers = _Layers(model, source, range(len(model.layers)))


class _Layers(Sequence[Any]):
    """Layers by number; a slice of them is as little in memory as they are."""

    def __init__(self, model: ESM2, source: Source, numbers: range):
        self.model, self.source, self.numbers = model, source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.numbers[index]
        return _Layers(self.model, self.source, chosen) if isinstance(chosen, range) else self._read(chosen)

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self.numbers)

    def _read(self, number: int) -> TransformerLayer:
        return_freed_memory()  # the last layer's
        width, prefix = self.model.embed_dim, f"layers.{number}."
        with torch.device("meta"):
            layer = TransformerLayer(
                width,
                4 * width,
                self.model.attention_heads,
                add_bias_kv=False,
                use_esm1b_layer_norm=True,
                use_rotary_embeddings=True,
            )
        weights = self.source()
        state = {
            name: weights[prefix + name].float() if prefix + name in weights else inverse_frequencies(len(empty))
            for name, empty in layer.state_dict().items()
        }
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)
