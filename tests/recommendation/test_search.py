"""The search over pipelines, on the labelled sample."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.representations import full_vector
from distil_rank.evaluation.task import Groups, Target
from distil_rank.measure.statistics import Interval, ratio
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation import pipelines
from distil_rank.recommendation.pipelines import Cost, Fitted, Pipeline, full_pipeline, grid
from distil_rank.recommendation.problem import CONFIRM, FIT, VALIDATE, Task, open_problem
from distil_rank.recommendation.search import (
    LIKELY,
    Evaluator,
    Outcome,
    choose,
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


def outcome(bytes, time, value, low=None, likely=0.9):
    pipeline = Pipeline("1", "variance", bytes, "int8")
    return Outcome(
        pipeline, bytes, time, (value,), (Interval(value, value - 0.01 if low is None else low, 2.0),), likely
    )


def no_ties(one, other):
    return False


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
    assert evaluator.full({}).retained[0] == Interval(1, 1, 1)


def test_every_pipeline_within_the_limits_is_compared(problem, fitted):
    outcomes, answers = search_pipelines(Evaluator(fitted, VALIDATE), within_limits(problem, 16), {}, 0.9)
    assert len(grid(problem)) == 48 and {one.pipeline for one in outcomes} == {
        one for one in grid(problem) if one.bytes <= 16
    }
    smallest = answers["smallest"]
    assert smallest == answers["fastest"] and smallest.likely >= LIKELY  # no time was measured
    saving = {one.pipeline: one.likely * np.log(1280 / one.bytes) for one in outcomes if one.likely >= LIKELY}
    assert smallest.bytes == max(saving, key=saving.get).bytes


@pytest.mark.parametrize("seed", range(3))
def test_both_precisions_give_the_same_three_answers(problem, fitted, seed):
    """With as much noise as bf16 adds to the sample's last layer: what is level is tied by cost, not by noise."""
    x = problem.layers[problem.last]
    noise = np.random.default_rng(seed).normal(size=x.shape) * np.linalg.norm(x, axis=1, keepdims=True)
    layers = {problem.last: (x + 0.005 * noise / x.shape[1] ** 0.5).astype(np.float32)}
    pipelines = [one for one in within_limits(problem, 256) if one.dtype != "float32"]
    exact, rounded = (
        search_pipelines(Evaluator(one, VALIDATE), pipelines, {}, 0.99)[1]
        for one in (fitted, Fitted(replace(problem, layers=layers)))
    )
    assert {name: one.pipeline for name, one in exact.items()} == {name: one.pipeline for name, one in rounded.items()}


def test_the_confirmation_groups_change_nothing_before_the_confirmation(problem, fitted):
    changed = {name: x.copy() for name, x in problem.layers.items()}
    for x in changed.values():
        x[problem.split == CONFIRM] = 7.0
    spoilt = Fitted(replace(problem, layers=changed))
    pipelines = within_limits(problem, 4)
    before, after = (search_pipelines(Evaluator(one, VALIDATE), pipelines, {}, 0.99)[0] for one in (fitted, spoilt))
    assert [one.scores for one in before] == [one.scores for one in after]


def test_limits_that_nothing_meets_are_refused(problem):
    with pytest.raises(InputError, match="from 2 bytes"):
        within_limits(problem, 1)
    costs = {problem.last: Cost(problem.last, 1.0, 3.0)}
    with pytest.raises(InputError, match=r"--max_time 0\.5"):
        within_limits(problem, None, 0.5, costs)
    with pytest.raises(InputError, match=r"--max_time 0\.5"):  # nothing was measured: the full depth takes all of it
        within_limits(problem, None, 0.5, {})


def test_three_answers():
    slow_small, fast_large, fast_small = outcome(4, 1.0, 1.1), outcome(64, 0.5, 1.2), outcome(8, 0.5, 1.15)
    too_weak, top = outcome(2, 0.1, 0.8, likely=0.1), outcome(128, 0.9, 1.3)
    outcomes = [slow_small, fast_large, fast_small, too_weak, top]
    expected = {"fastest": fast_small, "smallest": slow_small, "best": top}
    assert choose(outcomes, no_ties, True, 1280) == expected
    assert choose(outcomes, no_ties, False, 1280) == expected | {"fastest": fast_large}  # bytes are no cost
    level = choose(outcomes, lambda one, other: {one.bytes, other.bytes} == {128, 8}, True, 1280)
    assert level["best"] == fast_small, "the cheapest of those that tie with the highest"
    unlikely = outcome(9, 1.0, 0.9, likely=0.2)
    assert choose([too_weak, unlikely], no_ties, True, 1280)["smallest"] == unlikely


def test_an_answer_saves_most_in_expectation():
    """By brute force: the geometric mean of what many tries save, nothing where a claim is not confirmed."""
    options = [outcome(4, 0.3, 1.0, likely=0.55), outcome(8, 0.5, 1.1, likely=0.95), outcome(64, 0.8, 1.2, likely=1.0)]
    luck = np.random.default_rng(0).random(10_000)
    for cost, full, name in (("bytes", 1280, "smallest"), ("time", 1.0, "fastest")):
        saved = [np.log(np.where(luck < one.likely, full / getattr(one, cost), 1.0)).mean() for one in options]
        assert choose(options, no_ties, True, 1280)[name] == options[int(np.argmax(saved))]
    nearly = [replace(options[0], likely=0.49), options[2]]
    assert choose(nearly, no_ties, True, 1280)["smallest"] == options[2], "likelier to fail than not"


def test_what_costs_the_same_and_ties_is_decided_by_simplicity_and_not_by_noise():
    simple, level = (
        outcome(8, 1.0, 1.1),
        replace(outcome(8, 1.0, 1.1001), pipeline=Pipeline("1", "invariant", 8, "int8")),
    )
    assert choose([simple, level], lambda *_: True, True, 1280)["fastest"] == simple
    assert choose([simple, level], no_ties, True, 1280)["fastest"] == level


def test_each_of_several_tasks_has_to_be_retained(fitted):
    evaluator, pipeline = Evaluator(fitted, VALIDATE), Pipeline("6", "variance", 4, "int8")
    evaluator.trials = [replace(evaluator.trials[0], reference=ratio(np.ones(40)))] * 2
    retained, lost = ratio(np.linspace(1.1, 1.2, 40)), ratio(np.linspace(-0.3, 0.1, 40))
    for tasks in ([retained, lost], [lost, retained], [retained, ratio(np.zeros(40))]):
        evaluator.statistics[pipeline] = tasks
        assert evaluator.chance_of_confirmation(pipeline, 0.99) == 0
    evaluator.statistics[pipeline] = [retained, retained]
    assert evaluator.chance_of_confirmation(pipeline, 0.99) > 0.9


@pytest.mark.parametrize("metric", ["mcc", "accuracy", "macro_f1", "accuracy 1nn"])
def test_chance_is_never_certified(problem, metric):
    """Five proteins of one class among 706."""
    y = np.zeros(len(problem.split), dtype=int)
    y[[np.flatnonzero(problem.split == split)[i] for split, i in ((0, 0), (0, 9), (0, 50), (1, 3), (2, 3))]] = 1
    task = Task("few", Target("classification", y=y, classes=("no", "yes")), np.arange(len(y)))
    with pytest.raises(InputError, match="no function to retain"):
        Evaluator(Fitted(replace(problem, tasks=(task,))), VALIDATE, metric)


def test_a_classification_is_measured_by_the_probe_itself_before_the_choice(problem):
    y = np.unique(problem.tasks[0].target.relevance.levels[0], return_inverse=True)[1] % 2
    x = problem.layers[problem.last].copy()
    x[:, :2] += 3 * x.std() * np.random.default_rng(0).normal(size=(2, 2))[y]
    task = Task("halves", Target("classification", y=y, classes=("a", "b")), np.arange(len(y)))
    fitted = Fitted(replace(problem, layers={problem.last: x}, tasks=(task,)))
    pipelines = [one for one in grid(fitted.problem) if one.dtype == "int8" and one.rank <= 64]
    evaluator = Evaluator(fitted, VALIDATE)
    _, answers = search_pipelines(evaluator, pipelines, {}, 0.9)
    for one in answers.values():
        assert evaluator.outcome(one.pipeline, {}, 0.9).scores == one.scores


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


def test_times_are_those_of_the_pass_that_made_most_of_the_vectors(tmp_path, request):
    store = shutil.copytree(request.config.rootpath / "data" / "functions", tmp_path / "store")
    problem = open_problem(str(store), LabelOptions())
    assert pipelines.layer_costs(problem) == ({}, pipelines.layer_costs(problem)[1])

    def made(computed, share):
        cost = {"layer": 6, "share": share, "seconds_per_1000": 40.0}
        return {"computed": computed, "layer_costs": [cost | {"layer": 5, "share": 0.8}, cost] if share else []}

    passes = [made(3, 0.2), made(700, 1.0), made(900, None)]  # the last by workers that measured nothing
    (store / "provenance.json").write_text(json.dumps({"extractions": passes}))
    costs, words = pipelines.layer_costs(problem)
    assert costs == {"6": Cost("6", 1.0, 40.0)} and "700 of the vectors" in words
    for wrong in ({"computed": "x", "layer_costs": 7}, made("x", 1.0), made(5, "half"), made(5, 2.0), {}):
        (store / "provenance.json").write_text(json.dumps({"extractions": [wrong]}))
        assert pipelines.layer_costs(problem)[0] == {}
