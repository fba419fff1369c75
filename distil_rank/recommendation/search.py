"""Compare pipelines on validation groups, choose the cheapest that retains enough, confirm it on untouched groups.

The result is a `Recommendation`; JSON is its serialisation, and docs/recommend.md documents the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import MAX_QUERIES, Trial, headline_of, make_trial
from distil_rank.evaluation.representations import ALIGNMENT, COMPOSITION, NO_MMSEQS, Sides, alignment, composition
from distil_rank.evaluation.task import Groups
from distil_rank.measure.progress import progress
from distil_rank.measure.statistics import (
    LEVEL,
    Interval,
    Statistic,
    chance_of_confirmation,
    difference,
    log_ratio,
    resample_counts,
    retained_with_confidence,
)
from distil_rank.options.evaluation import Answer
from distil_rank.recommendation.pipelines import Cost, Fitted, Pipeline, full_pipeline, grid
from distil_rank.recommendation.problem import CONFIRM, FIT, VALIDATE, Problem

SCHEMA = 2
QUERIES = 2000  # validation proteins that each pipeline is searched with at most, by default
ONE_SIDED = 0.90  # level of an interval whose lower end 95 % lie above
LOOKS = 3  # at the confirmation groups, one for each answer
LIKELY = 0.5  # more likely to be confirmed than not: only then is a pipeline an answer
PROBED = 12  # pipelines of a classification or regression that the probe itself is fitted to before the choice
Costs = Mapping[str | None, Cost]  # by layer


@dataclass(frozen=True)
class Outcome:
    """One pipeline on the groups of one split."""

    pipeline: Pipeline
    bytes: int  # stored for each protein
    time: float | None  # share of the full backbone's; None where it could not be measured
    scores: tuple[float, ...]  # by task
    retained: tuple[Interval, ...]  # by task, the score over the full vector's
    likely: float | None = None  # chance that the confirmation groups confirm it, from the validation groups

    @property
    def worst(self) -> float:
        """What is retained of the task that suffers most."""
        return min(interval.value for interval in self.retained)

    @property
    def at_least(self) -> float:
        """The lower end of the interval of the task whose lower end is lowest."""
        return min(interval.low for interval in self.retained)

    @property
    def price(self) -> tuple[float, int]:
        """Time, all of it where it could not be measured, and bytes."""
        return 1.0 if self.time is None else self.time, self.bytes


@dataclass(frozen=True)
class Baseline:
    """What needs no embedding, or no function, on the confirmation groups, first task."""

    name: str
    score: float
    retained: float


@dataclass(frozen=True)
class Confirmed:
    """One of the three answers."""

    chosen: Outcome  # on the validation groups
    confirmed: Outcome  # on the confirmation groups: the claim, its intervals simultaneous over answers and tasks
    verdict: str  # confirmed, not confirmed, or nothing retains it: the pipeline is then the likeliest

    @classmethod
    def of(cls, chosen: Outcome, confirmed: Outcome, keep: float) -> Confirmed:
        """With its verdict."""
        doubted = "not confirmed" if chosen.worst >= keep else "nothing retains it"
        return cls(chosen, confirmed, "confirmed" if confirmed.at_least >= keep else doubted)


@dataclass(frozen=True)
class Recommendation:
    """What to use, what it costs, what it retains."""

    source: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    keep: float
    headline: Answer
    answers: dict[Answer, Confirmed]
    searched: bool  # vectors are stored and searched; else they only go into a probe, and bytes are no gain
    full: Outcome  # the full vector on the confirmation groups
    front: tuple[Outcome, ...]  # pipelines that no other beats in time, bytes and function, on the validation groups
    outcomes: tuple[Outcome, ...]  # all pipelines on the validation groups
    costs: tuple[Cost, ...]
    baselines: tuple[Baseline, ...]  # on the confirmation groups
    proteins: tuple[int, ...]  # in each split: fit, validate, confirm
    groups: tuple[int, ...]  # in each split
    grouping: str
    noise: str
    seconds: float = 0.0
    next: str = ""  # command to type
    predictor: str | None = None  # for classes or numbers: the command that trains a predictor of them
    notes: tuple[str, ...] = ()

    @property
    def answer(self) -> Confirmed:
        """The one that comes first."""
        return self.answers[self.headline]


@dataclass(frozen=True)
class TaskTrial:
    """One task in one split: the trial, its rows and metric, and the full vector's score beside what is trivial."""

    trial: Trial
    rows: np.ndarray
    metric: str
    reference: Statistic
    trivial: Mapping[str, Statistic]


class Evaluator:
    """Puts pipelines to all tasks in one split of the groups; `quick` fits simpler probes.

    Raises:
        InputError: a task without anything to evaluate in that split, or a full vector that is not clearly above what
            permuted labels or one answer for every protein score.
    """

    def __init__(
        self,
        fitted: Fitted,
        split: int,
        metric: str | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        quick: bool = False,
    ) -> None:
        self.fitted, self.trials, problem = fitted, list[TaskTrial](), fitted.problem
        most = max_queries or (QUERIES if split == VALIDATE else MAX_QUERIES)
        self.options = (split, metric, most, seed)
        self.statistics: dict[Pipeline, list[Statistic]] = {}
        for task in problem.tasks:
            own = problem.split[task.rows]
            inside = np.flatnonzero((own == split) | ((own == FIT) & (task.target.kind != "retrieval")))
            rows = task.rows[inside]
            groups = Groups(problem.group[rows], own[inside] == FIT, "")
            trial = make_trial(task.target.subset(inside), groups, most, seed, quick)
            name, full = headline_of(trial, metric), fitted.full(rows)
            reference, trivial = trial.measure(full)[name], {}
            if not quick:
                trivial = {which: statistics[name] for which, statistics in trial.trivial(full).items()}
            counts = resample_counts(trial.evaluated_groups)
            for which, statistic in trivial.items():
                if not (reference.value > 0 and difference(reference, statistic, counts).low > 0):
                    raise InputError(
                        f"Expected a task that the full vector can do but its {name} on {task.name}, "
                        f"{reference.value:.3g}, is not clearly above {which}, {statistic.value:.3g}: there is no "
                        "function to retain; give more labels, or another --metric."
                    )
            self.trials.append(TaskTrial(trial, rows, name, reference, trivial))

    def outcome(self, pipeline: Pipeline, costs: Costs, level: float = LEVEL) -> Outcome:
        """Scores of one pipeline and what it retains."""
        own = [one.trial.measure(self.fitted.represent(pipeline, one.rows))[one.metric] for one in self.trials]
        self.statistics[pipeline] = own
        return self._outcome(pipeline, costs, level, own)

    def full(self, costs: Costs) -> Outcome:
        """The full vector, which retains all."""
        return self._outcome(full_pipeline(self.fitted.problem), costs, LEVEL, [one.reference for one in self.trials])

    def _outcome(self, pipeline: Pipeline, costs: Costs, level: float, own: Sequence[Statistic]) -> Outcome:
        shares = [
            retained_with_confidence(statistic, one.reference, level)
            or Interval(statistic.value / one.reference.value, -math.inf, math.inf)
            for statistic, one in zip(own, self.trials, strict=True)
        ]
        time = costs[pipeline.layer].share if pipeline.layer in costs else None
        scores = tuple(statistic.value for statistic in own)
        return Outcome(pipeline, pipeline.bytes, time, scores, tuple(shares))

    def chance_of_confirmation(self, pipeline: Pipeline, keep: float) -> float:
        """How likely other groups confirm a pipeline that was measured here, on the task where that is least likely."""
        level = 1 - (1 - LEVEL) / LOOKS / len(self.trials)
        pairs = zip(self.statistics[pipeline], self.trials, strict=True)
        return min(chance_of_confirmation(own, one.reference, keep, level) for own, one in pairs)

    def ties(self, one: Outcome, other: Outcome) -> bool:
        """Whether two pipelines that were measured here differ by no more than one standard error, for every task.

        The rule by which Breiman, Friedman, Olshen and Stone (1984, 3.4.3) take the simplest of what is level with the
        best; the error is that of the paired ratio.
        """
        pairs = zip(self.statistics[one.pipeline], self.statistics[other.pipeline], strict=True)
        ratios = [log_ratio(*pair) for pair in pairs]
        return all(ratio is None or abs(ratio[0]) <= ratio[1] for ratio in ratios)

    def baselines(self, aligned: bool) -> list[Baseline]:
        """What composition, what is trivial and, where it is wanted, MMseqs2 score on the first task."""
        sequences, one = self.fitted.problem.sequences, self.trials[0]
        scores = dict(one.trivial)
        if sequences is not None:
            rows, _ = cast(Sides, composition(sequences).make(self.fitted.problem.split == FIT))
            scores[COMPOSITION] = one.trial.measure((rows[one.rows], rows[one.rows]))[one.metric]
            if aligned:
                search = alignment([sequences[row] for row in one.rows]).make(np.zeros(len(one.rows), dtype=bool))
                scores[ALIGNMENT] = one.trial.measure(search)[one.metric]
        return [Baseline(name, score.value, score.value / one.reference.value) for name, score in scores.items()]


def within_limits(
    problem: Problem, max_bytes: float | None = None, max_time: float | None = None, costs: Costs | None = None
) -> list[Pipeline]:
    """Pipelines within the limits of bytes for each protein and of time, all of it where costs are not known."""
    pipelines, times = grid(problem), {layer: cost.share for layer, cost in (costs or {}).items()}
    least = min(times.values(), default=1.0)
    allowed = [one for one in pipelines if max_bytes is None or one.bytes <= max_bytes]
    allowed = [one for one in allowed if max_time is None or times.get(one.layer, least) <= max_time]
    if not allowed:
        raise InputError(
            f"Expected limits that some pipeline meets (from {min(one.bytes for one in pipelines)} bytes and "
            f"{least:.2f} of the time) but got --max_bytes {max_bytes} and --max_time {max_time}."
        )
    return allowed


def search_pipelines(
    evaluator: Evaluator, pipelines: Sequence[Pipeline], costs: Costs, keep: float
) -> tuple[list[Outcome], dict[Answer, Outcome]]:
    """Pipelines on the evaluator's groups, with one-sided 95 % lower ends, and the three answers.

    For a classification or a regression all are compared by ridge regression alone, and what would be chosen is then
    measured by the probe itself, until the choice stands.
    """

    def measure(evaluator: Evaluator, pipeline: Pipeline) -> Outcome:
        outcome = evaluator.outcome(pipeline, costs, ONE_SIDED)
        return replace(outcome, likely=evaluator.chance_of_confirmation(pipeline, keep))

    problem = evaluator.fitted.problem
    probed = any(task.target.kind != "retrieval" for task in problem.tasks)
    quick = Evaluator(evaluator.fitted, *evaluator.options, quick=True) if probed else evaluator
    known = dict[Pipeline, Outcome]()
    outcomes = {one: measure(quick, one) for one in progress(pipelines, "pipelines")}
    while True:
        answers = choose(list(outcomes.values()), quick.ties, problem.searched, full_pipeline(problem).bytes)
        fresh = {one.pipeline for one in answers.values()} - set(known)
        if not probed or not fresh or len(known) >= PROBED:
            return list(outcomes.values()), answers
        known |= {one: measure(evaluator, one) for one in fresh}
        outcomes |= known
        quick.statistics |= evaluator.statistics


def choose(
    outcomes: Sequence[Outcome], ties: Callable[[Outcome, Outcome], bool], searched: bool, full_bytes: int
) -> dict[Answer, Outcome]:
    """The fastest, the smallest and the best of the pipelines that are more likely to be confirmed than not.

    Where there are none, of those that are likeliest to be. `fastest` and `smallest` save most time and most bytes in
    expectation, by the logarithm of the factor, for factors multiply: a pipeline that is not confirmed saves nothing,
    for the full vector is used. Of what saves the same time `fastest` is the smallest, or where nothing is stored the
    best; of what has the same bytes `smallest` is the fastest. `best` scores highest, the cheapest of those that tie
    with the highest. What costs the same is decided by score, a tie by simplicity.
    """

    def quicker(one: Outcome) -> float:
        return -(one.likely or 0.0) * math.log(one.price[0])

    def smaller(one: Outcome) -> float:
        return (one.likely or 0.0) * math.log(full_bytes / one.bytes)

    def most(some: Sequence[Outcome], saving: Callable[[Outcome], float], cost: int) -> list[Outcome]:
        """Those that cost what the one costs that is expected to save most."""
        top = max(some, key=saving).price[cost]
        return [one for one in some if one.price[cost] == top]

    def best(some: Sequence[Outcome]) -> Outcome:
        top = max(some, key=lambda one: one.worst)
        return min((one for one in some if one is top or ties(top, one)), key=lambda one: one.price)

    likeliest = max(one.likely or 0.0 for one in outcomes)
    enough = [one for one in outcomes if (one.likely or 0.0) >= min(likeliest, LIKELY)]
    if likeliest == 0:
        enough = [max(outcomes, key=lambda one: one.worst)]
    fastest = most(enough, quicker, 0)
    return {
        "fastest": best(most(fastest, smaller, 1) if searched else fastest),
        "smallest": best(most(most(enough, smaller, 1), quicker, 0)),
        "best": best(enough),
    }


def search_and_confirm(
    validation: Evaluator,
    confirmation: Evaluator,
    pipelines: Sequence[Pipeline],
    costs: Costs,
    keep: float,
    headline: Answer,
    aligned: bool,
) -> Recommendation:
    """Search on one evaluator's groups, and look once at the other's, with all three answers."""
    outcomes, answers = search_pipelines(validation, pipelines, costs, keep)
    problem = confirmation.fitted.problem
    chosen = {one.pipeline for one in answers.values()}
    level = 1 - (1 - LEVEL) / len(chosen) / len(problem.tasks)  # Bonferroni: the intervals hold together
    looks = {one: confirmation.outcome(one, costs, level) for one in chosen}
    aligned = aligned and problem.sequences is not None and problem.tasks[0].target.kind == "retrieval"
    missing = aligned and mmseqs_binary() is None
    splits = [problem.split == split for split in (FIT, VALIDATE, CONFIRM)]
    shown = {one.pipeline: one for one in [*pareto_front(outcomes, problem.searched), *answers.values()]}
    return Recommendation(
        source=problem.source,
        tasks=tuple(task.name for task in problem.tasks),
        metrics=tuple(one.metric for one in confirmation.trials),
        keep=keep,
        headline=headline,
        answers={name: Confirmed.of(one, looks[one.pipeline], keep) for name, one in answers.items()},
        searched=problem.searched,
        full=confirmation.full(costs),
        front=tuple(sorted(shown.values(), key=lambda one: one.price)),
        outcomes=tuple(outcomes),
        costs=tuple(costs.values()),
        baselines=tuple(confirmation.baselines(aligned and not missing)),
        proteins=tuple(int(rows.sum()) for rows in splits),
        groups=tuple(len(np.unique(problem.group[rows])) for rows in splits),
        grouping=problem.groups,
        noise=problem.noise_source,
        notes=(*problem.notes, *[NO_MMSEQS] * missing),
    )


def pareto_front(outcomes: Sequence[Outcome], searched: bool = True) -> list[Outcome]:
    """Outcomes that no other beats in time, bytes (of what is searched) and function, by time and bytes."""

    def costs(outcome: Outcome) -> tuple[float, float, float]:
        return (1.0 if outcome.time is None else outcome.time, outcome.bytes if searched else 0, -outcome.worst)

    points = np.array([costs(outcome) for outcome in outcomes])
    beaten = [((points <= point).all(axis=1) & (points < point).any(axis=1)).any() for point in points]
    return sorted((one for one, worse in zip(outcomes, beaten, strict=True) if not worse), key=costs)
