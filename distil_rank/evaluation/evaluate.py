"""Representations on one labelled task: what each retains of the full vector's function, and how sure that is.

A task is a trial that representations are put to one after the other: a search among the evaluated proteins, or a probe
that is fitted on the others.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F

from distil_rank.errors import InputError
from distil_rank.evaluation.probes import ProbeTrial
from distil_rank.evaluation.representations import CHANCE, COMPOSITION, Representation, Role, Sides
from distil_rank.evaluation.retrieval import Relevance, Scores, inner_product, retrieve
from distil_rank.evaluation.task import Groups, Target
from distil_rank.measure.progress import progress
from distil_rank.measure.statistics import Interval, Statistic, difference, estimate, mean, resample_counts, retained

MAX_QUERIES = 10_000  # evaluated proteins that are searched with at most; every one is a target


@dataclass(frozen=True)
class Entry:
    """One representation on the task."""

    name: str
    role: Role
    bytes: float | None  # stored for each protein; None where nothing is
    scores: dict[str, Interval]  # by metric, with 95 % intervals over groups
    retained: dict[str, Interval] = field(default_factory=dict)  # the score over the full vector's, paired
    seconds: float = 0.0  # to make and evaluate it


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one task."""

    task: str  # its kind
    labels: str
    groups: str  # how they were set apart, in words
    fitted: int  # proteins
    evaluated: int  # proteins
    metrics: tuple[str, ...]  # the first is the headline
    entries: tuple[Entry, ...]  # one for each representation, the full vector first
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The metric that is reported first."""
        return self.metrics[0]

    def entry(self, name: str) -> Entry:
        """The entry of one representation."""
        return next(entry for entry in self.entries if entry.name == name)


def evaluate(
    target: Target,
    groups: Groups,
    representations: Sequence[Representation],
    labels: str = "",
    notes: Sequence[str] = (),
    metric: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate representations of the same proteins on the same rows, beside chance; the first one is the reference.

    `metric` is the headline, by default the first that the task has.

    Raises:
        InputError: nothing to evaluate on, nothing to fit on, or a metric that the task does not have.
    """
    trial = make_trial(target, groups, seed=seed)
    headline, names = headline_of(trial, metric), [one.name for one in representations]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"Expected different names of representations but {repeated!r} comes twice; rename one.")
    counts, reference = resample_counts(trial.evaluated_groups), dict[str, Statistic]()
    entries: list[Entry] = []

    def add(name: str, role: Role, stored: float | None, statistics: dict[str, Statistic], seconds: float = 0) -> None:
        scores = {key: estimate(statistic, counts) for key, statistic in statistics.items()}
        shares = {key: retained(statistics[key], full, counts) for key, full in reference.items()}
        known = {key: share for key, share in shares.items() if share is not None}
        entries.append(Entry(name, role, stored, scores, known, seconds))

    for one in progress(representations, "evaluate"):
        started = time.perf_counter()
        rows = one.make(groups.fit)
        statistics = trial.measure(rows)
        add(one.name, one.role, one.bytes, statistics, time.perf_counter() - started)
        if not reference:
            reference |= statistics
            for name, trivial in trial.trivial(rows).items():
                add(name, "chance", None, trivial)
                if not difference(reference[headline], trivial[headline], counts).low > 0:
                    words = f"the {one.name}'s {headline} is not clearly above {name}: there is no function to retain"
                    notes = [*notes, f"WARNING: {words}."]
    lines = [*notes, *trial.notes, *(one.note for one in representations if one.note)]
    full = entries[0].scores[headline].value
    for entry in entries:
        score = entry.scores[headline].value
        if entry.role == "baseline" and score >= full:
            words = "amino-acid composition and length alone" if entry.name == COMPOSITION else f"{entry.name} search"
            lines.append(
                f"WARNING: {words} reaches {score:.3f} {headline}, no less than the {entries[0].name}'s {full:.3f}."
            )
    metrics = (headline, *(name for name in trial.metrics if name != headline))
    fitted, evaluated = int(groups.fit.sum()), len(groups.evaluated)
    return Evaluation(target.kind, labels, groups.description, fitted, evaluated, metrics, tuple(entries), tuple(lines))


class RetrievalTrial:
    """Search among the evaluated proteins."""

    def __init__(self, relevance: Relevance, groups: Groups, max_queries: int, seed: int) -> None:
        self.rows, self.seed, self.notes = groups.evaluated, seed, list[str]()
        self.relevance = relevance.subset(self.rows)
        self.metrics = self.relevance.metrics
        level, name = self.relevance.levels[self.relevance.level], self.relevance.names[self.relevance.level]
        count, sizes = len(level), np.bincount(level)[level]
        if sizes.max(initial=0) < 2:
            raise InputError(
                f"Expected a {name} with at least two evaluated proteins but every one is alone; choose other --groups."
            )
        if alone := np.count_nonzero(sizes < 2):
            self.notes.append(f"{alone:,} of {count:,} evaluated proteins are alone in their {name}: targets only")
        self.queries = np.arange(count)
        if count > max_queries:
            self.queries = np.sort(np.random.default_rng(seed).permutation(count)[:max_queries])
            self.notes.append(
                f"FEWER QUERIES: {max_queries:,} of {count:,} evaluated proteins, each searched among all"
            )
        self.group = np.unique(groups.number[self.rows][self.queries], return_inverse=True)[1]
        self.evaluated_groups = self.group.max() + 1

    def measure(self, rows: Sides | Scores | np.ndarray, relevance: Relevance | None = None) -> dict[str, Statistic]:
        """From a search with all queries, by the true labels or by others."""
        assert not isinstance(rows, np.ndarray)
        scores = rows if callable(rows) else inner_product(*(F.normalize(side[self.rows]) for side in rows))
        figures = retrieve(scores, relevance or self.relevance, self.queries, seed=self.seed)
        return {name: mean(values, self.group) for name, values in figures.items()}

    def trivial(self, rows: Sides | Scores | np.ndarray) -> dict[str, dict[str, Statistic]]:
        """From the same search, by permuted labels."""
        order = np.random.default_rng(self.seed).permutation(len(self.rows))
        return {CHANCE: self.measure(rows, self.relevance.subset(order))}


Trial = RetrievalTrial | ProbeTrial  # a task that representations of the same proteins are put to, one after the other


def headline_of(trial: Trial, metric: str | None) -> str:
    """The metric of this name, or the trial's first."""
    if metric is not None and metric not in trial.metrics:
        raise InputError(f"Expected --metric out of {', '.join(trial.metrics)} but got {metric!r}.")
    return metric or trial.metrics[0]


def make_trial(
    target: Target, groups: Groups, max_queries: int = MAX_QUERIES, seed: int = 0, quick: bool = False
) -> Trial:
    """The trial that a target asks for; `quick` is for a search among hundreds of representations."""
    if target.relevance is not None:
        return RetrievalTrial(target.relevance, groups, max_queries, seed)
    return ProbeTrial(target, groups, seed, quick)
