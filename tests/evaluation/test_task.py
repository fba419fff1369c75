"""Labels turned into tasks."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.evaluation.task import make_target
from distil_rank.options.evaluation import LabelOptions


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["1.5", "2", "3e1"], "regression"),
        (["k|m", "k", "m"], "multilabel"),
        (["a.1.1.1", "b.2.2.2"], "retrieval"),
        (["k"] * 30 + ["m"] * 30, "classification"),
        (["k"] * 3 + ["m"] * 3, "retrieval"),
        (["1", "0"] * 40, "classification"),  # two numbers are classes
    ],
)
def test_the_kind_is_recognised(labels, kind):
    options = LabelOptions(level="family") if labels[0] == "a.1.1.1" else LabelOptions()
    if labels[0] == "a.1.1.1":
        labels = [*labels, "a.1.1.1"]
    assert make_target(labels, options).kind == kind


def test_levels_of_a_hierarchy():
    target = make_target(["a.1.1.1", "a.1.1.2", "a.2.1.1", "b.1.1.1", "b.1.1.1"], LabelOptions())
    assert target.relevance.names == ("family", "superfamily", "fold")
    assert target.relevance.level == 1
    assert target.levels[2] == ("a.1", "a.1", "a.2", "b.1", "b.1")
    assert target.relevance.levels[0].tolist() == [0, 1, 2, 3, 3]


def test_names_levels_and_separators_of_ones_own():
    labels = ["ePK_AGC_PKA", "ePK_AGC_PKA", "ePK_TK_Src", "Atypical_Alpha_"]
    source = LabelOptions(separator="_", names="group,family", level="family")
    target = make_target(labels, source)
    assert target.relevance.names == ("family", "group") and target.relevance.level == 0
    assert target.levels[1] == ("ePK_AGC", "ePK_AGC", "ePK_TK", "Atypical_Alpha")


def test_several_labels_a_protein():
    target = make_target(["k|m", "m", "z"], LabelOptions(), "multilabel")
    assert target.classes == ("k", "m", "z")
    assert target.y.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert target.subset(np.array([2])).y.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "kind", "source", "message"),
    [
        (["k", "k"], "auto", LabelOptions(), "at least two classes"),
        (["k", "m", "z"], "retrieval", LabelOptions(), "at least two proteins"),
        (["k|m", "k"], "classification", LabelOptions(), "one class for each protein"),
        (["1", "nan", "2"], "regression", LabelOptions(), "finite targets but got 1"),
        (["1", "x"], "regression", LabelOptions(), "a number for each protein"),
        (["1", "1"], "regression", LabelOptions(), "targets that differ"),
        (["a.1", "a"], "auto", LabelOptions(separator="."), "labels of 2 levels"),
        (["a.1", "a.2"], "auto", LabelOptions(separator=".", names="x,y,z"), "up to 2 different names"),
        (["a.1.1.1", "a.1.1.1", "b.1.1.1"], "auto", LabelOptions(level="kingdom"), "family, superfamily, fold"),
        (["1.5", "2.5", "3"], "auto", LabelOptions(level="class"), "several levels but got .class. for a regression"),
    ],
)
def test_what_is_refused(labels, kind, source, message):
    with pytest.raises(InputError, match=message):
        make_target(labels, source, kind)
