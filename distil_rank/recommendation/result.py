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
    """One way from a sequence to what is stored of it."""

    layer: str | None  # of the backbone, as the store names it; None where the vectors do not tell
    metric: Literal["variance", "whitened", "invariant"]
    rank: int  # numbers of each code
    dtype: CodeType  # of these numbers

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
    """What the backbone takes up to one layer, measured here."""

    layer: str | None
    share: float  # of the time of the full depth
    seconds_per_1000: float  # proteins of these lengths


@dataclass(frozen=True)
class Outcome:
    """One pipeline on the groups of one split."""

    pipeline: Pipeline
    bytes: int  # stored for each protein
    time: float | None  # share of the full backbone's; None where it could not be measured
    scores: tuple[float, ...]  # by task
    retained: tuple[Interval, ...]  # by task, the score over the full vector's

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
    """What to use, what it costs, what it retains."""

    source: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    keep: float
    weigh: str
    verdict: str  # confirmed, not confirmed, or nothing keeps it: the pipeline is then the one that retains most
    chosen: Outcome  # on the validation groups
    confirmed: Outcome  # the same on the confirmation groups: the claim
    full: Outcome  # the full vector on the confirmation groups
    front: tuple[Outcome, ...]  # pipelines that no other beats in time, bytes and function, on the validation groups
    outcomes: tuple[Outcome, ...]  # all pipelines on the validation groups
    costs: tuple[Cost, ...]
    baselines: tuple[Baseline, ...]  # on the confirmation groups
    query_seconds: tuple[float, float] | None  # chosen pipeline and full vector; None if not measured
    proteins: tuple[int, ...]  # in each split: fit, validate, confirm
    groups: tuple[int, ...]  # in each split
    grouping: str
    noise: str
    seconds: float
    notes: tuple[str, ...] = ()
