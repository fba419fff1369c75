"""A model's layers: how users name those to pool (`4`, `3,4,5`, `all`, `STORE:4`), and what each costs.

`4` is the output of layer 4, as fair-esm's `repr_layers=[4]` gives it. The last layer's has the model's final norm.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distil_rank.embedding.storage import Location, is_remote
from distil_rank.errors import InputError
from distil_rank.options.embed import check_layers

SAMPLED = 20  # batches that are timed on a GPU


def parse_layers(layers: int | str | None, depth: int, model: str = "the model") -> list[int]:
    """The layers that are asked for, ascending: None is the last one; `InputError` for one that the model lacks.

    >>> parse_layers("6,4", 6), len(parse_layers("all", 33))
    ([4, 6], 33)
    """
    check_layers(layers)
    if layers is None:
        return [depth]
    if str(layers).strip() == "all":
        return list(range(1, depth + 1))
    numbers = sorted(map(int, str(layers).split(",")))
    if numbers[-1] > depth:
        raise InputError(f"Expected layers from 1 to {depth} of {model} but got {numbers[-1]}.")
    return numbers


def split_source(source: Location) -> tuple[Location, int | None]:
    """Path and layer of `PATH:LAYER`; a path that exists as it is written has no layer. An address stays a string.

    >>> split_source("no/store:4"), split_source("no/store")
    ((PosixPath('no/store'), 4), (PosixPath('no/store'), None))
    >>> split_source("s3://bucket/store:4"), split_source("s3://bucket/store")
    (('s3://bucket/store', 4), ('s3://bucket/store', None))
    """
    path, colon, layer = str(source).rpartition(":")
    kind = str if is_remote(source) else Path
    if not colon or not layer.isdecimal() or Path(source).exists():
        return kind(source), None
    return kind(path), int(layer)


class LayerClock:
    """Adds up the seconds of each layer over batches and threads.

    On a CPU every batch counts. On a GPU, whose kernels run on their own, only the first `SAMPLED` do, by events in its
    stream: nothing waits for them before `seconds` is read.
    """

    def __init__(self, layers: int, device: torch.device):
        self.samples = device.type == "cuda"
        self._seconds = np.zeros(layers + 1)
        self._laps: list[tuple[int, Any, Any]] = []  # layer, and the events before and behind it
        self._device, self._batches, self._lock = device, 0, threading.Lock()

    @property
    def seconds(self) -> np.ndarray:
        """Of each layer, (layers + 1,); the first entry is what comes before layer 1."""
        with self._lock:
            for layer, since, until in self._laps:
                until.synchronize()
                self._seconds[layer] += since.elapsed_time(until) / 1000
            self._laps.clear()
        return self._seconds

    def start(self) -> Any:
        """The time now; None where this batch is not to be timed."""
        with self._lock:
            self._batches += 1
            return None if self.samples and self._batches > SAMPLED else self.now()

    def now(self) -> Any:
        """The time; on a GPU an event that has it when the device has done what it was told to."""
        if not self.samples:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self, layer: int, since: Any) -> None:
        """Adds the time since then to a layer."""
        if since is None:
            return
        now = self.now()
        with self._lock:
            if self.samples:
                self._laps.append((layer, since, now))
            else:
                self._seconds[layer] += now - since


@dataclass(frozen=True)
class LayerCost:
    """The cost of a backbone that stops behind a layer."""

    layer: int
    seconds_per_1000: float  # of the proteins that were measured
    residues_per_second: float
    share: float  # of the time of the full depth
    measured: bool  # the full depth; otherwise a layer that was not run is taken to cost what the average one did

    def __str__(self) -> str:
        about = "" if self.measured else "about "
        return f"{self.layer}: {self.seconds_per_1000:.3g} s per 1,000 proteins, {about}{self.share:.2f} of full depth"


def layer_costs(
    clock: LayerClock, depth: int, seconds: float, sequences: int, residues: int, threads: int = 1
) -> list[LayerCost]:
    """The cost of stopping behind each layer that was run, in a model of some depth; nothing if nothing was computed.

    Wall-clock time that no layer accounts for (tokenising, pooling, writing) is part of the cost at any depth.

    >>> clock = LayerClock(3, torch.device("cpu"))
    >>> clock.seconds[:] = 0.5, 1, 1, 1
    >>> [(cost.layer, cost.share) for cost in layer_costs(clock, 4, 4.0, 1000, 250_000)]
    [(1, 0.4), (2, 0.6), (3, 0.8)]
    """
    laps = clock.seconds / threads
    if not laps.sum() > 0 or not sequences:
        return []
    if clock.samples:  # its layers' shares of the whole time
        laps = laps * seconds / laps.sum()
    upto = max(seconds - float(laps.sum()), 0.0) + laps.cumsum()
    missing = depth - (len(laps) - 1)
    typical = float(laps[2:].mean()) if len(laps) > 2 else float(laps[-1])
    full = float(upto[-1]) + missing * typical
    return [
        LayerCost(layer, 1000 * upto[layer] / sequences, residues / upto[layer], float(upto[layer] / full), not missing)
        for layer in range(1, len(laps))
    ]
