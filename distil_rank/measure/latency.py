"""Time callables beside one another, fairly.

On a shared machine a single measurement can be off by a factor of a hundred. Candidates therefore take turns, so that
what slows the machine slows them all; each turn repeats a call until it is long against the clock's resolution; and
what counts is the median, with the 95th percentile beside it. Autograd is off: a layer in use records no graph.
(`torch.utils.benchmark` times one candidate after another: a busy minute would be charged to whichever was running.)
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class LayerLatency:
    """A dense layer beside its replacement at one batch size; microseconds per call."""

    batch: int
    threads: int
    device: str
    repeats: int
    dense_us: float
    dense_p95_us: float
    student_us: float
    student_p95_us: float
    ratio: float  # of the medians
    paired_ratio: float  # median over neighbouring turns; where the two disagree, the machine was too busy to tell


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 50,
    warmup: int = 5,
    min_time: float = 1e-3,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Seconds per call of each candidate, `(repeats,)`, in turns, under `torch.inference_mode` and torch's own threads.

    Every other round goes through the candidates backwards, so that none always runs in another's cache. In its turn a
    call is repeated until at least `min_time` seconds are over. On CUDA the clock is read only once the device is idle.
    """
    device = torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        calls = {}
        for name, call in candidates.items():
            for _ in range(warmup):
                call()
            quickest = min(_seconds(call, 1, device) for _ in range(3))  # the least disturbed
            calls[name] = max(1, math.ceil(min_time / max(quickest, 1e-9)))
        order = list(candidates)
        for _ in range(repeats):
            for name in order:
                samples[name].append(_seconds(candidates[name], calls[name], device))
            order.reverse()
    return {name: np.array(taken) for name, taken in samples.items()}


def compare_layers(
    dense: nn.Linear, student: nn.Module, batches: Sequence[int] = (1, 32, 256), threads: int = 1, repeats: int = 50
) -> list[LayerLatency]:
    """A dense layer beside its replacement on Gaussian rows, on the device and in the type of the dense layer."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    with torch_threads(threads):
        for batch in batches:
            x = torch.randn(batch, dense.in_features, generator=generator).to(dense.weight)
            calls = {"dense": partial(dense, x), "student": partial(student, x)}
            timings = time_interleaved(calls, repeats=repeats, device=x.device).values()
            slow, fast = (1e6 * seconds for seconds in timings)
            speed = [figure for one in (slow, fast) for figure in (float(np.median(one)), p95(one))]
            speed += [speed[0] / speed[2], paired_ratio(slow, fast)]
            rows.append(LayerLatency(batch, threads, str(x.device), repeats, *speed))
    return rows


def p95(samples: np.ndarray) -> float:
    """The least sample that 95 % of the samples do not exceed."""
    return float(np.quantile(samples, 0.95, method="inverted_cdf"))


def paired_ratio(slow: np.ndarray, fast: np.ndarray) -> float:
    """Median of the ratios of samples taken in the same round: the speed-up that a slow minute cannot move.

    >>> paired_ratio(np.array([2.0, 200.0, 4.0]), np.array([1.0, 100.0, 1.0]))
    2.0
    """
    return float(np.median(slow / fast))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads within an operation, and restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """Processor, cores, GPU if there is one, and the version of torch, on one line: what figures were measured on.

    >>> "torch" in machine()
    True
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    parts = [", ".join(sorted(names)) or platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call, over `calls` of them; calls on a CUDA device return before their work is done."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    start = perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (perf_counter() - start) / calls
