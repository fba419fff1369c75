"""Tags that lead from a run to the data behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distil_rank.data.split import DataDescription


def lineage(data: DataDescription) -> dict[str, str]:
    """The data's digest, backbone and split, and the run that made them, if known."""
    tags = {"data_digest": data.digest, "backbone": data.backbone, "split": data.split}
    if data.embedding_run:
        tags["embedding_run"] = data.embedding_run
    if data.fallback:
        tags["fallback"] = data.fallback
    return tags


def lineage_of_vectors(about: Mapping[str, Any]) -> dict[str, str]:
    """The same out of what is known of some vectors: their digest, the run that made them, and a fallback."""
    return {key: str(about[key]) for key in ("embedding_run", "fallback", "digest") if about.get(key)}
