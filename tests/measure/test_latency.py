"""The stopwatch against a clock that the test turns: no test here depends on how fast the machine is."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from distil_rank.measure import latency
from distil_rank.measure.latency import (
    LayerLatency,
    compare_layers,
    p95,
    paired_ratio,
    time_interleaved,
    torch_threads,
)


class Clock:
    """Time passes only when a job says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def job(self, name: str, seconds: float):
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "perf_counter", lambda: clock.now)
    return clock


def rounds(log: list[str], warm: int) -> list[str]:
    """The turns after warm-up, repeats of one job in a row put together."""
    turns = log[warm:]
    return [name for index, name in enumerate(turns) if index == 0 or turns[index - 1] != name]


def test_samples_are_seconds_per_call(clock):
    timings = time_interleaved({"a": clock.job("a", 0.5), "b": clock.job("b", 0.125)}, repeats=4, warmup=0)
    assert timings["a"].tolist() == [0.5] * 4
    assert timings["b"].tolist() == [0.125] * 4
    assert p95(timings["a"]) == 0.5
    assert list(timings) == ["a", "b"]


def test_candidates_take_turns_and_every_other_round_goes_backwards(clock):
    jobs = {name: clock.job(name, 1.0) for name in "abc"}
    time_interleaved(jobs, repeats=3, warmup=2)
    warm = 3 * (2 + 3)  # warm-up and calibration
    assert clock.log[warm:] == list("abc") + list("cba") + list("abc")


def test_short_calls_are_repeated_until_the_turn_is_long_enough(clock):
    jobs = {"short": clock.job("short", 2**-16), "long": clock.job("long", 1.0)}
    timings = time_interleaved(jobs, repeats=2, warmup=0, min_time=2**-10)
    assert clock.log.count("short") == 3 + 2 * 2**6
    assert clock.log.count("long") == 3 + 2
    assert np.median(timings["short"]) == pytest.approx(2**-16)


def test_warm_up_and_a_slow_first_call_do_not_count(clock):
    first = iter([100.0])

    def compiled_on_first_use() -> None:
        clock.now += next(first, 1.0)

    assert time_interleaved({"a": compiled_on_first_use}, repeats=3, warmup=1)["a"].tolist() == [1.0, 1.0, 1.0]


def test_a_disturbance_moves_the_95th_percentile_and_not_the_median(clock):
    calls = iter(range(10**6))

    def disturbed() -> None:
        clock.now += 1000.0 if next(calls) % 10 == 9 else 1.0

    timing = time_interleaved({"a": disturbed}, repeats=40, warmup=0)["a"]
    assert np.median(timing) == 1.0
    assert p95(timing) == 1000.0


@pytest.mark.parametrize(("repeats", "expected"), [(1, 0), (20, 18), (100, 94)])
def test_the_95th_percentile_is_a_sample(repeats, expected):
    samples = tuple(float(value) for value in reversed(range(repeats)))
    assert p95(np.array(samples)) == expected


def test_a_slow_minute_moves_the_ratio_of_medians_and_not_the_paired_one():
    speed = [1.0, 1.0, 1.0, 50.0, 70.0]
    dense = np.array([8 * value for value in speed])
    student = np.array(speed)
    assert paired_ratio(dense, student) == 8
    shifted = np.array([50.0, 1.0, 1.0, 50.0, 70.0])
    assert paired_ratio(dense, shifted) == 8
    assert np.median(dense) / np.median(shifted) != 8


def test_autograd_is_off_while_timing():
    seen = []
    time_interleaved({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1, min_time=0)
    assert seen
    assert all(seen)
    assert not torch.is_inference_mode_enabled()


def test_a_cuda_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(latency, "perf_counter", lambda: events.append("clock") or float(len(events)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    time_interleaved({"a": lambda: events.append("work")}, repeats=1, warmup=0, device="cuda")
    assert events[-5:] == ["wait", "clock", "work", "wait", "clock"]
    events.clear()
    time_interleaved({"a": lambda: events.append("work")}, repeats=1, warmup=0)
    assert "wait" not in events


def test_threads_are_stated_and_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_compared_at_each_batch_size(dtype):
    dense = nn.Linear(24, 12, dtype=dtype)
    seen = []

    class Student(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(x.shape), x.dtype))
            return dense(x)

    rows = compare_layers(dense, Student(), batches=(1, 5), threads=1, repeats=3)
    assert [row.batch for row in rows] == [1, 5]
    assert set(seen) == {((1, 24), dtype), ((5, 24), dtype)}
    for row in rows:
        assert isinstance(row, LayerLatency)
        assert (row.threads, row.device, row.repeats) == (1, "cpu", 3)
        assert 0 < row.dense_us <= row.dense_p95_us
        assert 0 < row.student_us <= row.student_p95_us
        assert row.ratio == pytest.approx(row.dense_us / row.student_us)
        assert all(isinstance(value, int | float | str) for value in asdict(row).values())  # goes into JSON as it is


def test_the_ratio_is_how_much_faster_the_student_is(clock):
    class Job(nn.Linear):
        def __init__(self, seconds: float) -> None:
            super().__init__(3, 3)
            self.call = clock.job("", seconds)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.call()
            return x

    (row,) = compare_layers(Job(0.5), Job(0.0625), batches=[2], repeats=3)
    assert (row.dense_us, row.student_us, row.ratio, row.paired_ratio) == (5e5, 62500, 8, 8)
