"""Compare pipelines on validation groups, choose the cheapest that retains enough, confirm it on untouched groups.

The result is a `Recommendation`; JSON is its serialisation, and docs/recommend.md documents the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import RetrievalTrial, Trial, headline_of, make_trial
from distil_rank.evaluation.representations import ALIGNMENT, COMPOSITION, alignment_scores, composition_rows
from distil_rank.evaluation.task import Groups
from distil_rank.measure.statistics import Interval, Statistic, retained_with_confidence
from distil_rank.options.evaluation import Weigh
from distil_rank.recommendation.pipelines import Cost, Fitted, Pipeline, full_pipeline, grid
from distil_rank.recommendation.problem import FIT, VALIDATE, Problem

SCHEMA = 1
QUERIES = 2000  # validation proteins that each pipeline is searched with at most
ONE_SIDED = 0.90  # level of an interval whose lower end 95 % lie above
Costs = Mapping[str | None, Cost]  # by layer


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
    verdict: str  # confirmed, not confirmed, or nothing retains it: the pipeline is then the one that retains most
    chosen: Outcome  # on the validation groups
    confirmed: Outcome  # the same on the confirmation groups: the claim
    full: Outcome  # the full vector on the confirmation groups
    front: tuple[Outcome, ...]  # pipelines that no other beats in time, bytes and function, on the validation groups
    outcomes: tuple[Outcome, ...]  # all pipelines on the validation groups
    costs: tuple[Cost, ...]
    baselines: tuple[Baseline, ...]  # on the confirmation groups
    proteins: tuple[int, ...]  # in each split: fit, validate, confirm
    groups: tuple[int, ...]  # in each split
    grouping: str
    noise: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskTrial:
    """One task in one split: the trial, the rows it is about, its metric and the full vector's statistic."""

    trial: Trial
    rows: np.ndarray
    metric: str
    reference: Statistic


class Evaluator:
    """Puts pipelines to all tasks in one split of the groups.

    Raises:
        InputError: a task without anything to evaluate in that split, or a full vector that scores nothing.
    """

    def __init__(
        self, fitted: Fitted, split: int, metric: str | None = None, max_queries: int = 10_000, seed: int = 0
    ) -> None:
        self.fitted, self.trials, problem = fitted, list[TaskTrial](), fitted.problem
        for task in problem.tasks:
            own = problem.split[task.rows]
            inside = np.flatnonzero((own == split) | ((own == FIT) & (task.target.kind != "retrieval")))
            rows = task.rows[inside]
            groups = Groups(problem.group[rows], own[inside] == FIT, "")
            trial = make_trial(task.target.subset(inside), groups, max_queries, seed)
            name = headline_of(trial, metric)
            reference = trial.measure(fitted.represent(full_pipeline(problem), rows))[name]
            if not reference.value > 0:
                raise InputError(
                    f"Expected a task that the full vector can do but its {name} on {task.name} is "
                    f"{reference.value:.3g}; there is no function to retain."
                )
            self.trials.append(TaskTrial(trial, rows, name, reference))

    def outcome(self, pipeline: Pipeline, costs: Costs, level: float = 0.95) -> Outcome:
        """Scores of one pipeline and what it retains."""
        scores, shares = [], []
        for one in self.trials:
            statistic = one.trial.measure(self.fitted.represent(pipeline, one.rows))[one.metric]
            share = statistic.value / one.reference.value
            interval = retained_with_confidence(statistic, one.reference, level)
            scores.append(statistic.value)
            shares.append(interval or Interval(share, -math.inf, math.inf))
        time = costs[pipeline.layer].share if pipeline.layer in costs else None
        return Outcome(pipeline, pipeline.bytes, time, tuple(scores), tuple(shares))

    def baselines(self, alignment: bool) -> list[Baseline]:
        """What composition and, where it is wanted and can be, MMseqs2 reach on the first task."""
        sequences, one = self.fitted.problem.sequences, self.trials[0]
        if sequences is None:
            return []
        rows = composition_rows(sequences, self.fitted.problem.split == FIT)[0][one.rows]
        scores = {COMPOSITION: one.trial.measure((rows, rows))}
        if alignment and isinstance(one.trial, RetrievalTrial) and mmseqs_binary() is not None:
            scores[ALIGNMENT] = one.trial.measure(alignment_scores([sequences[row] for row in one.rows]))
        return [Baseline(name, score[one.metric].value / one.reference.value) for name, score in scores.items()]


def within_limits(
    problem: Problem, max_bytes: float | None = None, max_time: float | None = None, costs: Costs | None = None
) -> list[Pipeline]:
    """Pipelines within the limits of bytes for each protein and, where costs are known, of time."""
    pipelines, times = grid(problem), {layer: cost.share for layer, cost in (costs or {}).items()}
    least = min(times.values(), default=0.0 if costs is None else 1.0)
    allowed = [one for one in pipelines if max_bytes is None or one.bytes <= max_bytes]
    allowed = [one for one in allowed if max_time is None or times.get(one.layer, least) <= max_time]
    if not allowed:
        raise InputError(
            f"Expected limits that some pipeline meets (from {min(one.bytes for one in pipelines)} bytes"
            f"{f' and {least:.2f} of the time' if least else ''}) but got --max_bytes {max_bytes} and --max_time "
            f"{max_time}."
        )
    return allowed


def search_pipelines(
    fitted: Fitted,
    pipelines: Sequence[Pipeline],
    costs: Costs,
    metric: str | None = None,
    max_queries: int = QUERIES,
    seed: int = 0,
) -> list[Outcome]:
    """Pipelines on the validation groups, with one-sided 95 % lower ends."""
    evaluator = Evaluator(fitted, VALIDATE, metric, max_queries, seed)
    return [evaluator.outcome(one, costs, ONE_SIDED) for one in tqdm(pipelines, desc="pipelines", disable=None)]


def cheapest(outcomes: Sequence[Outcome], keep: float, weigh: Weigh) -> tuple[Outcome, bool]:
    """The cheapest pipeline that retains enough, and whether there is one; else the one that retains most.

    Those that will probably be confirmed come first: the confirmation groups give an interval as wide as the validation
    groups do, about an estimate that differs. Where there are none, those whose lower end reaches `keep`; then those
    whose estimate does.
    """

    def price(outcome: Outcome) -> tuple[float, ...]:
        time = 1.0 if outcome.time is None else outcome.time
        prices = {"time": (time, outcome.bytes), "bytes": (outcome.bytes, time), "both": (time * outcome.bytes,)}
        return (*prices[weigh], -outcome.worst)

    for figure in (lambda o: o.after_margin, lambda o: o.at_least, lambda o: o.worst):
        if reached := [outcome for outcome in outcomes if figure(outcome) >= keep]:
            return min(reached, key=price), True
    return max(outcomes, key=lambda o: o.worst), False


def pareto_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes that no other beats in time, bytes and function, in ascending order of time and bytes."""

    def costs(outcome: Outcome) -> tuple[float, float, float]:
        return (1.0 if outcome.time is None else outcome.time, outcome.bytes, -outcome.worst)

    points = np.array([costs(outcome) for outcome in outcomes])
    beaten = [((points <= point).all(axis=1) & (points < point).any(axis=1)).any() for point in points]
    return sorted((one for one, worse in zip(outcomes, beaten, strict=True) if not worse), key=costs)
