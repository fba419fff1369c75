"""Compare pipelines on validation groups, choose the cheapest that keeps enough, confirm it on untouched groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.trials import Trial, make_trial
from distil_rank.measure.statistics import Interval, Statistic, retained_with_confidence
from distil_rank.recommendation.parts import FIT, VALIDATE
from distil_rank.recommendation.pipelines import Fitted, grid
from distil_rank.recommendation.problem import Problem, Task
from distil_rank.report.choices import Cost, Outcome, Pipeline

Weigh = Literal["time", "bytes", "both"]
QUERIES = 2000  # validation proteins that each pipeline is searched with at most
ONE_SIDED = 0.90  # level of an interval whose lower end 95 % lie above


@dataclass(frozen=True)
class Limits:
    """Constraints.

    Attributes:
        bytes: for each protein at most.
        time: share of the full backbone's time at most.
    """

    bytes: float = math.inf
    time: float = math.inf


@dataclass(frozen=True)
class _Side:
    """One task on one part: the trial, the rows it is about, and the full vector's statistic."""

    trial: Trial
    rows: np.ndarray
    metric: str
    reference: Statistic


class Evaluator:
    """Puts pipelines to all tasks on one part of the groups.

    Args:
        problem: vectors and tasks.
        fitted: closed forms of the fit part.
        part: to evaluate on.
        max_queries: judged proteins that are searched with at most.
        seed: of draws.

    Raises:
        InputError: a task without anything to evaluate on that part, or a full vector that scores nothing.
    """

    def __init__(self, problem: Problem, fitted: Fitted, part: int, max_queries: int = 10_000, seed: int = 0) -> None:
        self.problem, self.fitted = problem, fitted
        self.full = full_pipeline(problem)
        self.sides = [self._side(task, part, max_queries, seed) for task in problem.tasks]

    def _side(self, task: Task, part: int, max_queries: int, seed: int) -> _Side:
        own = self.problem.part[task.rows]
        inside = np.flatnonzero((own == part) | ((own == FIT) & (task.target.kind != "retrieval")))
        rows = task.rows[inside]
        groups = Groups(self.problem.group[rows], own[inside] == FIT, "")
        trial = make_trial(task.target.subset(inside), groups, max_queries, seed=seed)
        metric = task.metric or trial.metrics[0]
        if metric not in trial.metrics:
            raise InputError(f"Expected --metric out of {', '.join(trial.metrics)} but got {metric!r}.")
        reference = trial.measure(self.fitted.represent(self.full, rows))[metric]
        if not reference.value > 0:
            raise InputError(
                f"Expected a task that the full vector can do but its {metric} on {task.name} is "
                f"{reference.value:.3g}; there is no function to keep."
            )
        return _Side(trial, rows, metric, reference)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The score of each task."""
        return tuple(side.metric for side in self.sides)

    def outcome(self, pipeline: Pipeline, costs: Mapping[str | None, Cost], level: float = 0.95) -> Outcome:
        """Scores of one pipeline and what it keeps."""
        scores, retained = [], []
        for side in self.sides:
            statistic = side.trial.measure(self.fitted.represent(pipeline, side.rows))[side.metric]
            ratio = statistic.value / side.reference.value
            interval = retained_with_confidence(statistic, side.reference, level)
            scores.append(statistic.value)
            retained.append(interval or Interval(ratio, -math.inf, math.inf))
        cost = costs.get(pipeline.layer)
        return Outcome(pipeline, pipeline.bytes, None if cost is None else cost.share, tuple(scores), tuple(retained))


def full_pipeline(problem: Problem) -> Pipeline:
    """The last layer's centred vector in float32: a rotation changes no distance."""
    return Pipeline(problem.last, "variance", problem.layers[problem.last].shape[1], "float32")


def search_pipelines(
    problem: Problem,
    fitted: Fitted,
    costs: Mapping[str | None, Cost],
    limits: Limits = Limits(),
    max_queries: int = QUERIES,
    seed: int = 0,
    progress: bool = True,
) -> list[Outcome]:
    """Every pipeline within the limits on the validation groups, with one-sided 95 % lower ends.

    Raises:
        InputError: no pipeline is within the limits.
    """
    pipelines = _grid(problem)
    allowed = [one for one in pipelines if one.bytes <= limits.bytes and _time(one, costs) <= limits.time]
    if not allowed:
        smallest = min(one.bytes for one in pipelines)
        least = min(_time(one, costs) for one in pipelines)
        raise InputError(
            f"Expected limits that some pipeline meets (from {smallest} bytes and {least:.2f} of the time) but got "
            f"--max_bytes {limits.bytes:g} and --max_time {limits.time:g}."
        )
    evaluator = Evaluator(problem, fitted, VALIDATE, max_queries, seed)
    bar: Iterable[Pipeline] = tqdm(allowed, desc="pipelines", disable=None if progress else True)
    return [evaluator.outcome(pipeline, costs, ONE_SIDED) for pipeline in bar]


def check_limits(problem: Problem, limits: Limits) -> None:
    """Raises `InputError` where no pipeline can be within the limits, before the time of any is measured."""
    smallest = min(one.bytes for one in _grid(problem))
    if limits.bytes < smallest or limits.time <= 0:
        raise InputError(
            f"Expected limits that some pipeline meets (from {smallest} bytes, and more than 0 of the time) but got "
            f"--max_bytes {limits.bytes:g} and --max_time {limits.time:g}."
        )


def _grid(problem: Problem) -> list[Pipeline]:
    names = list(problem.layers)
    return grid(names, [problem.layers[name].shape[1] for name in names], problem.metrics)


def _time(pipeline: Pipeline, costs: Mapping[str | None, Cost]) -> float:
    return costs[pipeline.layer].share if pipeline.layer in costs else 1.0


def cheapest(outcomes: Sequence[Outcome], keep: float, weigh: Weigh) -> tuple[Outcome, bool]:
    """The cheapest pipeline that keeps enough, and whether there is one; else the one that keeps most.

    Those that will probably be confirmed come first: the confirmation groups give an interval as wide as the validation
    groups do, about an estimate that differs. Where there are none, those whose lower end reaches `keep`; then those
    whose estimate does.

    Args:
        outcomes: on the validation groups.
        keep: share of the full vector's score.
        weigh: what is to be cheap: time first and then bytes, bytes first and then time, or the product of both.
    """
    for figure in (lambda o: o.after_margin, lambda o: o.at_least, lambda o: o.worst):
        if reached := [outcome for outcome in outcomes if figure(outcome) >= keep]:
            return min(reached, key=lambda o: (*_price(o, weigh), -o.worst)), True
    return max(outcomes, key=lambda o: o.worst), False


def _price(outcome: Outcome, weigh: Weigh) -> tuple[float, ...]:
    time = 1.0 if outcome.time is None else outcome.time
    if weigh == "both":
        return (time * outcome.bytes,)
    return (time, outcome.bytes) if weigh == "time" else (outcome.bytes, time)


def pareto_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes that no other beats: none is as good in time, bytes and function, and better in one of them.

    In ascending order of time and bytes.
    """

    def costs(outcome: Outcome) -> tuple[float, float, float]:
        return (1.0 if outcome.time is None else outcome.time, outcome.bytes, -outcome.worst)

    points = np.array([costs(outcome) for outcome in outcomes])
    front = [
        outcome
        for outcome, point in zip(outcomes, points, strict=True)
        if not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
    ]
    return sorted(front, key=costs)
