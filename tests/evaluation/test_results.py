"""Results: what is written is JSON, and the documentation names every key."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from distil_rank.data.split import DataDescription
from distil_rank.evaluation import results
from distil_rank.evaluation.results import (
    OURS,
    RECIPE,
    ComparisonRow,
    Curve,
    ParetoPoint,
    Result,
    Spectrum,
    TeacherCheck,
    TeacherResult,
)
from distil_rank.measure.latency import LayerLatency
from distil_rank.measure.statistics import Interval
from distil_rank.report.tables import comparison_report

METRICS = ("r2", "centred_cosine", "knn_overlap", "cosine_p5", "cosine", "relative_mse")


def comparison_row(method, r2=0.9, **options):
    metrics = {name: Interval(r2, r2 - 0.1, r2 + 0.1) for name in METRICS}
    return ComparisonRow(method, 10, metrics, 1.0, False, **options)


def saved(result, stem):
    return comparison_report(result).save(stem)[1]


def a_result(*comparison):
    teacher = TeacherResult(
        teacher="random",
        check=TeacherCheck(3.0),
        rank=8,
        rank_requested="auto",
        rank_note="",
        shape=(32, 32),
        parameters={"dense": 1056, "student": 544, "ratio": 1056 / 544, "break_even_rank": 16.0},
        predicted_r2=0.9,
        held_out_r2=0.8,
        held_out_note=None,
        comparison=list(comparison) or [comparison_row(method) for method in ("svd", "closed_form", RECIPE, OURS)],
        latency=[LayerLatency(32, 1, "cpu", 5, 2.0, 2.5, 1.0, 1.5, 2.0, 2.0)],
        spectrum=Spectrum([1.0, 0.5], [1.0, 0.1]),
        curves={OURS: Curve([0, 1], [0.2, 0.1], [0.3, 0.2])},
        training_note="",
        validation_optimum=0.1,
        pareto=[ParetoPoint(1, 0.5, 0.4, 0.3, 0.5, 0.6, 20)],
    )
    data = DataDescription("x.npz", "abc", 32, {"train": 10, "val": 5, "test": 5}, "exact duplicates")
    return Result(data=data, teachers=[teacher], seconds=1.5)


def test_what_is_not_a_number_becomes_null(tmp_path):
    result = a_result(comparison_row("svd", r2=math.nan), comparison_row(OURS))
    path = saved(result, tmp_path / "summary")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["schema"] == 2 and content["teachers"][0]["comparison"][0]["metrics"]["r2"]["value"] is None


def test_the_documentation_names_every_key():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    pending, keys = [Result], set()
    while pending:
        hints = typing.get_type_hints(pending.pop())
        keys |= hints.keys()
        for hint in hints.values():
            pending += [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
    assert len(keys) > 60
    assert not [key for key in keys if f"`{key}`" not in page], "docs/report.md documents each key of the JSON"
    assert f"`schema` is {results.SCHEMA}" in page
