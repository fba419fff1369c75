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

        head_dim = model.embed_dim // model.attention_heads
        adjacent = torch.arange(head_dim).view(2, -1).t().flatten()  # the two halves of a rotary pair side by side

        def paired(tensor: Tensor) -> Tensor:
            """Reorders what a query or key projection gives; attention does not see the order within a head."""
            return tensor.unflatten(0, (self.heads, head_dim))[:, adjacent].flatten(0, 1)

        def qkv(attention: Any) -> tuple[Tensor, Tensor]:
            q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
            return (
                cast(paired(q.weight), paired(k.weight), v.weight),
                cast(paired(q.bias), paired(k.bias), v.bias),
            )

        self.embedding = cast(model.embed_tokens.weight)
        self.layers = [
            _Layer(
                norm1=pair(module.self_attn_layer_norm),
                qkv=qkv(module.self_attn),
                out=pair(module.self_attn.out_proj),
                norm2=pair(module.final_layer_norm),
                fc1=pair(module.fc1),
                fc2=pair(module.fc2),
            )
            for module in model.layers[: self.layer]
        ]
        self.norm_after = pair(model.emb_layer_norm_after) if self.layer == model.num_layers else None
        self.eps: float = model.emb_layer_norm_after.eps
        self.frequencies: Tensor = model.layers[0].self_attn.rot_emb.inv_freq.float().cpu()

    def _rotations(self, lengths: list[int]) -> Tensor:
        """Each token's rotary angles as complex numbers of modulus 1, (T, 1, D / 2); float32, as fair-esm has them."""
        angles = torch.arange(max(lengths)).float()[:, None] * self.frequencies
        position = torch.cat([torch.arange(length) for length in lengths])
        return torch.polar(torch.ones_like(angles), angles).to(self.device)[position.to(self.device), None]

    def _norm(self, x: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states of packed sequences.

        Args:
            tokens: (T,), as `tokenise` packs them.
            lengths: Tokens of each sequence; they sum to T.

        Returns:
            (T, dim) in the encoder's dtype.
        """
        x = F.embedding(tokens.to(self.device), self.embedding) * self.scale  # (T, C)
        rotations = self._rotations(lengths)
        attend = _attend_each if self.device.type == "cpu" else _attend_at_once
        for layer in self.layers:
            qkv = F.linear(self._norm(x, layer.norm1), *layer.qkv).unflatten(-1, (3 * self.heads, -1))  # (T, 3 H, D)
            v = qkv[:, 2 * self.heads :]
            q, k = _rotated(qkv[:, : 2 * self.heads], rotations).chunk(2, dim=1)
            attended = attend(q, k, v, lengths)
            x = x + F.linear(attended.flatten(1), *layer.out)
            x = x + F.linear(F.gelu(F.linear(self._norm(x, layer.norm2), *layer.fc1)), *layer.fc2)
        return x if self.norm_after is None else self._norm(x, self.norm_after)


def _attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention within each sequence, one after the other; q, k, v and the result are (T, H, D)."""
    attended = torch.empty_like(v, memory_format=torch.contiguous_format)
    for start, stop in pairwise(np.cumsum([0, *lengths]).tolist()):
        one = [tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v)]  # (1, H, L, D)
        attended[start:stop] = F.scaled_dot_product_attention(one[0], one[1], one[2])[0].transpose(0, 1)
    return attended


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The same in one kernel for sequences of any lengths, which is what a GPU wants."""
    offsets = torch.tensor(np.cumsum([0, *lengths]), device=q.device)

    def jagged(tensor: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            tensor.contiguous(), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        return nested.transpose(1, 2)  # (sequences, H, lengths, D)

    return F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v)).transpose(1, 2).values()


def _rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """Turns adjacent pairs of the last dimension of x, (T, heads, D), by their angles; in place where x is float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    pairs *= rotations
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)
