"""What a run stands on: the tags that lead from it to its data."""

from __future__ import annotations

from typing import Any


def lineage(about: dict[str, Any]) -> dict[str, str]:
    """Tags that tell a run what it stands on."""
    tags = {"data_digest": about["digest"], "backbone": about["backbone"], "split": about["split"]}
    if about.get("embedding_run"):
        tags["embedding_run"] = about["embedding_run"]
    if about["fallback"]:
        tags["fallback"] = about["fallback"]
    return tags
