"""Low-rank distillation of projection layers on protein embeddings.

The names below load on first use, so `import distil_rank` costs nothing. Those of `__all__` bring neither Lightning nor
MLflow; the Lightning classes (`EmbeddingDataModule`, `TeacherModule`, `DistilModule` and their callbacks) do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil_rank.compression.compress import compress
    from distil_rank.compression.saved import load, save
    from distil_rank.data.datamodule import EmbeddingDataModule as EmbeddingDataModule
    from distil_rank.lowrank.low_rank import LowRankLinear
    from distil_rank.lowrank.moments import Moments
    from distil_rank.training.callbacks import KeepIfBetter as KeepIfBetter
    from distil_rank.training.callbacks import LogFidelity as LogFidelity
    from distil_rank.training.callbacks import LogLatency as LogLatency
    from distil_rank.training.distil import DistilModule as DistilModule
    from distil_rank.training.teacher import TeacherModule as TeacherModule

__all__ = ["LowRankLinear", "Moments", "compress", "load", "save"]

_HOMES = {
    "LowRankLinear": "lowrank.low_rank",
    "Moments": "lowrank.moments",
    "compress": "compression.compress",
    "load": "compression.saved",
    "save": "compression.saved",
    "EmbeddingDataModule": "data.datamodule",
    "TeacherModule": "training.teacher",
    "DistilModule": "training.distil",
    "KeepIfBetter": "training.callbacks",
    "LogFidelity": "training.callbacks",
    "LogLatency": "training.callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
