"""ESM-2's forward pass without its waste: fair-esm's weights, packed sequences, fused kernels.

fair-esm pads a batch to its longest sequence, materialises every attention matrix and ends in a language-model head.
Here the residues of all sequences lie one behind the other, (T,), so that no multiplication is spent on padding;
attention runs within each sequence through `scaled_dot_product_attention`; the head is never computed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from esm import Alphabet
from esm.model.esm2 import ESM2
from torch import Tensor

TRAINED_MASK_RATIO = 0.15 * 0.8  # share of <mask> in training, which ESM-2's token dropout makes up for


def tokenise(sequences: list[str], alphabet: Alphabet) -> tuple[Tensor, list[int]]:
    """Packs sequences as tokens, each between BOS and EOS.

    Returns:
        Tokens (T,) and the number of tokens of each sequence, its residues plus 2.
    """
    table = np.full(256, alphabet.unk_idx, dtype=np.int64)
    for letter, index in alphabet.tok_to_idx.items():
        if len(letter) == 1:
            table[ord(letter)] = index
    bos, eos = [alphabet.cls_idx], [alphabet.eos_idx]
    parts = [part for text in sequences for part in (bos, table[np.frombuffer(text.encode(), np.uint8)], eos)]
    return torch.from_numpy(np.concatenate(parts)), [len(text) + 2 for text in sequences]


class _Layer(NamedTuple):
    """The parameters of one transformer layer; query, key and value in one matrix."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


class FusedEncoder:
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference.

    Args:
        model: fair-esm's model. Its parameters are shared where dtype and device allow it.
        dtype: Of weights and activations.
        device: Where to compute.
        layer: The layer whose hidden states are wanted; the last one by default, with its final norm as in fair-esm.
    """

    def __init__(
        self,
        model: ESM2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layer: int | None = None,
    ):
        self.layer = model.num_layers if layer is None else layer
        self.heads: int = model.attention_heads
        self.dtype = dtype
        self.device = torch.device(device)
        self.scale = 1 - TRAINED_MASK_RATIO if model.token_dropout else 1.0

        def cast(*tensors: Tensor) -> Tensor:
            joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            return joined.detach().to(self.device, dtype)

        def pair(module: Any) -> tuple[Tensor, Tensor]:
            return cast(module.weight), cast(module.bias)

        self.embedding = cast(model.embed_tokens.weight)
        self.layers = []
        for module in model.layers[: self.layer]:
            attention = module.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            self.layers.append(
                _Layer(
                    norm1=pair(module.self_attn_layer_norm),
                    qkv=(cast(*(p.weight for p in projections)), cast(*(p.bias for p in projections))),
                    out=pair(attention.out_proj),
                    norm2=pair(module.final_layer_norm),
                    fc1=pair(module.fc1),
                    fc2=pair(module.fc2),
                )
            )
        self.norm_after = pair(model.emb_layer_norm_after) if self.layer == model.num_layers else None
        self.eps: float = model.emb_layer_norm_after.eps
        self.frequencies: Tensor = model.layers[0].self_attn.rot_emb.inv_freq.float().cpu()

    def _rotary(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's rotation angles, (T, 1, head_dim / 2)."""
        angles = torch.arange(max(lengths)).float()[:, None] * self.frequencies  # float32, as fair-esm has them
        position = torch.cat([torch.arange(length) for length in lengths])
        index = position.to(self.device)
        return angles.cos().to(self.device, self.dtype)[index, None], angles.sin().to(self.device, self.dtype)[
            index, None
        ]

    def _norm(self, x: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states of packed sequences.

        Args:
            tokens: (T,), as `tokenise` packs them.
            lengths: Tokens of each sequence; they sum to T.

        Returns:
            (T, dim) in the encoder's dtype.
        """
        x = F.embedding(tokens.to(self.device), self.embedding) * self.scale  # (T, C)
        cos, sin = self._rotary(lengths)
        bounds = list(pairwise(np.cumsum([0, *lengths]).tolist()))
        for layer in self.layers:
            qkv = F.linear(self._norm(x, layer.norm1), *layer.qkv).unflatten(-1, (3, self.heads, -1))  # (T, 3, H, D)
            q, k, v = qkv.unbind(1)
            attended = self._attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, bounds)
            x = x + F.linear(attended.flatten(1), *layer.out)
            x = x + F.linear(F.gelu(F.linear(self._norm(x, layer.norm2), *layer.fc1)), *layer.fc2)
        return x if self.norm_after is None else self._norm(x, self.norm_after)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
        """Attention within each sequence; q, k, v and the result are (T, H, D)."""
        attended = torch.empty_like(q)
        for start, stop in bounds:
            one = [tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v)]  # (1, H, L, D)
            attended[start:stop] = F.scaled_dot_product_attention(one[0], one[1], one[2])[0].transpose(0, 1)
        return attended


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns each pair (i, i + D/2) of the last dimension by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
