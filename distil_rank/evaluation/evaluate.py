"""Representations judged on one labelled task: what each keeps of the full vector's function, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.representations import ALIGNMENT, CHANCE, COMPOSITION, Candidate, Role
from distil_rank.evaluation.retrieval import CUTOFF, Scores
from distil_rank.evaluation.task import Target
from distil_rank.evaluation.trials import MAX_QUERIES, RetrievalTrial, make_trial
from distil_rank.measure.statistics import Interval, Statistic, estimate, resample_counts, retained


@dataclass(frozen=True)
class Entry:
    """One representation on the task.

    Attributes:
        name: of the representation.
        role: what it is in the comparison.
        bytes: stored for each protein; None where nothing is.
        cost: of computing it, as a share of the full backbone's; None where it is not known.
        scores: by metric, with 95 % intervals over groups.
        retained: by metric, the score over the full vector's, with the paired interval; empty for the full vector.
        seconds: to make and evaluate it.
    """

    name: str
    role: Role
    bytes: float | None
    cost: float | None
    scores: dict[str, Interval]
    retained: dict[str, Interval] = field(default_factory=dict)
    seconds: float = 0.0

    def ties(self, metric: str) -> bool:
        """Whether the interval of what it keeps holds 1: no worse and no better than the full vector."""
        interval = self.retained.get(metric)
        return interval is not None and interval.low <= 1 <= interval.high


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one task.

    Attributes:
        task: its kind.
        labels: where they come from.
        groups: how fit and judged groups were set apart, in words.
        fitted: proteins that were fitted on.
        judged: proteins that were judged.
        metrics: names, the first being the headline.
        entries: one for each representation, the full vector first.
        notes: what a reader must know.
    """

    task: str
    labels: str
    groups: str
    fitted: int
    judged: int
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The metric that function kept is about."""
        return self.metrics[0]

    def entry(self, name: str) -> Entry:
        """The entry of one representation."""
        return next(entry for entry in self.entries if entry.name == name)


@dataclass(frozen=True)
class _Measured:
    name: str
    role: Role
    bytes: float | None
    cost: float | None
    statistics: dict[str, Statistic]
    seconds: float


def evaluate(
    target: Target,
    groups: Groups,
    candidates: Sequence[Candidate],
    labels: str = "",
    alignment: Callable[[], Scores] | None = None,
    notes: Sequence[str] = (),
    max_queries: int = MAX_QUERIES,
    cutoff: int = CUTOFF,
    metric: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Judge representations of the same proteins on the same rows.

    Args:
        target: labels of all `N` proteins.
        groups: which may be fitted on.
        candidates: the first is the reference, the full vector.
        labels: where the labels come from, in words.
        alignment: makes the scores among the *judged* proteins, in their order, by alignment (retrieval only).
        notes: to pass on to the reader.
        max_queries: judged proteins to search with at most.
        cutoff: neighbours that average precision looks at.
        metric: the headline; by default the first that the task has.
        seed: of draws and permutations.
        progress: whether to show it, on a terminal.

    Raises:
        InputError: nothing to evaluate on the judged side, nothing to fit on, or a metric that the task does not have.
    """
    trial = make_trial(target, groups, max_queries, cutoff, seed)
    metrics = _metrics(trial.metrics, metric)
    steps = len(candidates) + 1 + (alignment is not None)
    measured: list[_Measured] = []
    with tqdm(total=steps, desc="evaluate", disable=None if progress else True) as bar:
        for candidate in candidates:
            bar.set_postfix_str(candidate.name)
            started = time.perf_counter()
            one = candidate.make(groups.fit)
            statistics = trial.measure(one)
            seconds = time.perf_counter() - started
            measured.append(_Measured(candidate.name, candidate.role, one.bytes, one.cost, statistics, seconds))
            if len(measured) == 1:
                measured.append(_Measured(CHANCE, "chance", None, None, trial.chance(one), 0.0))
                bar.update()
            bar.update()
        if alignment is not None and isinstance(trial, RetrievalTrial):
            bar.set_postfix_str(ALIGNMENT)
            started = time.perf_counter()
            statistics = trial.measure_scores(alignment())
            measured.append(_Measured(ALIGNMENT, "baseline", None, None, statistics, time.perf_counter() - started))
            bar.update()
    entries = _entries(measured, trial.judged_groups)
    every_note = [*notes, *trial.notes, *filter(None, (candidate.note for candidate in candidates))]
    every_note += _verdicts(entries, metrics[0])
    return Evaluation(
        target.kind,
        labels,
        groups.description,
        int(groups.fit.sum()),
        int((~groups.fit).sum()),
        metrics,
        tuple(entries),
        tuple(every_note),
    )


def _metrics(names: tuple[str, ...], headline: str | None) -> tuple[str, ...]:
    """All metrics, the headline first."""
    if headline is None:
        return names
    if headline not in names:
        raise InputError(f"Expected --metric out of {', '.join(names)} but got {headline!r}.")
    return (headline, *(name for name in names if name != headline))


def _entries(measured: Sequence[_Measured], groups: int) -> list[Entry]:
    counts = resample_counts(groups)
    reference = measured[0].statistics
    entries = []
    for one in measured:
        scores = {name: estimate(statistic, counts) for name, statistic in one.statistics.items()}
        shares = {name: retained(statistic, reference[name], counts) for name, statistic in one.statistics.items()}
        share = {} if one is measured[0] else {name: value for name, value in shares.items() if value is not None}
        entries.append(Entry(one.name, one.role, one.bytes, one.cost, scores, share, one.seconds))
    return entries


def _verdicts(entries: Sequence[Entry], headline: str) -> list[str]:
    """Rivals that do no worse than the full vector."""
    full = entries[0].scores[headline].value
    for entry in entries[1:]:
        score = entry.scores[headline].value
        if entry.role == "baseline" and score >= full:
            words = "amino-acid composition and length alone" if entry.name == COMPOSITION else f"{entry.name} search"
            return [f"WARNING: {words} reaches {score:.3f} {headline}, no less than the full vector's {full:.3f}."]
    return []
