"""A few bytes for each protein: the first directions of some metric, and how their numbers are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.digests import tensor_digest
from distil_rank.lowrank.guard import Guard

CodeType = Literal["float32", "int8", "bit", "pq"]
CODE_TYPES: tuple[CodeType, ...] = get_args(CodeType)
LEVELS = 127  # of int8, symmetric
SCALE_QUANTILE = 0.9999  # of a number's absolute value, which int8 still holds without clipping
CENTROIDS = 256  # of one byte of a product quantiser
ROWS_AT_ONCE = 2048  # of encoding
ORIGIN = ("weights_sha256", "layer", "pooling")  # what vectors must agree in with those that a map was fitted to
BIT_WEIGHTS = 2 ** torch.arange(8, dtype=torch.uint8)


class CodeEncoder(nn.Module):
    """Protein vectors to codes, and back to what a search compares queries with.

        x (n,) ──▶ W (x − μ) ──▶ unit length, the query (r,) ──▶ encode ──▶ code ──▶ decode ──▶ the target (r,)

    A search scores the inner product of a float query with decoded targets (Jégou, Douze and Schmid, TPAMI 2011: the
    query costs nothing to keep exact). Codes by type:

        float32   the query itself, 4 r bytes
        int8      each number on a scale of its own, r bytes
        bit       signs, eight to a byte; the last byte is filled with zeros where r is no multiple of 8
        pq        M bytes, each the number of the nearest of 256 centroids in a block of r / M dimensions

    Args:
        in_features: n, the width of the vectors.
        rank: r.
        dtype: of the code.
        books: M, the bytes of `pq`; r must be a multiple of it.

    Raises:
        InputError: an unknown type, a rank above n, bytes for anything but `pq`, or a rank that they do not divide.
    """

    mean: Tensor  # (n,)
    weight: Tensor  # (r, n)
    scale: Tensor | None  # (r,)
    codebooks: Tensor | None  # (M, 256, r / M)

    def __init__(
        self,
        in_features: int,
        rank: int,
        dtype: CodeType = "float32",
        books: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in CODE_TYPES:
            raise InputError(f"Expected a type of code out of {', '.join(CODE_TYPES)} but got {dtype!r}.")
        if not 1 <= rank <= in_features:
            raise InputError(f"Expected `rank` in [1, {in_features}], the width of the vectors, but got {rank}.")
        if (books is not None) != (dtype == "pq"):
            raise InputError(f"Expected a number of bytes for pq, and for pq only, but got {books} for {dtype}.")
        if books is not None and (not 1 <= books <= rank or rank % books):
            raise InputError(f"Expected bytes that divide the rank {rank} but got {books}.")
        self.dtype: CodeType = dtype
        self.register_buffer("mean", torch.zeros(in_features, device=device))
        self.register_buffer("weight", torch.zeros(rank, in_features, device=device))
        scaled = dtype in ("int8", "bit")
        self.register_buffer("scale", torch.ones(rank, device=device) if scaled else None)
        self.register_buffer("codebooks", None if books is None else torch.zeros(books, CENTROIDS, rank, device=device))
        self.guard: Guard | None = None
        self.provenance: dict[str, Any] = {}

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        mean: Tensor,
        weight: Tensor,
        dtype: CodeType = "float32",
        scale: Tensor | None = None,
        codebooks: Tensor | None = None,
    ) -> Self:
        """A map that holds these numbers.

        >>> encoder = CodeEncoder.of(torch.zeros(3), torch.eye(3), "bit", torch.ones(3))
        >>> code = encoder.encode(torch.tensor([[0.5, -2.0, 1.0]]))
        >>> code.tolist(), encoder.decode(code).sign().tolist(), encoder.bytes_per_protein
        ([[5]], [[1.0, -1.0, 1.0]], 1)
        """
        books = None if codebooks is None else len(codebooks)
        encoder = cls(weight.shape[1], len(weight), dtype, books, device=weight.device)
        for name, value in {"mean": mean, "weight": weight, "scale": scale, "codebooks": codebooks}.items():
            if value is not None:
                setattr(encoder, name, value.detach().float().clone())
        return encoder

    @property
    def in_features(self) -> int:
        """n."""
        return self.weight.shape[1]

    @property
    def rank(self) -> int:
        """r."""
        return self.weight.shape[0]

    @property
    def options(self) -> dict[str, Any]:
        """What the constructor takes."""
        books = None if self.codebooks is None else len(self.codebooks)
        return {"in_features": self.in_features, "rank": self.rank, "dtype": self.dtype, "books": books}

    @property
    def digest(self) -> str:
        """SHA-256 of all numbers: equal digests mean equal codes."""
        numbers = tensor_digest(self.mean, self.weight, self.scale, self.codebooks)
        return hashlib.sha256(f"{self.dtype} {numbers}".encode()).hexdigest()

    @property
    def code_width(self) -> int:
        """Numbers in a code: r, r / 8 rounded up for bits, M for pq."""
        if self.codebooks is not None:
            return len(self.codebooks)
        return -(-self.rank // 8) if self.dtype == "bit" else self.rank

    @property
    def code_dtype(self) -> torch.dtype:
        """Of these numbers."""
        return {"float32": torch.float32, "int8": torch.int8}.get(self.dtype, torch.uint8)

    @property
    def bytes_per_protein(self) -> int:
        """What one code takes."""
        return self.code_width * self.code_dtype.itemsize

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest of a store of codes tells of their map."""
        options = {"rank": self.rank, "dtype": self.dtype, "bytes": self.bytes_per_protein}
        return {"sha256": self.digest, **options}

    def check_origin(self, facts: Mapping[str, Any], what: str) -> None:
        """Raises `InputError` unless the map was fitted to vectors like these.

        Args:
            facts: of the vectors: `dim`, `weights_sha256`, `layer` and `pooling`.
            what: whose they are, for the message.
        """
        if facts.get("dim") != self.in_features:
            raise InputError(
                f"Expected vectors of width {self.in_features} for this code map but {what} has {facts.get('dim')}; "
                "use the map and the store that belong together."
            )
        for key in ORIGIN:
            mine, theirs = self.provenance.get(key), facts.get(key)
            if mine is not None and mine != theirs:
                raise InputError(
                    f"Expected vectors of {_named(key, mine)}, which this code map was fitted to, but {what} has "
                    f"{_named(key, theirs)}; use the map and the store that belong together."
                )

    def forward(self, x: Tensor) -> Tensor:
        """Queries of unit length: `(…, n)` → `(…, r)`."""
        return F.normalize(F.linear(x - self.mean, self.weight), dim=-1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes: `(N, n)` → `(N, code_width)` of `code_dtype`."""
        y = self(x)
        if self.codebooks is not None:
            return torch.cat([_nearest(part, self.codebooks) for part in y.split(ROWS_AT_ONCE)])
        if self.dtype == "bit":
            bits = F.pad((y > 0).to(torch.uint8), (0, -self.rank % 8)).unflatten(-1, (-1, 8))
            return (bits * BIT_WEIGHTS.to(y.device)).sum(-1, dtype=torch.uint8)
        if self.scale is not None:
            return (y / self.scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return y

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """What queries are compared with: `(N, code_width)` → `(N, r)` float32."""
        if self.codebooks is not None:
            books = torch.arange(len(self.codebooks), device=codes.device)
            return self.codebooks[books, codes.long()].flatten(-2)
        if self.dtype == "bit":
            assert self.scale is not None
            bits = (codes[..., None].bitwise_right_shift(torch.arange(8, device=codes.device)) & 1).flatten(-2)
            return (bits[..., : self.rank].float() * 2 - 1) * self.scale
        return codes.float() if self.scale is None else codes.float() * self.scale

    def truncate(self, rank: int) -> Self:
        """The nested map of a lower rank; only float32 and bits have one.

        Raises:
            InputError: the rank is above this map's, or the type of code has none.
        """
        if not 1 <= rank <= self.rank:
            raise InputError(f"Expected `rank` in [1, {self.rank}], this code map's own, but got {rank}.")
        if rank < self.rank and self.dtype not in ("float32", "bit"):
            raise InputError(f"Expected a code map of float32 or bits to cut but got {self.dtype}; fit it at {rank}.")
        scale = None if self.scale is None else self.scale[:rank]
        small = type(self).of(self.mean, self.weight[:rank], self.dtype, scale, self.codebooks)
        small.guard, small.provenance = self.guard, _truncated(self.provenance, rank)
        return small

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, rank={self.rank}, dtype={self.dtype}, bytes={self.bytes_per_protein}"


def int8_scale(y: Tensor) -> Tensor:
    """What each number of int8 codes is stored in units of, `(r,)`, from queries `(N, r)`."""
    return (y.abs().quantile(SCALE_QUANTILE, dim=0) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)


def _named(key: str, value: Any) -> str:
    return f"the weights {str(value)[:12]}…" if key == "weights_sha256" else f"{key} {value}"


def _truncated(provenance: Mapping[str, Any], rank: int) -> dict[str, Any]:
    return {key: value[:rank] if key == "eigenvalues" else value for key, value in provenance.items()}


def _nearest(y: Tensor, codebooks: Tensor) -> Tensor:
    """The nearest centroid in each block, `(N, r)` → `(N, M)` uint8."""
    parts = y.unflatten(-1, (len(codebooks), -1)).transpose(0, 1)  # (M, N, r / M)
    # ‖y − c‖² but for ‖y‖², halved
    cost = codebooks.square().sum(-1)[:, None] / 2 - parts @ codebooks.transpose(1, 2)  # (M, N, 256)
    return cost.argmin(-1).T.to(torch.uint8)
