"""What each layer costs, measured while it computes, and what stopping behind each would."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

SAMPLED = 20  # batches that are timed on a GPU, each of whose layers then waits for the one before


class LayerClock:
    """Adds up the seconds of each layer over batches and threads.

    On a CPU every batch counts. On a GPU, whose kernels run on their own, only the first `SAMPLED` do.

    Args:
        layers: Their number.
        device: Where they run.

    Attributes:
        seconds: (layers + 1,); the first entry is what comes before layer 1.
    """

    def __init__(self, layers: int, device: torch.device):
        self.seconds = np.zeros(layers + 1)
        self._lock = threading.Lock()
        self._device = device
        self._left = SAMPLED if device.type == "cuda" else None

    def start(self) -> float | None:
        """The time now; None where this batch is not to be timed."""
        if self._left is not None:
            with self._lock:
                self._left -= 1
            if self._left < 0:
                return None
        return self.now()

    def now(self) -> float:
        """The time when the device has done what it was told to."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, layer: int, since: float | None) -> float | None:
        """Adds the time since then to a layer; returns the time now."""
        if since is None:
            return None
        now = self.now()
        with self._lock:
            self.seconds[layer] += now - since
        return now


@dataclass(frozen=True)
class LayerCost:
    """The cost of a backbone that stops behind a layer.

    Attributes:
        layer: The layer.
        seconds_per_1000: Seconds for 1,000 proteins of those that were measured.
        residues_per_second: Throughput.
        share: Of the time of the full depth.
        measured: Whether the full depth was measured; otherwise every layer that was not run is taken to cost what an
            average one of those behind the first did.
    """

    layer: int
    seconds_per_1000: float
    residues_per_second: float
    share: float
    measured: bool

    def __str__(self) -> str:
        about = "" if self.measured else "about "
        return f"{self.layer}: {self.seconds_per_1000:.3g} s per 1,000 proteins, {about}{self.share:.2f} of full depth"


def layer_costs(
    clock: LayerClock, depth: int, seconds: float, sequences: int, residues: int, threads: int = 1
) -> list[LayerCost]:
    """The cost of stopping behind each layer that was run.

    Args:
        clock: Of the layers that were run.
        depth: Layers of the whole model.
        seconds: Wall-clock time of the extraction; what no layer accounts for (tokenising, pooling, writing) is part of
            the cost at any depth.
        sequences: How many were computed.
        residues: How many were computed.
        threads: Batches that were computed at once.

    >>> clock = LayerClock(3, torch.device("cpu"))
    >>> clock.seconds[:] = 0.5, 1, 1, 1
    >>> [(cost.layer, cost.share) for cost in layer_costs(clock, 4, 4.0, 1000, 250_000)]
    [(1, 0.4), (2, 0.6), (3, 0.8)]
    """
    laps = clock.seconds / threads
    if not laps.sum() > 0 or not sequences:
        return []
    if clock._left is not None:  # a sample: its layers' shares of the whole time
        laps = laps * seconds / laps.sum()
    rest = max(seconds - float(laps.sum()), 0.0)
    upto = rest + laps.cumsum()
    missing = depth - (len(laps) - 1)
    typical = float(laps[2:].mean()) if len(laps) > 2 else float(laps[-1])
    full = float(upto[-1]) + missing * typical
    return [
        LayerCost(layer, 1000 * upto[layer] / sequences, residues / upto[layer], float(upto[layer] / full), not missing)
        for layer in range(1, len(laps))
    ]
