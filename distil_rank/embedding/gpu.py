"""ESM-2's forward pass on one GPU, and what keeps the device busy: the host launches, and waits for nothing in a batch.

The tokens of all sequences are one axis; attention is one kernel over them, told where each sequence begins. Queries,
keys and values are one product. Weights and what goes into a product are in the encoder's type; hidden states, norms
and rotations are in float32. What is elementwise around a layer's products is two functions that all layers share, so
that each is compiled once; uncompiled they do the same, in more kernels.

No operation here reads a value back from the device, or adds in an order that changes: one batch gives the same bytes
each time.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.embedding.esm2 import Affine, FusedEncoder, folded

logger = logging.getLogger(__name__)

POSITIONS = 2048  # whose rotary angles are made at once; more when they are needed
TRIAL = 61  # tokens on which the compiled functions are tried: prime, so that no size is taken to divide it
AHEAD = 2  # batches that are prepared before they are needed, and computed before they are taken

Item = TypeVar("Item")
Result = TypeVar("Result")


class _PackedLayer(NamedTuple):
    """The parameters of one transformer layer; both norms are folded into the products that follow."""

    qkv: Affine  # values have no bias: attention leaves it unchanged, so it is folded into the output's
    out: Affine
    fc1: Affine
    fc2: Affine

    def to(self, dtype: torch.dtype) -> Self:
        """In another type."""
        return type(self)(*((weight.to(dtype), bias.to(dtype)) for weight, bias in self))


def project(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, (T, heads, D) each, of hidden states x, (T, C).

    The tables `cos` and `sin`, (positions, D), are in float32, as is the rotation.
    """
    normed = F.layer_norm(x, x.shape[-1:]).to(weight.dtype)
    q, k, v = F.linear(normed, weight, bias).unflatten(-1, (3, -1, cos.shape[-1])).unbind(1)
    c, s = (table.index_select(0, positions).unsqueeze(1) for table in (cos, sin))
    return _rotated(q, c, s), _rotated(k, c, s), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def feed_forward(
    x: Tensor,
    attended: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """The hidden states behind a layer, (T, C), of those before it and what attention gives, (T, heads, D)."""
    x = x + F.linear(attended.flatten(1), out_weight, out_bias).float()
    normed = F.layer_norm(x, x.shape[-1:]).to(fc1_weight.dtype)
    return x + F.linear(F.gelu(F.linear(normed, fc1_weight, fc1_bias)), fc2_weight, fc2_bias).float()


class GpuEncoder(FusedEncoder):
    """The encoder of a fair-esm ESM-2 model up to one layer, for inference on one GPU; arguments as `FusedEncoder`'s.

    Attributes:
        kernels: How the elementwise work runs, as users are told it.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.device = self.embedding.device  # with its number, which threads are told
        self.kernels = "uncompiled kernels"
        self._parts: tuple[Callable[..., Any], ...] = project, feed_forward
        self._extend_tables(POSITIONS)

    def _convert(self, modules: Iterable[Any]) -> list[Any]:
        return [self._packed(module).to(self.dtype) for module in modules]

    def _first(self, module: Any) -> None:
        """No table of the first layer's products: it would be a case of its own to compile."""

    @torch.no_grad()
    def _packed(self, module: Any) -> _PackedLayer:
        """One layer's parameters in float32, moved to the device as they are."""
        attention = module.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, module.fc1, module.fc2]
        q, k, v, out, fc1, fc2 = map(self._parameters, projections)
        _, (q, k, v) = folded(self._parameters(module.self_attn_layer_norm), q, k, v)
        _, (fc1,) = folded(self._parameters(module.final_layer_norm), fc1)
        qkv = torch.cat((q[0], k[0], v[0])), torch.cat((q[1], k[1], torch.zeros_like(v[1])))
        return _PackedLayer(qkv, (out[0], out[1] + out[0] @ v[1]), fc1, fc2)

    def convert_to(self, dtype: torch.dtype) -> None:
        """Rounds the weights, which lie on the device already; the result is that of an encoder made in this type."""
        self.dtype = dtype
        for number, layer in enumerate(self.layers):
            self.layers[number] = layer.to(dtype)

    def _extend_tables(self, positions: int) -> None:
        """Cosines and sines of the rotary angles, (positions, D) each; computed on the CPU, as fair-esm has them."""
        angles = torch.arange(positions).float()[:, None] * self.frequencies.repeat(2)
        self._cos, self._sin = angles.cos().to(self.device), angles.sin().to(self.device)

    @torch.no_grad()
    def compile(self) -> None:
        """Compiles the elementwise work, for any number of tokens; where that fails, says so once and goes on without.

        Tried on few tokens, so that an error shows before the work begins.
        """
        uncompiled = self._parts
        self._parts = tuple(map(torch.compile, uncompiled))
        try:
            x = of_any_length(torch.zeros(TRIAL, len(self.embedding[0]), device=self.device))
            positions = of_any_length(torch.zeros(TRIAL, dtype=torch.int64, device=self.device))
            self._cos, self._sin = of_any_length(self._cos), of_any_length(self._sin)
            for layer in self.layers[:1]:
                self._behind(layer, x, positions, lambda q, k, v: of_any_length(torch.empty_like(q)))
        except Exception as error:  # whatever a missing compiler, or one of another version, ends in
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            self.kernels = f"uncompiled kernels, as compiling them failed ({reason})"
            logger.warning("computing with %s: about a third slower", self.kernels)
            self._parts = uncompiled
        else:
            self.kernels = "compiled kernels"

    def placed(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """On the host: each token's position in its sequence, (T,), and where sequences begin and end, (N + 1,)."""
        each = torch.tensor(lengths)
        offsets = F.pad(each.cumsum(0), (1, 0))
        return torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(each), offsets.int()

    @torch.no_grad()
    def states(
        self, tokens: Tensor, lengths: list[int], positions: Tensor | None = None, offsets: Tensor | None = None
    ) -> Iterator[Tensor]:
        """As in `FusedEncoder`; `positions` and `offsets` are as `placed` gives them, perhaps on the device already."""
        longest = max(lengths)
        if positions is None or offsets is None:
            positions, offsets = self.placed(lengths)
        tokens, positions, offsets = (part.to(self.device, non_blocking=True) for part in (tokens, positions, offsets))
        if longest > len(self._cos):
            self._extend_tables(2 * longest)
        attend = partial(attend_at_once, offsets=offsets, longest=longest)
        x = F.embedding(tokens, self.embedding)
        yield x
        for layer in self.layers:
            x = self._behind(layer, x, positions, attend)
            yield x

    def _behind(self, layer: _PackedLayer, x: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """The hidden states behind a layer, (T, C)."""
        project_layer, apply_rest = self._parts
        q, k, v = project_layer(x, *layer.qkv, self._cos, self._sin, positions)
        return apply_rest(x, attend(q, k, v), *layer.out, *layer.fc1, *layer.fc2)


def of_any_length(tensor: Tensor) -> Tensor:
    """Tells the compiler that the first axis may have any length; of widths that are fixed it makes faster kernels."""
    torch._dynamo.mark_dynamic(tensor, 0)
    return tensor


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention within each sequence, all in one kernel; q, k, v and the result are (T, heads, D).

    The kernel for packed sequences takes 16 bits; float32 goes through nested tensors.
    """
    if q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (a second, which a CPU need not wait)

        return varlen_attn(q, k, v, offsets, offsets, longest, longest)  # type: ignore[return-value]
    jagged = partial(torch.nested.nested_tensor_from_jagged, offsets=offsets.long(), min_seqlen=1, max_seqlen=longest)
    q, k, v = (jagged(tensor.contiguous()).transpose(1, 2) for tensor in (q, k, v))  # (sequences, heads, lengths, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def this_gpu() -> torch.device:
    """The current GPU with its number: other threads than the one that chose it have the first as theirs."""
    return torch.device("cuda", torch.cuda.current_device())


def pinned_like(tensor: Tensor) -> Tensor:
    """Room for a copy of a tensor, in the host's memory, which the device writes by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


class Outbox:
    """Copies results to the host on a stream of their own, while the device computes what follows."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins to copy a tensor; the result waits for the copy and returns it."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            copy = pinned_like(tensor).copy_(tensor, non_blocking=True)
            event = self._stream.record_event()
        tensor.record_stream(self._stream)  # its memory is not taken for another before

        def received() -> Tensor:
            event.synchronize()
            return copy

        return received


def prepared(items: Iterable[Item], prepare: Callable[[Item], Result], device: torch.device) -> Iterator[Result]:
    """Applies a function to items in a thread, a few ahead; the thread pins memory with this device's driver."""
    rest: Iterator[Result] = map(prepare, items)
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        waiting = deque(thread.submit(next, rest, None) for _ in range(AHEAD))
        while (result := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, rest, None))
            yield result
