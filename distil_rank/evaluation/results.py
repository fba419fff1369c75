"""The result of an experiment: `training` fills it, `report` renders it, `commands` log it.

JSON is its serialisation; docs/report.md documents the keys, which are the names of the fields here. `SCHEMA` rises
when a key changes its meaning or goes.
"""

from dataclasses import dataclass, field

from distil_rank.data.split import DataDescription
from distil_rank.measure.latency import LayerLatency, machine
from distil_rank.measure.statistics import Interval

SCHEMA = 2
RECIPE = "original recipe"
OURS = "Distil-Rank"
METHOD_NOTE = (
    "Intervals are 95 % percentile intervals of a paired bootstrap over held-out proteins (2000 resamples, the same "
    "for every method). R² and centred cosine are taken about the teacher's mean output on the training rows. kNN@10: "
    "share of the ten nearest neighbours (Euclidean) among the held-out rows that stay. 'optimum' is R² over the "
    "closed form's; ≈ marks a tie with it: the interval of the paired difference holds zero."
)


@dataclass(frozen=True)
class ComparisonRow:
    """One replacement of the teacher on the held-out rows."""

    method: str
    parameters: int
    metrics: dict[str, Interval]  # with 95 % intervals over proteins
    share_of_optimum: float
    ties_with_optimum: bool
    seeds: int = 0
    seconds: float | None = None


@dataclass
class Curve:
    """A student on the validation rows while it trained: `1 − R²` and the loss at each step, the warm start first."""

    step: list[int] = field(default_factory=list)
    val_residual: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the weight, and standard deviations of the output's principal components, over the largest."""

    singular_values: list[float]
    output_std: list[float]


@dataclass(frozen=True)
class ParetoPoint:
    """The closed form at one rank: predicted from the training rows, and measured on the held-out ones."""

    rank: int
    predicted_r2: float
    r2: float
    r2_low: float
    r2_high: float
    knn_overlap: float
    parameters: int


@dataclass(frozen=True)
class TeacherCheck:
    """Whether a layer is worth distilling; the denoising figures are None unless it is a denoiser."""

    effective_rank: float
    denoising_r2: float | None = None
    noise_to_std: float | None = None
    warning: str | None = None


@dataclass(frozen=True)
class TeacherResult:
    """One distilled layer: its students in the comparison, its latency, curves and Pareto points."""

    teacher: str
    check: TeacherCheck
    rank: int
    rank_requested: int | float | str
    rank_note: str
    shape: tuple[int, int]
    parameters: dict[str, float]  # dense, student, ratio, and the break_even_rank below which the student is smaller
    predicted_r2: float
    held_out_r2: float
    held_out_note: str | None
    comparison: list[ComparisonRow]
    latency: list[LayerLatency]
    spectrum: Spectrum
    curves: dict[str, Curve]
    training_note: str
    validation_optimum: float
    pareto: list[ParetoPoint]
    run_id: str | None = None

    def row(self, method: str) -> ComparisonRow:
        """The comparison's row of one method."""
        return next(row for row in self.comparison if row.method == method)

    def speed_up(self, batch: int = 32) -> float | None:
        """How many times faster than the dense layer the student is at a batch size, if that was timed."""
        return next((row.ratio for row in self.latency if row.batch == batch), None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `distil`, `benchmark` and `sweep` return and write."""

    schema: int = SCHEMA
    data: DataDescription
    teachers: list[TeacherResult]
    method_note: str = METHOD_NOTE
    seconds: float
    machine: str = field(default_factory=machine)
