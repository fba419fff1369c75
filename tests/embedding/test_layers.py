"""How users name layers; their costs from times that are known."""

import threading

import pytest
import torch

from distil_rank.embedding import layers
from distil_rank.embedding.layers import LayerClock, layer_costs, parse_layers, split_source
from distil_rank.errors import InputError

CPU = torch.device("cpu")


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


def test_laps_add_up_over_threads(monkeypatch):
    clock = LayerClock(2, CPU)
    monkeypatch.setattr(clock, "now", lambda: 3.0)

    def batches():
        for _ in range(200):
            clock.lap(1, 1.0)

    threads = [threading.Thread(target=batches) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds.tolist() == [0, 1600, 0]


def test_at_full_depth_the_last_layer_costs_everything():
    clock = LayerClock(3, CPU)
    clock.seconds[:] = 0.2, 1.0, 2.0, 2.0  # of two threads: 2.6 s of 4 s
    costs = layer_costs(clock, 3, seconds=4.0, sequences=500, residues=1000, threads=2)
    assert [cost.share for cost in costs] == pytest.approx([2 / 4, 3 / 4, 1.0])
    assert costs[-1].seconds_per_1000 == 8.0 and costs[0].residues_per_second == 500
    assert all(cost.measured for cost in costs)


def test_layers_that_were_not_run_are_taken_to_cost_what_those_behind_the_first_did():
    clock = LayerClock(2, CPU)
    clock.seconds[:] = 0, 1.0, 2.0
    costs = layer_costs(clock, 4, seconds=3.0, sequences=1, residues=1)
    assert [cost.share for cost in costs] == pytest.approx([1 / 7, 3 / 7])
    assert not costs[0].measured and "about 0.14" in str(costs[0])


def test_a_gpu_is_timed_by_events_of_the_first_batches_that_are_read_at_the_end(monkeypatch):
    waited = []

    class Event:
        def __init__(self, time):
            self.time = time

        def synchronize(self):
            waited.append(self.time)

        def elapsed_time(self, until):
            return until.time - self.time  # milliseconds

    events = map(Event, range(0, 10_000, 500))
    monkeypatch.setattr(LayerClock, "now", lambda self: next(events))
    monkeypatch.setattr(layers, "SAMPLED", 2)
    clock = LayerClock(2, torch.device("cuda"))
    starts = [clock.start() for _ in range(5)]
    assert sum(start is not None for start in starts) == 2
    clock.lap(1, starts[0])
    clock.lap(2, starts[0])
    clock.lap(2, starts[-1])
    assert not waited
    assert clock.seconds.tolist() == [0, 1.0, 1.5], "the last was not timed"
    assert clock.seconds.tolist() == [0, 1.0, 1.5], "each lap counts once"
    assert [cost.share for cost in layer_costs(clock, 2, 100.0, 10, 10)] == [0.4, 1.0], "shares of the whole"


def test_nothing_computed_costs_nothing():
    assert layer_costs(LayerClock(2, CPU), 2, 1.0, 0, 0) == []
