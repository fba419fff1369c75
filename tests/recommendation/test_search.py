"""The search over pipelines, on the labelled sample."""

import math
from dataclasses import replace

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.representations import full_vector
from distil_rank.evaluation.task import Groups
from distil_rank.measure.statistics import Interval
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.pipelines import Cost, Fitted, Pipeline, full_pipeline, grid
from distil_rank.recommendation.problem import CONFIRM, FIT, open_problem
from distil_rank.recommendation.search import (
    Evaluator,
    Outcome,
    cheapest,
    pareto_front,
    search_pipelines,
    within_limits,
)


@pytest.fixture(scope="module")
def problem(request):
    return open_problem(str(request.config.rootpath / "data" / "functions"), LabelOptions())


@pytest.fixture(scope="module")
def fitted(problem):
    return Fitted(problem)


def outcome(bytes, time, value, low=None):
    pipeline = Pipeline("1", "variance", bytes, "int8")
    return Outcome(pipeline, bytes, time, (value,), (Interval(value, value - 0.01 if low is None else low, 2.0),))


def test_the_full_pipeline_is_what_evaluate_calls_the_full_vector(problem, fitted):
    evaluator = Evaluator(fitted, CONFIRM)
    [task] = problem.tasks
    inside = np.flatnonzero(problem.split == CONFIRM)
    rows = np.concatenate([np.flatnonzero(problem.split == FIT), inside])
    groups = Groups(problem.group[rows], problem.split[rows] == FIT, "")
    x = problem.layers[problem.last][rows]
    done = evaluate(task.target.subset(rows), groups, [full_vector(x)])
    assert evaluator.outcome(full_pipeline(problem), {}).scores[0] == pytest.approx(
        done.entries[0].scores["mAP"].value, abs=1e-6
    )
    assert evaluator.outcome(full_pipeline(problem), {}).retained[0] == Interval(1, 1, 1)


def test_every_pipeline_within_the_limits_is_compared(problem, fitted):
    outcomes = search_pipelines(fitted, within_limits(problem, 16), {})
    assert len(grid(problem)) == 48 and {one.pipeline for one in outcomes} == {
        one for one in grid(problem) if one.bytes <= 16
    }
    chosen, reached = cheapest(outcomes, 0.9, "bytes")
    assert reached and chosen.at_least >= 0.9
    cheaper = [one for one in outcomes if one.bytes < chosen.bytes]
    assert all(one.after_margin < 0.9 for one in cheaper)


def test_the_confirmation_groups_change_nothing_before_the_confirmation(problem, fitted):
    changed = {name: x.copy() for name, x in problem.layers.items()}
    for x in changed.values():
        x[problem.split == CONFIRM] = 7.0
    spoilt = Fitted(replace(problem, layers=changed))
    pipelines = within_limits(problem, 4)
    before, after = (search_pipelines(one, pipelines, {}) for one in (fitted, spoilt))
    assert [one.scores for one in before] == [one.scores for one in after]


def test_limits_that_nothing_meets_are_refused(problem):
    with pytest.raises(InputError, match="from 2 bytes"):
        within_limits(problem, 1)
    costs = {problem.last: Cost(problem.last, 1.0, 3.0)}
    with pytest.raises(InputError, match=r"--max_time 0\.5"):
        within_limits(problem, None, 0.5, costs)
    with pytest.raises(InputError, match=r"--max_time 0\.5"):  # nothing was measured: the full depth takes all of it
        within_limits(problem, None, 0.5, {})


def test_the_cheapest_by_what_is_weighed():
    slow_small, fast_large, in_between = outcome(4, 1.0, 1.1), outcome(64, 0.5, 1.1), outcome(8, 0.6, 1.1)
    too_weak = outcome(2, 0.1, 0.8)
    outcomes = [slow_small, fast_large, in_between, too_weak]
    for weigh, expected in (("bytes", slow_small), ("time", fast_large), ("both", slow_small)):
        assert cheapest(outcomes, 0.99, weigh) == (expected, True)
    assert cheapest(outcomes, 1.5, "both") == (slow_small, False)


def test_an_uncertain_pipeline_comes_after_a_certain_one():
    certain, uncertain = outcome(8, 1.0, 1.1, low=1.08), outcome(4, 1.0, 1.1, low=0.99)
    assert cheapest([certain, uncertain], 0.99, "bytes") == (certain, True)
    assert cheapest([uncertain], 0.99, "bytes") == (uncertain, True)


def test_each_of_several_tasks_has_to_be_retained():
    retained, lost = Interval(1.1, 1.08, 1.2), Interval(-0.2, -math.inf, math.inf)
    for tasks in ((retained, lost), (lost, retained), (retained, Interval(0.0, -math.inf, math.inf))):
        cheap = Outcome(Pipeline("1", "variance", 4, "int8"), 4, 1.0, (1.0, 1.0), tasks)
        assert cheap.after_margin == -math.inf
        assert cheapest([cheap, certain := outcome(8, 1.0, 1.1)], 0.99, "bytes") == (certain, True)


def test_the_front_is_what_brute_force_finds():
    rng = np.random.default_rng(0)
    outcomes = [
        outcome(int(b), float(t), float(k))
        for b, t, k in zip(rng.integers(1, 9, 40), rng.integers(1, 5, 40) / 4, rng.random(40).round(1), strict=True)
    ]

    def beats(a, b):
        better = (a.bytes <= b.bytes, a.time <= b.time, a.worst >= b.worst)
        return all(better) and (a.bytes, a.time, a.worst) != (b.bytes, b.time, b.worst)

    expected = [one for one in outcomes if not any(beats(other, one) for other in outcomes)]
    assert sorted(map(id, pareto_front(outcomes))) == sorted(map(id, expected))


def test_bytes_are_those_of_the_encoder(problem, fitted):
    for pipeline in (
        Pipeline("6", metric, 30, dtype)
        for metric, dtype in (("variance", "float32"), ("whitened", "int8"), ("invariant", "bit"))
    ):
        assert fitted.encoder(pipeline).bytes_per_protein == pipeline.bytes
