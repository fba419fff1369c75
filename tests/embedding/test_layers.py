"""How users name layers; their costs."""

import pytest

from distil_rank.embedding.layers import layer_costs, parse_layers, split_source
from distil_rank.errors import InputError


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["6"]),
        (4, ["4"]),
        ("4", ["4"]),
        ("3,4,5,6", ["3", "4", "5", "6"]),
        ("all", ["1", "2", "3", "4", "5", "6"]),
    ],
)
def test_layers_come_in_ascending_order(layers, expected):
    assert [str(layer) for layer in parse_layers(layers, 6)] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0", "from 1 on"),
        (0, "from 1 on"),
        ("3,7", "from 1 to 6"),
        ("4,4", "4 comes twice"),
        ("4n", "from 1 on"),
        ("last", "from 1 on"),
        ("3,,4", "from 1 on"),
        ("-1", "from 1 on"),
    ],
)
def test_what_is_refused(layers, message):
    with pytest.raises(InputError, match=message):
        parse_layers(layers, 6)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    (tmp_path / "a:4").mkdir()
    (tmp_path / "b").mkdir()
    assert split_source(tmp_path / "a:4") == (tmp_path / "a:4", None)
    assert split_source(f"{tmp_path}/b:4") == (tmp_path / "b", 4)
    assert split_source(f"{tmp_path}/b:four") == (tmp_path / "b:four", None)


def test_every_layer_has_an_equal_part_of_the_time():
    costs = layer_costs(3, 6, seconds=4.0, sequences=500)
    assert [cost["layer"] for cost in costs] == [1, 2, 3]
    assert [cost["share"] for cost in costs] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert costs[-1]["seconds_per_1000"] == 8.0, "what was measured"
    assert layer_costs(6, 6, 4.0, 500)[-1]["share"] == 1
