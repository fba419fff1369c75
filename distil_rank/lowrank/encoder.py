"""A few bytes for each protein: the first directions of some metric, and how their numbers are stored."""

import hashlib
from collections.abc import Mapping
from typing import Any, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError, check_range
from distil_rank.lowrank.low_rank import tensor_digest
from distil_rank.options.codes import CodeType
from distil_rank.origin import check_origin

CODE_TYPES: tuple[CodeType, ...] = get_args(CodeType)
LEVELS = 127  # of int8, symmetric
SCALE_QUANTILE = 0.9999  # of a number's absolute value, which int8 still holds without clipping
BIT_WEIGHTS = 2 ** torch.arange(8, dtype=torch.uint8)


class CodeEncoder(nn.Module):
    """Protein vectors to codes, and back to what a search compares queries with.

        x (n,) ──▶ W (x − μ) ──▶ unit length, the query (r,) ──▶ encode ──▶ code ──▶ decode ──▶ the target (r,)

    A search scores the inner product of a float query with decoded targets (Jégou, Douze and Schmid, TPAMI 2011: the
    query costs nothing to keep exact). Codes by type:

        float32   the query itself, 4 r bytes
        int8      each number on a scale of its own, r bytes
        bit       signs, eight to a byte; the last byte is filled with zeros where r is no multiple of 8

    `provenance` holds facts about the vectors and the fit, saved beside the numbers.
    """

    mean: Tensor  # (n,)
    weight: Tensor  # (r, n)
    scale: Tensor | None  # (r,)

    def __init__(
        self, in_features: int, rank: int, dtype: CodeType = "float32", device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if dtype not in CODE_TYPES:
            raise InputError(f"Expected a type of code out of {', '.join(CODE_TYPES)} but got {dtype!r}.")
        check_range("`rank`", rank, 1, in_features)
        self.in_features, self.rank = in_features, rank
        self.dtype: CodeType = dtype
        self.register_buffer("mean", torch.zeros(in_features, device=device))
        self.register_buffer("weight", torch.zeros(rank, in_features, device=device))
        self.register_buffer("scale", None if dtype == "float32" else torch.ones(rank, device=device))
        self.provenance: dict[str, Any] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, mean: Tensor, weight: Tensor, dtype: CodeType = "float32", scale: Tensor | None = None) -> Self:
        """An encoder that holds these numbers.

        >>> encoder = CodeEncoder.of(torch.zeros(3), torch.eye(3), "bit", torch.ones(3))
        >>> code = encoder.encode(torch.tensor([[0.5, -2.0, 1.0]]))
        >>> code.tolist(), encoder.decode(code).sign().tolist(), encoder.bytes_per_protein
        ([[5]], [[1.0, -1.0, 1.0]], 1)
        """
        encoder = cls(weight.shape[1], len(weight), dtype, device=weight.device)
        for name, value in {"mean": mean, "weight": weight, "scale": scale}.items():
            if value is not None:
                # laid out as `load` will have it: products of other strides differ in their last bits
                setattr(encoder, name, value.detach().float().clone(memory_format=torch.contiguous_format))
        return encoder

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers: equal digests mean equal codes."""
        numbers = tensor_digest(self.mean, self.weight, self.scale, None)  # the last was for centroids, once
        return hashlib.sha256(f"{self.dtype} {numbers}".encode()).hexdigest()

    @property
    def code_width(self) -> int:
        """Numbers in a code: r, or r / 8 rounded up for bits."""
        return -(-self.rank // 8) if self.dtype == "bit" else self.rank

    @property
    def code_dtype(self) -> torch.dtype:
        """Of these numbers."""
        return {"float32": torch.float32, "int8": torch.int8, "bit": torch.uint8}[self.dtype]

    @property
    def bytes_per_protein(self) -> int:
        """What one code takes."""
        return self.code_width * self.code_dtype.itemsize

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest of a store of codes tells of their encoder."""
        return {"sha256": self.digest, "rank": self.rank, "dtype": self.dtype, "bytes": self.bytes_per_protein}

    def check_origin(self, facts: Mapping[str, Any], what: str) -> None:
        """Raises `InputError` unless fitted to vectors like those that `facts` tell of; `what` is whose they are."""
        check_origin({**self.provenance, "dim": self.in_features}, facts, what, "this encoder was fitted to")

    def forward(self, x: Tensor) -> Tensor:
        """Queries of unit length: `(…, n)` → `(…, r)`."""
        return F.normalize(F.linear(x - self.mean, self.weight), dim=-1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes: `(N, n)` → `(N, code_width)` of `code_dtype`."""
        y = self(x)
        if self.dtype == "bit":
            bits = F.pad((y > 0).to(torch.uint8), (0, -self.rank % 8)).unflatten(-1, (-1, 8))
            return (bits * BIT_WEIGHTS.to(y.device)).sum(-1, dtype=torch.uint8)
        return y if self.scale is None else (y / self.scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """What queries are compared with: `(N, code_width)` → `(N, r)` float32."""
        if self.dtype == "bit":
            bits = (codes[..., None].bitwise_right_shift(torch.arange(8, device=codes.device)) & 1).flatten(-2)
            codes = bits[..., : self.rank].float() * 2 - 1
        return codes.float() if self.scale is None else codes.float() * self.scale

    def truncate(self, rank: int) -> Self:
        """The nested encoder of a lower rank; only float32 and bits have one."""
        check_range("`rank`", rank, 1, self.rank)
        if rank < self.rank and self.dtype == "int8":
            raise InputError(f"Expected an encoder of float32 or bits to cut but got int8; fit it at {rank}.")
        scale = None if self.scale is None else self.scale[:rank]
        small = type(self).of(self.mean, self.weight[:rank], self.dtype, scale)
        small.provenance = {
            key: value[:rank] if key == "eigenvalues" else value for key, value in self.provenance.items()
        }
        return small


def int8_scale(y: Tensor) -> Tensor:
    """What each number of int8 codes is stored in units of, `(r,)`, from queries `(N, r)`."""
    return (y.abs().quantile(SCALE_QUANTILE, dim=0) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
