"""How one representation is put to a task: a search among the judged proteins, or a probe fitted on the others."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.probes import probe, probe_metrics
from distil_rank.evaluation.representations import Representation
from distil_rank.evaluation.retrieval import CUTOFF, Relevance, Scores, inner_product, retrieve
from distil_rank.evaluation.task import Target
from distil_rank.measure.statistics import Statistic, mean

MAX_QUERIES = 10_000  # judged proteins that are searched with at most; every one is a target


class Trial(Protocol):
    """A task that representations of the same proteins are put to, one after the other.

    Attributes:
        metrics: names, the headline first.
        notes: what a reader must know.
        judged_groups: number of groups that intervals are taken over.
    """

    metrics: tuple[str, ...]
    notes: list[str]
    judged_groups: int

    def measure(self, representation: Representation) -> dict[str, Statistic]:
        """By metric, sums over the judged groups."""

    def chance(self, reference: Representation) -> dict[str, Statistic]:
        """The same with permuted labels."""


def make_trial(
    target: Target, groups: Groups, max_queries: int = MAX_QUERIES, cutoff: int = CUTOFF, seed: int = 0
) -> Trial:
    """The trial that a target asks for.

    Args:
        target: labels of all `N` proteins.
        groups: which may be fitted on; the others are judged.
        max_queries: judged proteins to search with at most (retrieval).
        cutoff: neighbours that average precision looks at (retrieval).
        seed: of draws and permutations.

    Raises:
        InputError: nothing to evaluate on the judged side.
    """
    if target.kind == "retrieval":
        return RetrievalTrial(target, groups, max_queries, cutoff, seed)
    return ProbeTrial(target, groups, seed)


class RetrievalTrial:
    """Search among the judged proteins."""

    def __init__(self, target: Target, groups: Groups, max_queries: int, cutoff: int, seed: int) -> None:
        assert target.relevance is not None
        self.judged = groups.judged
        self.relevance = target.relevance.subset(self.judged)
        self.metrics, self.cutoff, self.seed = self.relevance.metrics, cutoff, seed
        level, name = self.relevance.levels[self.relevance.level], self.relevance.names[self.relevance.level]
        sizes = np.bincount(level)[level]
        if sizes.max(initial=0) < 2:
            raise InputError(
                f"Expected a {name} with at least two judged proteins but every one is alone; choose other --groups."
            )
        alone = int(np.count_nonzero(sizes < 2))
        self.notes = [f"{alone:,} of {len(level):,} judged proteins are alone in their {name}: targets only"] * (
            alone > 0
        )
        self.queries = np.arange(len(self.judged))
        if len(self.queries) > max_queries:
            self.queries = np.sort(np.random.default_rng(seed).permutation(len(self.queries))[:max_queries])
            self.notes.append(
                f"FEWER QUERIES: {max_queries:,} of {len(self.judged):,} judged proteins, each searched among all"
            )
        self.group = np.unique(groups.number[self.judged][self.queries], return_inverse=True)[1]
        self.judged_groups = self.group.max() + 1

    def measure(self, representation: Representation) -> dict[str, Statistic]:
        """By metric, sums over the judged groups."""
        queries, targets = (rows[self.judged] for rows in (representation.queries, representation.targets))
        return self.measure_scores(inner_product(queries, targets))

    def measure_scores(self, scores: Scores, relevance: Relevance | None = None) -> dict[str, Statistic]:
        """The same from scores among the judged proteins, with other labels if given."""
        figures = retrieve(scores, relevance or self.relevance, self.queries, self.cutoff, self.seed)
        return {name: mean(values, self.group) for name, values in figures.items()}

    def chance(self, reference: Representation) -> dict[str, Statistic]:
        """The reference with the labels permuted among the judged proteins."""
        order = np.random.default_rng(self.seed).permutation(len(self.judged))
        rows = reference.queries[self.judged]
        return self.measure_scores(inner_product(rows, rows), self.relevance.subset(order))


class ProbeTrial:
    """A linear model on top of the representation."""

    def __init__(self, target: Target, groups: Groups, seed: int) -> None:
        assert target.y is not None
        self.target, self.groups, self.seed = target, groups, seed
        self.metrics = probe_metrics(target)
        self.judged_groups = len(np.unique(groups.number[~groups.fit]))
        self.notes: list[str] = []
        if target.kind != "regression":
            fit, judged = self._classes(groups.fit), self._classes(~groups.fit)
            for there, elsewhere, side in ((fit, judged, "fit"), (judged, fit, "judged")):
                if only := sorted(there - elsewhere):
                    names = ", ".join(target.classes[k] for k in only[:3]) + (", ..." if len(only) > 3 else "")
                    self.notes.append(
                        f"{len(only):,} of {len(target.classes):,} classes are on the {side} side only ({names})"
                    )

    def _classes(self, side: np.ndarray) -> set[int]:
        assert self.target.y is not None
        y = self.target.y[side]
        return set((np.flatnonzero(y.any(axis=0)) if y.ndim == 2 else np.unique(y)).tolist())

    def measure(self, representation: Representation) -> dict[str, Statistic]:
        """By metric, sums over the judged groups."""
        return probe(representation.targets.numpy(), self.target, self.groups.fit, self.groups.number)

    def chance(self, reference: Representation) -> dict[str, Statistic]:
        """The reference with the labels to fit on permuted."""
        assert self.target.y is not None
        y = self.target.y[self.groups.fit]
        order = np.random.default_rng(self.seed).permutation(len(y))
        return probe(reference.targets.numpy(), self.target, self.groups.fit, self.groups.number, y[order])
