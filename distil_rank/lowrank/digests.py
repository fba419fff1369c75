"""Digests of tensors, the same on every machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_digest(*tensors: Tensor | None) -> str:
    """SHA-256 of tensors, with their shapes and dtypes.

    >>> tensor_digest(torch.zeros(2)) == tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(1, 2))
    True
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
