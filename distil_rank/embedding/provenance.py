"""How a store was made: versions, machine, MLflow run, time. Kept beside the store's content, not in its digest.

store/provenance.json   {"extractions": [{"versions", "machine", "computed", "residues", "seconds", "run"}, ...],
                         further facts by name}
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
from importlib.metadata import version
from typing import Any

import torch

from distil_rank.embedding.storage import Storage

logger = logging.getLogger(__name__)

FILE = "provenance.json"
PACKAGES = ("distil-rank", "torch", "fair-esm", "pyarrow")


def read_provenance(storage: Storage) -> dict[str, Any]:
    """What is recorded, with `extractions` in order; a file that cannot be read is warned of, and taken as empty."""
    try:
        content = json.loads(storage.read_bytes(FILE))
        if isinstance(content["extractions"], list) and all(isinstance(one, dict) for one in content["extractions"]):
            return dict(content)
        reason = "it has no list of extractions"
    except FileNotFoundError:
        return {"extractions": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    logger.warning("%s cannot be read (%s): going on without what it records", storage.where(FILE), reason)
    return {"extractions": []}


def embedding_run(storage: Storage) -> str | None:
    """The MLflow run of the last extraction; None where none is recorded."""
    runs = [one["run"] for one in read_provenance(storage)["extractions"] if one.get("run")]
    return runs[-1] if runs else None


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine up to this process's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of what the vectors are computed with, and the machine."""
    cuda = device.type == "cuda"
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": memory_of(device),
        },
    }
