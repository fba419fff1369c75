"""The student: a linear layer held as two thin factors."""

import hashlib
from numbers import Integral
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import check_range
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors, Solver, choose_rank, nested_r2, output_spectrum, solve


class LowRankLinear(nn.Module):
    """`y = B (A x) + c`, a drop-in for `nn.Linear`.

          x (…, n) ──▶ A (r, n) ──▶ (…, r) ──▶ B (m, r) ──▶ + c (m,) ──▶ y (…, m)

    Args:
        rank: r in [1, min(m, n)].
        bias: whether there is a `c`.
        input_mean: whether to keep the mean of the calibration data, `(n,)`. It takes no part in the forward pass;
            `truncate` folds the mean of what it drops into the bias.

    Attributes:
        provenance: where the factors come from, in plain JSON values; saved with the layer.
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    input_mean: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        input_mean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_range("`rank`", rank, 1, min(in_features, out_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        like = torch.empty(0, device=device, dtype=dtype)
        self.A = nn.Parameter(like.new_empty(rank, in_features))
        self.B = nn.Parameter(like.new_empty(out_features, rank))
        self.register_parameter("bias", nn.Parameter(like.new_empty(out_features)) if bias else None)
        self.register_buffer("input_mean", like.new_zeros(in_features) if input_mean else None)
        self.provenance: dict[str, Any] = {}
        for factor in (self.A, self.B):  # as `nn.Linear` draws its weight
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_factors(
        cls, factors: Factors, input_mean: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """A layer that holds these factors."""
        A, B, c = factors
        layer = cls(A.shape[1], B.shape[0], A.shape[0], True, input_mean is not None, device=A.device, dtype=dtype)
        state = {"A": A, "B": B, "bias": c} | ({} if input_mean is None else {"input_mean": input_mean})
        layer.load_state_dict(state)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | float | str,
        moments: Moments | None = None,
        solver: Solver = "closed_form",
    ) -> Self:
        """The best rank-r replacement of a dense layer for inputs with these moments, without training.

        Args:
            linear: the teacher, with or without bias, in any floating dtype (the result has the same).
            rank: an integer, a share of the output's variance in (0, 1), or `"auto"` (see `choose_rank`).
            moments: of the layer's inputs, `Moments.of(x)`. Without them only `solver="svd"` can be had.
            solver: see `distil_rank.lowrank.solvers`.

        Raises:
            InputError: the rank or the moments do not fit the layer.

        >>> linear, x = nn.Linear(8, 6), torch.randn(100, 8)
        >>> student = LowRankLinear.from_linear(linear, 6, Moments.of(x))
        >>> torch.allclose(student(x), linear(x), atol=1e-5)
        True
        """
        if isinstance(rank, bool) or not isinstance(rank, Integral):
            energy = torch.linalg.svdvals(linear.weight.detach().double()) ** 2
            rank = choose_rank(energy if moments is None else output_spectrum(linear.weight, moments)[0], rank)
        factors = solve(linear.weight, linear.bias, int(rank), solver, moments)
        mean = None if moments is None else moments.mean
        if mean is not None:  # A and B as the dtype holds them; what that changes on average goes into the bias
            mean = mean.to(factors.A)
            A, B = (factor.to(linear.weight.dtype).to(factors.A) for factor in factors[:2])
            factors = Factors(A, B, factors.c + factors.B @ (factors.A @ mean) - B @ (A @ mean))
        layer = cls.from_factors(factors, mean, dtype=linear.weight.dtype)
        layer.provenance = {"solver": solver, "teacher_sha256": tensor_digest(linear.weight, linear.bias)}
        if moments is not None:
            assert layer.bias is not None
            stored = Factors(layer.A, layer.B, layer.bias)
            curve = nested_r2(linear.weight, linear.bias, stored, moments, layer.input_mean)
            layer.provenance |= {
                "moments_sha256": tensor_digest(moments.mean, moments.covariance),
                "rows": moments.rows,
                "r2": curve.tolist(),
            }
        return layer

    def extra_repr(self) -> str:
        """What `print` shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{shape}, bias={self.bias is not None}"

    @property
    def shape(self) -> dict[str, Any]:
        """What builds an empty one."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.bias is not None, "input_mean": self.input_mean is not None}

    @property
    def weight(self) -> Tensor:
        """`B A`, for code that asks a linear layer for its dense weight, as `nn.TransformerEncoderLayer` does."""
        return self.B @ self.A

    def forward(self, input: Tensor) -> Tensor:  # the name that `nn.Linear` has for it
        """`(…, n)` → `(…, m)`."""
        return F.linear(F.linear(input, self.A), self.B, self.bias)

    def truncate(self, rank: int) -> Self:
        """The nested student of a lower rank: the first columns of B and rows of A.

        Where the input mean is known, what the dropped directions give on average moves into the bias, so a closed-form
        student of rank r truncated to k is exactly the closed form of rank k.

        Raises:
            InputError: the rank is above this layer's.
        """
        check_range("`rank`", rank, 1, self.rank)
        bias: Tensor | None = self.bias
        if bias is not None and self.input_mean is not None:
            bias = bias + self.B[:, rank:] @ (self.A[rank:] @ self.input_mean)
        layer = type(self)(**{**self.shape, "rank": rank}, device=self.A.device, dtype=self.A.dtype)
        state = {"A": self.A[:rank], "B": self.B[:, :rank], "bias": bias, "input_mean": self.input_mean}
        layer.load_state_dict({name: value for name, value in state.items() if value is not None})
        curves = ("r2", "r2_held_out")  # one value a direction
        layer.provenance = {key: value[:rank] if key in curves else value for key, value in self.provenance.items()}
        return layer

    def to_linear(self) -> nn.Linear:
        """The same map as one dense layer, `W' = B A`, for those who cannot change the architecture."""
        shape = self.in_features, self.out_features, self.bias is not None
        dense = nn.Linear(*shape, device=self.A.device, dtype=self.A.dtype)
        weight = self.B.double() @ self.A.double()
        dense.load_state_dict({"weight": weight} | ({} if self.bias is None else {"bias": self.bias}))
        return dense


def parameter_count(in_features: int, out_features: int, rank: int | None = None, bias: bool = True) -> int:
    """Parameters of a dense layer, or of its rank-r student.

    >>> parameter_count(1280, 1280), parameter_count(1280, 1280, rank=64)
    (1639680, 165120)
    """
    weights = in_features * out_features if rank is None else rank * (in_features + out_features)
    return weights + bias * out_features


def break_even_rank(in_features: int, out_features: int) -> float:
    """The rank `mn / (m + n)` from which two factors hold no fewer weights than the dense layer.

    >>> break_even_rank(1280, 1280)
    640.0
    """
    return in_features * out_features / (in_features + out_features)


def tensor_digest(*tensors: Tensor | None) -> str:
    """SHA-256 of tensors, with their shapes and dtypes.

    >>> tensor_digest(torch.zeros(2)) == tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(1, 2))
    True
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
