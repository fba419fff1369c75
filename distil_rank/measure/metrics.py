"""How much of a teacher's function a student retains.

Functions of outputs `(N, m)`: rows are proteins (or residues). `mean (m,)` is always the mean of the teacher's outputs
over the *training* rows. Figures of rows are `(N,)` float64. The headline is what a constant cannot win: R², the
centred cosine, the neighbours retained. Raw cosine is here to be compared.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

T = TypeVar("T", float, Tensor)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of each row of the student with the teacher's, ``s·t / (‖s‖ ‖t‖)``; 0 where either is zero.

    >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    _same_shape(student, teacher)
    return F.cosine_similarity(student.double(), teacher.double(), dim=-1, eps=torch.finfo(torch.float64).tiny)


def centred_cosine(student: Tensor, teacher: Tensor, mean: Tensor) -> Tensor:
    """Cosine of each row after `mean` is taken from both, so that a constant scores 0.

    >>> mean = torch.tensor([9.0, 9.0])
    >>> centred_cosine(torch.tensor([[9.0, 8.0]]), torch.tensor([[9.0, 10.0]]), mean)
    tensor([-1.], dtype=torch.float64)
    """
    return cosine(student.double() - mean, teacher.double() - mean)


def residual(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each row, ``‖s − t‖²``; what relative MSE and R² sum up.

    >>> residual(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.], dtype=torch.float64)
    """
    _same_shape(student, teacher)
    return (student.double() - teacher).square().sum(-1)


def energy(teacher: Tensor, mean: Tensor | None = None) -> Tensor:
    """Squared length of each row, ``‖t‖²`` or ``‖t − mean‖²``.

    >>> energy(torch.tensor([[3.0, 4.0]])), energy(torch.tensor([[3.0, 4.0]]), mean=torch.tensor([3.0, 3.0]))
    (tensor([25.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    return (teacher.double() if mean is None else teacher.double() - mean).square().sum(-1)


def r2(student: Tensor, teacher: Tensor, mean: Tensor) -> float:
    """Share of the teacher's variance retained, ``1 − Σ ‖s − t‖² / Σ ‖t − mean‖²``: 1 is perfect, 0 as good as `mean`.

    >>> teacher = torch.tensor([[1.0], [3.0]])
    >>> r2(torch.tensor([[1.0], [2.0]]), teacher, mean=torch.tensor([2.0]))
    0.5
    """
    return (1 - residual(student, teacher).sum() / energy(teacher, mean).sum()).item()


def knn_overlap(student: Tensor, teacher: Tensor, k: int = 10, chunk: int = 1024) -> Tensor:
    """Share of each row's k nearest neighbours among the teacher's outputs that are among the student's too.

    ``|kNN_s(i) ∩ kNN_t(i)| / k`` with Euclidean distance, a row not being its own neighbour. Distances do not change
    when a constant is added, so the overlap measures directions, not the bias. With N rows k is cut to N − 1; chance
    is k / (N − 1). Memory grows with `chunk` x N.

    >>> teacher = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> knn_overlap(-teacher, teacher, k=1)
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    >>> knn_overlap(torch.tensor([[0.0], [1.0], [9.0], [8.0]]), teacher, k=1)
    tensor([1., 1., 0., 1.], dtype=torch.float64)
    """
    _same_shape(student, teacher)
    rows = len(teacher)
    if rows < 2 or k < 1:
        raise ValueError(f"Expected at least 2 rows and 1 neighbour but got {rows} rows and k={k}.")
    k = min(k, rows - 1)
    # Without the large mean that all rows share, float32 has digits enough, at half the time
    student, teacher = ((x.double() - x.double().mean(0)).float() for x in (student, teacher))
    blocks = []
    for start in range(0, rows, chunk):
        near = []
        for outputs in (student, teacher):
            # Squared distance less a constant of each row, (chunk, N)
            distance = outputs.square().sum(1) - 2 * outputs[start : start + chunk] @ outputs.T
            distance.diagonal(offset=start).fill_(torch.inf)
            near.append(distance.topk(k, largest=False).indices)
        blocks.append((near[0][:, :, None] == near[1][:, None]).any(2).double().mean(1))
    return torch.cat(blocks)


def effective_rank(eigenvalues: Tensor) -> float:
    """Exponential of the entropy of a covariance's normalised spectrum, ``exp(−Σ p log p)`` (Roy and Vetterli 2007).

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    spectrum = eigenvalues.double().clamp(min=0)
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp().item()


class Fidelity(Metric):
    """Cosine, centred cosine, relative MSE and R² of a student over batches and processes, in float64.

    >>> fidelity = Fidelity(mean=torch.tensor([2.0]))
    >>> fidelity.update(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
    >>> fidelity.update(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    >>> {name: round(value.item(), 2) for name, value in fidelity.compute().items()}
    {'cosine': 1.0, 'centred_cosine': 0.5, 'relative_mse': 0.1, 'r2': 0.5}
    """

    full_state_update = False
    mean: Tensor
    sums: Tensor  # rows, cosine, centred cosine, residual, energy, variance

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().double(), persistent=False)
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add the rows of a batch."""
        s, t = student.detach(), teacher.detach()
        cosines = cosine(s, t), centred_cosine(s, t, self.mean)
        figures = torch.stack([torch.ones_like(cosines[0]), *cosines, residual(s, t), energy(t), energy(t, self.mean)])
        self.sums += figures.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """The means over all rows so far, as float64 scalars."""
        rows, plain, centred, lost, total, variance = self.sums
        return {
            "cosine": plain / rows,
            "centred_cosine": centred / rows,
            "relative_mse": lost / total,
            "r2": 1 - lost / variance,
        }


def lost(shares: Mapping[str, T]) -> dict[str, T]:
    """R² and cosines as what is missing to 1, which charts can show where the shares are near it.

    >>> lost({"r2": 0.75, "relative_mse": 0.25})
    {'one_minus_r2': 0.25, 'relative_mse': 0.25}
    """
    near_one = ("r2", "cosine", "centred_cosine")
    named = {name: (f"one_minus_{name}", 1 - share) for name, share in shares.items() if name in near_one}
    return dict(named.get(item[0], item) for item in shares.items())


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:  # broadcasting would give a number, and a wrong one
        raise ValueError(f"Expected outputs of one shape but got {tuple(student.shape)} and {tuple(teacher.shape)}.")
