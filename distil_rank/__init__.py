"""Low-rank compression of projection layers on protein embeddings.

The names below load on first use, so `import distil_rank` costs nothing; none of them brings Lightning or MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil_rank.compression.compress import compress
    from distil_rank.compression.saved import load, save
    from distil_rank.lowrank.low_rank import LowRankLinear
    from distil_rank.lowrank.moments import Moments

__all__ = ["LowRankLinear", "Moments", "compress", "load", "save"]

_HOMES = {
    "LowRankLinear": "lowrank.low_rank",
    "Moments": "lowrank.moments",
    "compress": "compression.compress",
    "load": "compression.saved",
    "save": "compression.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
