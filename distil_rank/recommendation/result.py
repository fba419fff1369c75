"""The result of a recommendation; JSON is its serialisation, and docs/recommend.md documents the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distil_rank.lowrank.encoder import CodeType
from distil_rank.measure.statistics import Interval

SCHEMA = 1
BITS = {"float32": 32, "int8": 8, "bit": 1}


@dataclass(frozen=True)
class Pipeline:
    """One way from a sequence to what is stored of it.

    Attributes:
        layer: of the backbone, as the store names it; None where the vectors do not tell.
        metric: of the encoder.
        rank: numbers of each code.
        dtype: of these numbers.
    """

    layer: str | None
    metric: Literal["variance", "whitened", "invariant"]
    rank: int
    dtype: CodeType

    @property
    def bytes(self) -> int:
        """Stored for each protein.

        >>> Pipeline("4", "invariant", 30, "bit").bytes, Pipeline("4", "variance", 30, "float32").bytes
        (4, 120)
        """
        return -(-self.rank * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        return f"{where}{self.metric} {self.rank} x {self.dtype}"


@dataclass(frozen=True)
class Cost:
    """What the backbone takes up to one layer, measured here.

    Attributes:
        layer: the last that is computed.
        share: of the time of the full depth.
        seconds_per_1000: proteins of these lengths.
    """

    layer: str | None
    share: float
    seconds_per_1000: float


@dataclass(frozen=True)
class Outcome:
    """One pipeline on the groups of one split.

    Attributes:
        pipeline: the pipeline.
        bytes: stored for each protein.
        time: share of the full backbone's time; None where it could not be measured.
        scores: by task.
        retained: by task, the score over the full vector's, with its interval.
    """

    pipeline: Pipeline
    bytes: int
    time: float | None
    scores: tuple[float, ...]
    retained: tuple[Interval, ...]

    @property
    def worst(self) -> float:
        """What is retained of the task that suffers most."""
        return min(interval.value for interval in self.retained)

    @property
    def at_least(self) -> float:
        """The lower end of the interval of the task whose lower end is lowest."""
        return min(interval.low for interval in self.retained)

    @property
    def after_margin(self) -> float:
        """As far below the lower end as that is below the estimate, on a logarithmic scale."""
        return min(i.low**2 / i.value if i.low > 0 else i.low for i in self.retained)


@dataclass(frozen=True)
class Baseline:
    """What needs no embedding, on the confirmation groups, first task."""

    name: str
    retained: float


@dataclass(frozen=True)
class Recommendation:
    """What to use, what it costs, what it retains.

    Attributes:
        source: of the vectors.
        tasks: names of the tasks.
        metrics: the score of each task.
        keep: the share to be retained.
        weigh: what was to be cheap.
        verdict: `confirmed`, `not confirmed` (chosen on the validation groups, but the claim is below `keep`) or
            `nothing keeps it` (the pipeline is then the one that retains most).
        chosen: on the validation groups.
        confirmed: the same on the confirmation groups: the claim.
        full: the full vector on the confirmation groups.
        front: pipelines that no other beats in time, bytes and function, on the validation groups.
        outcomes: all pipelines on the validation groups.
        costs: of each layer.
        baselines: on the confirmation groups.
        query_seconds: of one query among all proteins, of the chosen pipeline and of the full vector; None if not
            measured.
        proteins: in each split: fit, validate, confirm.
        groups: in each split.
        grouping: how groups were made, in words.
        noise: what the invariant metric took as noise, in words.
        seconds: of the whole search.
        notes: what a reader must know.
    """

    source: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    keep: float
    weigh: str
    verdict: str
    chosen: Outcome
    confirmed: Outcome
    full: Outcome
    front: tuple[Outcome, ...]
    outcomes: tuple[Outcome, ...]
    costs: tuple[Cost, ...]
    baselines: tuple[Baseline, ...]
    query_seconds: tuple[float, float] | None
    proteins: tuple[int, ...]
    groups: tuple[int, ...]
    grouping: str
    noise: str
    seconds: float
    notes: tuple[str, ...] = ()
