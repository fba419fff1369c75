"""How users name layers."""

import pytest

from distil_rank.embedding.layer_spec import State, parse_layers, split_source
from distil_rank.errors import InputError


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["6"]),
        (4, ["4"]),
        ("4", ["4"]),
        ("3,4,5,6", ["3", "4", "5", "6"]),
        ([6, "4n", 4], ["4", "4n", "6"]),
        ("all", ["1", "2", "3", "4", "5", "6"]),
    ],
)
def test_layers_come_in_ascending_order(layers, expected):
    assert [str(state) for state in parse_layers(layers, 6)] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0", "from 1 to 6"),
        (0, "from 1 to 6"),
        ("3,7", "from 1 to 6"),
        ("4,4", "4 comes twice"),
        ("4n,4,4n", "4n comes twice"),
        ("6n", "always normed"),
        ("last", "as a number"),
        ("3,,4", "as a number"),
        ("-1", "as a number"),
    ],
)
def test_what_is_refused(layers, message):
    with pytest.raises(InputError, match=message):
        parse_layers(layers, 6)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    (tmp_path / "a:4").mkdir()
    (tmp_path / "b").mkdir()
    assert split_source(tmp_path / "a:4") == (tmp_path / "a:4", None)
    assert split_source(f"{tmp_path}/b:4n") == (tmp_path / "b", "4n")
    assert split_source(f"{tmp_path}/b:four") == (tmp_path / "b:four", None)
    assert State.parse("4n").entry == "4n" and State.parse("4").entry == 4
