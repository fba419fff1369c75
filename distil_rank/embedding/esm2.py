"""ESM-2's forward pass on packed sequences with fused kernels; the weights are fair-esm's.

fair-esm pads a batch to its longest sequence, materialises every attention matrix and ends in a language-model head.
Here the tokens of all sequences are concatenated, (T,), so that nothing is spent on padding; attention runs within each
sequence through `scaled_dot_product_attention`; the head is not computed. The first layer's queries, keys and values
depend only on the token, not on its position, so they are read from a table.

Only the matrix products and the activation between two of them are in bfloat16. Hidden states, norms, rotations and
attention stay in float32: attention is most sensitive to rounding and a small share of the arithmetic. A norm's scale
and shift are folded into the linear map that follows, so that the rounded values are centred. `gpu.py` has the pass for
a GPU.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2
from torch import Tensor

from distil_rank.embedding.model import Encoder

TRAINED_MASK_RATIO = 0.15 * 0.8  # share of <mask> in training, which ESM-2's token dropout compensates for
EXACT = 2  # first layers, whose queries and keys are not rounded: later layers amplify their errors most
ROWS = 64  # a bfloat16 pass is padded to a multiple: oneDNN compiles its product once per number of rows
WIDE = 1024  # dimensions from which one operation, or one pass, keeps all cores of a CPU busy
KEYS = 16  # vector width of a CPU's softmax; it processes remaining keys one by one, which is slow

Affine = tuple[Tensor, Tensor]  # weight and bias


class _Layer(NamedTuple):
    """The parameters of one transformer layer."""

    norm1: Affine
    qk: Affine  # query and key in one matrix
    v: Tensor  # without bias: attention leaves it unchanged, so it is folded into the output's
    out: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


class FusedEncoder(Encoder):
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference.

    Args:
        model: fair-esm's model. In float32 on a CPU its parameters are shared.
        dtype: Of the weights and of the inputs of matrix products.
        device: Where to compute.
        layer: The last layer to compute; the model's own by default.

    Attributes:
        embedding: Of each token, (tokens, dim).
        first: The first layer's queries and keys, (tokens, 2 dim), and values, (tokens, dim), of each token.
    """

    def __init__(
        self,
        model: ESM2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layer: int | None = None,
    ):
        self.layer = model.num_layers if layer is None else layer
        self.dtype, self.device = dtype, torch.device(device)
        self.heads, self.depth, self.eps = model.attention_heads, model.num_layers, model.emb_layer_norm_after.eps
        scale = 1 - TRAINED_MASK_RATIO if model.token_dropout else 1.0
        self.embedding = model.embed_tokens.weight.detach().to(self.device, torch.float32) * scale
        weight, bias = self._parameters(model.emb_layer_norm_after)
        self.norm_after = weight.clone(), bias.clone()  # views would keep the model's file mapped
        self.layers = self._convert(model.layers[: self.layer])
        exact = model.layers[0]
        self.frequencies = exact.self_attn.rot_emb.inv_freq.float().cpu().clone()  # of the rotary embedding
        self.first = self._first(exact)
        return_freed_memory()

    def _convert(self, modules: Iterable[Any]) -> list[Any]:
        """The parameters of each layer, as `_apply` wants them."""
        return [
            self._layer(module, self.dtype, torch.float32 if number < EXACT else self.dtype)
            for number, module in enumerate(modules)
        ]

    def _first(self, module: Any) -> Any:
        return self._project(self.embedding, self._layer(module, torch.float32, torch.float32))

    def _parameters(self, module: Any) -> Affine:
        weight, bias = (part.detach().to(self.device, torch.float32) for part in (module.weight, module.bias))
        return weight, bias

    @torch.no_grad()
    def _layer(self, module: Any, dtype: torch.dtype, qk_dtype: torch.dtype) -> _Layer:
        attention = module.self_attn
        head_dim = module.fc1.in_features // self.heads
        adjacent = torch.arange(head_dim).view(2, -1).t().flatten()  # interleaves the two halves of each rotary pair

        def paired(both: tuple[Tensor, Tensor]) -> Tensor:
            """Joins and reorders outputs of queries and keys; attention is invariant to the order within a head."""
            return torch.cat(both).unflatten(0, (2 * self.heads, head_dim))[:, adjacent].flatten(0, 1)

        def rounded(affine: Affine, dtype: torch.dtype) -> Affine:
            weight, bias = affine  # a view of the bias would keep the float32 weights beside it in memory
            return (weight, bias) if dtype == weight.dtype else (weight.to(dtype), bias.clone())

        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, module.fc1, module.fc2]
        q, k, v, out, fc1, fc2 = map(self._parameters, projections)
        norm1, norm2 = self._parameters(module.self_attn_layer_norm), self._parameters(module.final_layer_norm)
        norm1, (qk, v) = folded(norm1, (paired((q[0], k[0])), paired((q[1], k[1]))), v)
        if dtype != torch.float32:  # in float32 the model's own parameters are shared
            norm2, (fc1,) = folded(norm2, fc1)
        return _Layer(
            norm1=norm1,
            qk=rounded(qk, qk_dtype),
            v=v[0].to(dtype),
            out=rounded((out[0], out[1] + out[0] @ v[1]), dtype),
            norm2=norm2,
            fc1=rounded(fc1, dtype),
            fc2=rounded(fc2, dtype),
        )

    def _rotations(self, lengths: list[int]) -> Tensor:
        """Each token's rotary angles as complex numbers of modulus 1, (T, 1, D / 2); float32, as fair-esm has them."""
        angles = torch.arange(max(lengths)).float()[:, None] * self.frequencies
        position = torch.cat([torch.arange(length) for length in lengths])
        return torch.polar(torch.ones_like(angles), angles)[position, None]

    def _norm(self, x: Tensor, parameters: Affine) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    def _project(self, x: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
        """Queries and keys before their rotation, (T, 2 C) float32, and values without their bias, (T, C)."""
        x = self._norm(x, layer.norm1)
        rounded = x.to(layer.v.dtype)
        return linear(x if layer.qk[0].dtype == x.dtype else rounded, layer.qk), F.linear(rounded, layer.v)

    @torch.no_grad()
    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states after the model's final norm."""
        return self._norm(hidden, self.norm_after)

    @torch.no_grad()
    def states(self, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Hidden states behind the embedding and each layer, (T, dim) float32; each is overwritten by the next."""
        total = len(tokens)
        padding = -total % ROWS if self.dtype != torch.float32 else 0
        if padding:  # as an extra sequence, dropped from what is returned
            tokens, lengths = F.pad(tokens, (0, padding)), [*lengths, padding]
        x = F.embedding(tokens, self.embedding)  # (T, C)
        rotations = self._rotations(lengths)
        yield x[:total]
        for number, layer in enumerate(self.layers):
            projected = None if number else self._look_up(tokens)
            self._apply(layer, x, projected, rotations, lengths)
            yield x[:total]

    def _look_up(self, tokens: Tensor) -> Any:
        """The first layer's queries and keys, and values, of some tokens."""
        return tuple(F.embedding(tokens, table) for table in self.first)

    def _apply(self, layer: Any, x: Tensor, projected: Any, rotations: Tensor, lengths: list[int]) -> None:
        """Adds one layer's output to x, (T, C); `projected` are its queries, keys and values, where they are known."""
        qk, v = self._project(x, layer) if projected is None else projected
        attended = self._attend(qk, v, rotations, lengths)
        x += linear(attended, layer.out)
        weight, bias = layer.fc1
        hidden = F.linear(self._norm(x, layer.norm2).to(self.dtype), weight, bias.to(self.dtype))
        x += linear(F.gelu(hidden), layer.fc2)

    def _attend(self, qk: Tensor, v: Tensor, rotations: Tensor, lengths: list[int]) -> Tensor:
        """Rotates queries and keys, (T, 2 C) float32, in place; attention over the values, (T, C)."""
        pairs = torch.view_as_complex(qk.unflatten(-1, (2 * self.heads, -1, 2)))  # of neighbours, (T, 2 H, D / 2)
        pairs *= rotations
        q, k = torch.view_as_real(pairs).flatten(-2).chunk(2, dim=1)  # (T, H, D)
        return attend_sequentially(q, k, v.unflatten(-1, (self.heads, -1)).to(q.dtype), lengths).flatten(1)


def folded(norm: Affine, *following: Affine) -> tuple[Affine, list[Affine]]:
    """Folds a norm's scale and shift into the linear maps that follow; returns the norm without them, and the maps."""
    scale, shift = norm
    moved = [(weight * scale, bias + weight @ shift) for weight, bias in following]
    return (torch.ones_like(scale), torch.zeros_like(shift)), moved  # layer_norm is slower without parameters


def linear(x: Tensor, affine: Affine) -> Tensor:
    """Matrix product in the weight's dtype; bias and result in float32."""
    weight, bias = affine
    if weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight).float().add_(bias)


def attend_sequentially(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention within each sequence, one after the other; q, k, v and the result are (T, H, D).

    Keys are extended to a multiple of `KEYS` with those of the sequences that follow, and masked.
    """
    attended = torch.empty_like(v, memory_format=torch.contiguous_format)
    for start, stop in pairwise(np.cumsum([0, *lengths]).tolist()):
        more = -(stop - start) % KEYS
        keys, values = k[start : stop + more], v[start : stop + more]
        missing = stop + more - start - len(keys)
        if missing:
            keys, values = (F.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in (keys, values))
        mask = _mask(stop - start, more, q.dtype) if more else None
        one = [tensor.transpose(0, 1)[None] for tensor in (q[start:stop], keys, values)]  # (1, H, L, D)
        result = F.scaled_dot_product_attention(one[0], one[1], one[2], attn_mask=mask)
        attended[start:stop] = result[0].transpose(0, 1)
    return attended


def has_bf16_units() -> bool:
    """Whether this processor has units for bfloat16 (AVX512-BF16 or AMX)."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))


def return_freed_memory() -> None:
    """Returns to the system what lies between tensors that stay, as after the conversion of a layer's weights."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


@lru_cache(maxsize=256)  # more than a batch has different lengths; every layer uses the same masks
def _mask(visible: int, masked: int, dtype: torch.dtype) -> Tensor:
    """Masks the last keys, (1, 1, queries, keys)."""
    mask = torch.zeros(visible + masked, dtype=dtype)
    mask[visible:] = -torch.inf
    return mask.expand(1, 1, visible, -1)
