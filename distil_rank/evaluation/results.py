"""The result of an experiment: `training` fills it, `report` and `figures` render it, `commands` log it.

JSON is its serialisation, in both directions; `docs/report.md` documents the keys, which are the names of the fields
here. `SCHEMA` rises when a key changes its meaning or goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from distil_rank.data.split import DataDescription
from distil_rank.errors import InputError
from distil_rank.measure.latency import LayerLatency, machine

SCHEMA = 2
RECIPE = "original recipe"
OURS = "Distil-Rank"
METHOD_NOTE = (
    "Intervals are 95 % percentile intervals of a paired bootstrap over held-out proteins (2000 resamples, the same "
    "for every method). R² and centred cosine are taken about the teacher's mean output on the training rows. kNN@10: "
    "share of the ten nearest neighbours (Euclidean) among the held-out rows that stay. 'optimum' is R² over the "
    "closed form's; ≈ marks a tie with it: the interval of the paired difference holds zero."
)


def _null_is_nan(value: Any) -> Any:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_null_is_nan)]  # JSON has no NaN and no infinity: they are written as null


@dataclass(frozen=True)
class Estimate:
    """A held-out figure with its 95 % interval over proteins, and its standard deviation over seeds if several."""

    value: Number
    low: float | None = None
    high: float | None = None
    std: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval; the value itself where there is none."""
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)


@dataclass(frozen=True)
class FunctionRetained:
    """What a replacement keeps of the teacher's score on a labelled task.

    Attributes:
        task: the task and its labels, in words.
        metric: the task's score.
        retained: the replacement's score over the teacher's, with its 95 % interval.
    """

    task: str
    metric: str
    retained: Estimate


@dataclass(frozen=True)
class ComparisonRow:
    """One replacement of the teacher on the held-out rows.

    Attributes:
        method: its name.
        parameters: stored numbers of the replacement.
        metrics: by name: `r2`, `centred_cosine`, `knn_overlap`, `cosine`, `cosine_p5`, `relative_mse`, `cka`, and
            with labels `probe_accuracy` and `probe_agreement`.
        share_of_optimum: R² over the closed form's on the same rows.
        ties_with_optimum: whether the paired interval of the difference in R² to the closed form holds zero.
        seeds: number of trained students that the row averages; 0 for a solver.
        seconds: wall time to make one.
        function_retained: on a labelled task, where there is one.
    """

    method: str
    parameters: int
    metrics: dict[str, Estimate]
    share_of_optimum: Number
    ties_with_optimum: bool
    seeds: int = 0
    seconds: float | None = None
    function_retained: FunctionRetained | None = None


@dataclass
class Curve:
    """A student on the validation rows while it trained: `1 − R²` and the loss at each step, the warm start first."""

    step: list[int] = field(default_factory=list)
    val_residual: list[Number] = field(default_factory=list)
    val_loss: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the weight, and standard deviations of the output's principal components; both over the
    largest."""

    singular_values: list[float]
    output_std: list[float]


@dataclass(frozen=True)
class ParetoPoint:
    """The closed form at one rank: predicted from the training rows, and measured on the held-out ones."""

    rank: int
    predicted_r2: float
    r2: Number
    r2_low: Number
    r2_high: Number
    knn_overlap: Number
    parameters: int


@dataclass(frozen=True)
class ParameterCounts:
    """Of the dense layer and of its replacement; below `break_even_rank` the replacement is the smaller one."""

    dense: int
    student: int
    ratio: float
    break_even_rank: float


@dataclass(frozen=True)
class TeacherCheck:
    """Whether a layer is worth distilling.

    Attributes:
        effective_rank: of the teacher's output on the training rows (Roy and Vetterli, 2007).
        denoising_r2: R² of the teacher against the clean input on held-out rows; None unless it is a denoiser. At or
            below 0 it does worse than predicting the mean protein.
        noise_to_std: the noise over the median standard deviation of a dimension; None unless it is a denoiser.
        warning: one line that names the remedy, or None.
    """

    effective_rank: Number
    denoising_r2: float | None = None
    noise_to_std: float | None = None
    warning: str | None = None


@dataclass(frozen=True)
class TeacherResult:
    """One distilled layer.

    Attributes:
        teacher: its name.
        check: whether it was worth it.
        rank: of the students.
        rank_requested: a number, a share of the variance, or `auto`.
        rank_note: why the predicted R² may not hold on other rows; empty if nothing speaks against it.
        shape: `(outputs, inputs)`.
        parameters: how many.
        predicted_r2: the closed form's, from the training rows.
        held_out_r2: the closed form's, on the held-out rows.
        held_out_note: where only some of the held-out rows were measured.
        comparison: one row per method.
        latency: one row per batch size.
        spectrum: of the weight and of its output.
        curves: of the first seed, by method.
        training_note: what training gained.
        validation_optimum: the closed form's `1 − R²` on the validation rows.
        pareto: the closed form at many ranks.
        run_id: MLflow's.
    """

    teacher: str
    check: TeacherCheck
    rank: int
    rank_requested: int | float | str
    rank_note: str
    shape: tuple[int, int]
    parameters: ParameterCounts
    predicted_r2: float
    held_out_r2: Number
    held_out_note: str | None
    comparison: list[ComparisonRow]
    latency: list[LayerLatency]
    spectrum: Spectrum
    curves: dict[str, Curve]
    training_note: str
    validation_optimum: Number
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


_JSON = TypeAdapter(Result)


def load_json(path: Path) -> Result:
    """Read a result that a report wrote.

    Raises:
        InputError: no such file, not such a result, or one of another schema.
    """
    try:
        result = _JSON.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise InputError(f"Expected a result of distil, benchmark or sweep in {path} but got: {reason}") from error
    if result.schema != SCHEMA:
        raise InputError(f"Expected schema {SCHEMA} in {path} but got {result.schema}; measure again.")
    return result
