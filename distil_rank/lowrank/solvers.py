"""Rank-r affine students of an affine teacher, solved without training. Tensors in, tensors out.

Every solver returns `Factors` of `y = B (A x) + c` for a teacher `y = W x + b` with `W` of shape `(m, n)`:

    svd          the best B A for ‖W − B A‖ (Eckart-Young-Mirsky); knows nothing of the data; c = b
    svd_bias     the same, with c refitted to the mean of the data
    whitened_svd the best B A for E‖(W − B A) x‖², uncentred, as SVD-LLM and DRONE have it; c = b
    closed_form  the best B A *and* c for E‖W x + b − (B A x + c)‖²: centred reduced-rank regression

All of them are nested: the first k columns of B and rows of A are the same solver's answer for rank k.

`noise_directions` answers the same question where errors are weighed by the noise that they are seen against. With the
outputs `y` of covariance `S` and a noise covariance `N` of these outputs, the error of a student is measured in units
of the noise, `E (y − ŷ)ᵀ N⁻¹ (y − ŷ)`. In the coordinates `N^-½ y` that is the squared error, so its best rank-r answer
is known (Eckart and Young 1936; Izenman 1975): with the generalised eigenvectors

    S v = λ N v,   vᵀ N v = 1,   λ₁ ≥ λ₂ ≥ …,

project on the first r of them and come back by their duals, `ŷ = μ + N V Vᵀ (y − μ)`. The lost error is the sum of the
dropped λ. These are the directions of linear discriminant analysis when N is a covariance within classes (Fisher 1936;
Rao 1948), of a minimum noise fraction transform when it is one of noise (Green et al. 1988), and principal components
when N is the identity. They are nested too.
"""

from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from distil_rank.errors import InputError, check_range
from distil_rank.lowrank.moments import Moments

Solver = Literal["svd", "svd_bias", "whitened_svd", "closed_form"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


class Factors(NamedTuple):
    """A rank-r affine map `y = B (A x) + c`."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    c: Tensor  # (m,)


class Directions(NamedTuple):
    """Generalised eigenvectors of an output covariance S against a noise covariance N, best first.

    Attributes:
        values: λ, `(d,)`: signal over noise along each direction.
        V: `(d, d)`: the code of an output is `Vᵀ (y − μ)`; its noise has unit variance, its signal variance λ.
    """

    values: Tensor
    V: Tensor


def solve(
    weight: Tensor,
    bias: Tensor | None,
    rank: int,
    solver: Solver = "closed_form",
    moments: Moments | None = None,
    spectrum: tuple[Tensor, Tensor] | None = None,
) -> Factors:
    """Rank-r factors of a dense layer, in float64.

    Args:
        weight: `W`, `(m, n)`.
        bias: `b`, `(m,)`, or None for zeros.
        rank: r in [1, min(m, n)].
        solver: one of `SOLVERS`.
        moments: of the layer's inputs; every solver but `svd` needs them.
        spectrum: `output_spectrum(weight, moments)`, if it is at hand; saves the closed form its eigendecomposition.

    Raises:
        InputError: the rank is out of range, or moments are missing or of another width.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> A, B, c = solve(W, None, 2, "svd")
    >>> torch.allclose(B @ A, torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)))
    True
    """
    check_range("`rank`", rank, 1, min(weight.shape))
    if solver not in SOLVERS:
        raise InputError(f"Expected a solver out of {', '.join(SOLVERS)} but got {solver!r}.")
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight)
    if solver in ("svd", "svd_bias"):  # singular values shared evenly: neither factor dwarfs the other in training
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = S[:rank].sqrt()
        factors = Factors(root[:, None] * Vh[:rank], U[:, :rank] * root, bias)
    if solver == "svd":
        return factors
    if moments is None:
        raise InputError(f"Expected moments of the layer's inputs for the solver {solver!r} but got none.")
    if len(moments.mean) != weight.shape[1]:
        raise InputError(
            f"Expected inputs of width {weight.shape[1]} for a {tuple(weight.shape)} layer but got {len(moments.mean)}."
        )
    if solver == "whitened_svd":
        second_moment = Moments(
            moments.mean, moments.covariance + torch.outer(moments.mean, moments.mean), moments.rows
        )
        Q = output_spectrum(weight, second_moment)[1][:, :rank]
        return Factors(Q.T @ weight, Q, bias)
    if solver == "closed_form":
        Q = (spectrum or output_spectrum(weight, moments))[1][:, :rank]
        factors = Factors(Q.T @ weight, Q, bias)
    return refit_bias(factors, weight, bias, moments.mean)


def refit_bias(factors: Factors, weight: Tensor, bias: Tensor | None, mean: Tensor) -> Factors:
    """The same A and B with the best c for inputs of this mean, `b + (W − B A) mean`."""
    A, B, _ = factors
    weight, mean = weight.detach().to(A), mean.to(A)
    c = weight @ mean - B @ (A @ mean)
    return Factors(A, B, c if bias is None else c + bias.detach().to(A))


def output_spectrum(weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Principal components of the layer's output: eigenpairs of `W C Wᵀ`, largest first.

    The eigenvalues dropped by the rank-r closed form add up to its exact mean squared error over the rows behind
    `moments`; the eigenvectors are its `B`. Works on the smaller of the two Gram sides: `W C Wᵀ` is `(m, m)`, and
    `C^½ Wᵀ W C^½`, with the same non-zero eigenvalues, is `(n, n)`.

    Returns:
        Eigenvalues `(k,)` and orthonormal eigenvectors `(m, k)`, `k = min(m, n)`, float64.
    """
    weight = weight.detach().double()
    covariance = moments.covariance.to(weight)
    m, n = weight.shape
    if m <= n:
        values, Q = torch.linalg.eigh(weight @ covariance @ weight.T)
        return values.flip(0).clamp_min(0), Q.flip(1)
    variances, V = torch.linalg.eigh(covariance)
    root = weight @ (V * variances.clamp_min(0).sqrt())  # (m, n): root @ root.T is W C Wᵀ
    values, P = torch.linalg.eigh(root.T @ root)
    # QR instead of dividing by √value: directions without any energy still come out orthonormal.
    Q, R = torch.linalg.qr(root @ P.flip(1))
    return values.flip(0).clamp_min(0), Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def noise_directions(S: Tensor, N: Tensor, regularisation: float = 0.0) -> Directions:
    """All generalised eigenvectors of `S v = λ N v`, in float64, for covariances `(d, d)`.

    N becomes `N + ε (tr N / d) I`, with ε the regularisation, as for a covariance from few rows.

    >>> S, N = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 9.0]))
    >>> values, V = noise_directions(S, N)
    >>> values.tolist(), V.abs().round(decimals=4).tolist()
    ([4.0, 1.0], [[1.0, 0.0], [0.0, 0.3333]])
    """
    S, N = S.double(), N.double()
    scale = N.diagonal().mean()
    if not scale > 0:
        raise InputError("Expected noise that varies but all its differences are zero; give pairs that differ.")
    N = N / scale + regularisation * torch.eye(len(N), dtype=N.dtype, device=N.device)
    variances, Q = torch.linalg.eigh((N + N.T) / 2)
    if not variances[0] > variances[-1] * len(N) * torch.finfo(N.dtype).eps:
        raise InputError(
            f"Expected noise in all {len(N)} dimensions but its covariance is singular: fewer pairs than dimensions, "
            "or a dimension that never changes; give more pairs, or a regularisation above 0."
        )
    root = Q * (variances * scale).rsqrt()  # rootᵀ N root = I
    values, U = torch.linalg.eigh(root.T @ ((S + S.T) / 2) @ root)
    return Directions(values.flip(0).clamp_min(0), root @ U.flip(1))


def r2_curve(eigenvalues: Tensor) -> Tensor:
    """Share of the output's variance that the closed form keeps at rank 1, 2, …: `(k,)`, rising to 1.

    >>> r2_curve(torch.tensor([6.0, 3.0, 1.0])).tolist()
    [0.6, 0.9, 1.0]
    """
    eigenvalues = eigenvalues.double()
    total = eigenvalues.sum()
    if total <= 0:
        return torch.ones_like(eigenvalues)
    return (eigenvalues.cumsum(0) / total).clamp_max(1)


@torch.no_grad()
def nested_r2(
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    moments: Moments,
    folded_mean: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """R² of the first k directions of a student, for every k, over rows with these moments.

    Teacher and student are affine, so their mean squared difference is a quadratic form in the first two moments: no
    row is looked at again. With held-out moments this is the held-out R².

    Args:
        weight: `W` of the teacher, `(m, n)`.
        bias: `b`, `(m,)`, or None for zeros.
        factors: of any rank-r student, trained or not.
        moments: of the inputs.
        folded_mean: `(n,)`, the input mean whose image under the dropped directions goes into the bias; None where the
            bias stays the same at every rank.
        centre: `(n,)`, the inputs' training mean; its image under the teacher is what R² compares with. By default the
            mean of `moments`.

    Returns:
        `(r,)` float64, at rank 1, 2, …, r.

    >>> W, x = torch.randn(6, 8), torch.randn(400, 8)
    >>> moments = Moments.of(x)
    >>> curve = nested_r2(W, None, solve(W, None, 3, "closed_form", moments), moments, folded_mean=moments.mean)
    >>> torch.allclose(curve, r2_curve(output_spectrum(W, moments)[0])[:3])
    True
    """
    W, (A, B, c) = weight.double(), (factor.double() for factor in factors)
    mean, covariance = moments.mean.to(W), moments.covariance.to(W)
    folded = torch.zeros_like(mean) if folded_mean is None else folded_mean.to(W)

    AC = A @ covariance  # (r, n)
    variance = ((W @ covariance) * W).sum()
    shared = ((AC @ W.T) * B.T).sum(1).cumsum(0)  # E⟨W x, B_k A_k x⟩ about the mean
    own = ((B.T @ B) * (AC @ A.T)).cumsum(0).cumsum(1).diagonal()  # E‖B_k A_k x‖² about the mean
    whole = W @ mean - c - B @ (A @ folded) + (0 if bias is None else bias.double())
    offset = whole[:, None] - (B * (A @ (mean - folded))).cumsum(1)  # (m, r), the mean error
    residual = (variance - 2 * shared + own).clamp_min(0) + offset.square().sum(0)
    total = variance if centre is None else variance + (W @ (mean - centre.to(W))).square().sum()
    if total > 0 or total.isnan():
        return 1 - residual / total
    rounding = 1e-24 * (W @ mean).square().sum()  # inputs that never vary leave no more than this of a perfect student
    return torch.where(residual > rounding, -torch.inf, 1.0)


def choose_rank(eigenvalues: Tensor, rank: int | float | str) -> int:
    """Turn what the user asked for into a rank.

    Args:
        eigenvalues: of the teacher's output on the training rows, largest first, `(k,)`.
        rank: an integer is taken as it is; a float in (0, 1) is the share of output variance to keep, by the fewest
            directions; `"auto"` is the knee of the curve R²(r): the r at which it stands highest above the straight
            line from (0, 0) to (k', 1), where k' counts the directions with any energy. Past the knee a further rank
            buys less than the average one.

    Raises:
        InputError: anything else, or an integer out of [1, k].

    >>> values = torch.tensor([6.0, 3.0, 0.9, 0.1])
    >>> choose_rank(values, 3), choose_rank(values, 0.9), choose_rank(values, "auto")
    (3, 2, 2)
    """
    k = len(eigenvalues)
    what = "an integer rank, a share of variance in (0, 1), or 'auto'"
    if rank == "auto":
        curve = r2_curve(eigenvalues)
        alive = max(int((eigenvalues > eigenvalues[0] * 1e-12).sum()), 1)
        chord = torch.arange(1, k + 1, dtype=curve.dtype) / alive
        return int((curve.cpu() - chord)[:alive].argmax()) + 1
    if isinstance(rank, bool) or not isinstance(rank, Real):
        raise InputError(f"Expected {what} but got {rank!r}.")
    if not isinstance(rank, Integral) and (rank <= 1 or not float(rank).is_integer()):
        if not 0 < rank < 1:
            raise InputError(f"Expected {what} but got {rank}.")
        return min(int((r2_curve(eigenvalues) < rank).sum()) + 1, k)
    check_range("`rank`", int(rank), 1, k)
    return int(rank)
