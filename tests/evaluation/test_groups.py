"""Groups on either side."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.evaluation.groups import make_groups
from distil_rank.evaluation.task import make_target
from distil_rank.options.evaluation import LabelOptions

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
        ("kingdom", {}, "--groups out of family, superfamily, fold, none"),
        ("one", {"columns": {"one": ["x"] * len(IDS)}}, "at least 2 groups"),
        (None, {"fit_fraction": 1.5}, "leave something to fit on"),
    ],
)
def test_what_is_refused(choice, options, message):
    with pytest.raises(InputError, match=message):
        make_groups(choice, SCOPE, IDS, **options)


def test_files_that_name_no_group_or_all(tmp_path):
    file = tmp_path / "folds.txt"
    file.write_text("nothing\n")
    with pytest.raises(InputError, match="none of its 1 lines"):
        make_groups(str(file), SCOPE, IDS)
    file.write_text("\n".join(set(SCOPE.levels[2])))
    with pytest.raises(InputError, match="names all of them"):
        make_groups(str(file), SCOPE, IDS)
