"""Labels turned into tasks, and whole groups on either side."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.evaluation.task import make_groups, make_target
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


LABELS = [f"a.{fold}.{sf}.{family}" for fold in range(30) for sf in range(2) for family in (1, 1, 2)]
IDS = [f"p{i}" for i in range(len(LABELS))]
SCOPE = make_target(LABELS, LabelOptions())


def sides_share(values, fit):
    values = np.asarray(values)
    return set(values[fit]) & set(values[~fit])


def test_whole_folds_by_default():
    groups = make_groups(None, SCOPE, IDS)
    assert groups.description.startswith("fold: fitted on 90 proteins of 15 groups")
    assert not sides_share(SCOPE.levels[2], groups.fit)
    assert "INTERVALS ARE TOO NARROW" in groups.description
    assert (make_groups(None, SCOPE, IDS, seed=1).fit != groups.fit).any()


@pytest.mark.parametrize("choice", ["family", "superfamily", "organism", "clusters"])
def test_columns_levels_and_clusters(choice):
    column = [f"o{i % 40}" for i in range(len(IDS))]
    groups = make_groups(choice, SCOPE, IDS, clusters=column, columns={"organism": column}, fit_fraction=0.3)
    values = {"family": SCOPE.levels[0], "superfamily": SCOPE.levels[1]}.get(choice, column)
    assert not sides_share(values, groups.fit)
    assert 0.2 < groups.fit.mean() < 0.4


def test_a_finer_level_where_the_coarse_one_has_few_groups():
    target = make_target([f"{i // 60}_{i // 20}_{i // 2}" for i in range(120)], LabelOptions(separator="_"))
    assert make_groups(None, target, [str(i) for i in range(120)]).description.startswith("level 3: ")


def test_a_file_of_groups_to_fit_on(tmp_path):
    file = tmp_path / "folds.txt"
    file.write_text("\ufeffa.0\r\na.3\r\nz.9\r\n")
    groups = make_groups(str(file), SCOPE, IDS)
    assert set(np.array(SCOPE.levels[2])[groups.fit]) == {"a.0", "a.3"}


def test_a_flat_label_is_its_own_group():
    target = make_target(["k", "k", "m", "m", "z", "z"] * 3, LabelOptions(), "retrieval")
    groups = make_groups(None, target, [str(i) for i in range(18)])
    assert not sides_share(target.levels[0], groups.fit)


def test_classification_keeps_clusters_together():
    target = make_target(["k", "m"] * 30, LabelOptions(), "classification")
    clusters = [f"c{i // 4}" for i in range(60)]
    assert not sides_share(clusters, make_groups(None, target, IDS[:60], clusters=clusters).fit)


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        ("kingdom", {}, "--groups out of family, superfamily, fold, ..."),
        ("one", {"columns": {"one": ["x"] * len(IDS)}}, "at least 2 groups"),
        (None, {"fit_fraction": 1.5}, "leave something to fit on"),
    ],
)
def test_groups_that_are_refused(choice, options, message):
    with pytest.raises(InputError, match=message):
        make_groups(choice, SCOPE, IDS, **options)


def test_files_that_name_no_group_or_all(tmp_path):
    file = tmp_path / "folds.txt"
    file.write_text("nothing\n")
    with pytest.raises(InputError, match="none of its 1 lines"):
        make_groups(str(file), SCOPE, IDS)
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"Expected text in .*folds\.txt but line 1 is binary; give a text file"):
        make_groups(str(file), SCOPE, IDS)
    file.write_text("\n".join(set(SCOPE.levels[2])))
    with pytest.raises(InputError, match="names all of them"):
        make_groups(str(file), SCOPE, IDS)


def test_at_most_three_of_many_columns_are_named():
    columns = {f"column {i}": IDS for i in range(500)}
    with pytest.raises(InputError, match=r"--groups out of column 0, column 1, column 2, \.\.\., or a file .* got 'x'"):
        make_groups("x", SCOPE, IDS, columns=columns)
