"""The user's batches: passed over as often as needed, put through the model, and masked where they are padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.errors import InputError

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]

HELD_OUT = 5  # without held-out data, every fifth batch is held out


class Batches:
    """The user's data, passed over as often as needed, some of it held out.

    Args:
        data: batches of any structure; a tensor of rows is cut into some.
        held_out: batches to measure on; by default every fifth of `data`.

    Attributes:
        seen: number of batches in the latest pass so far.
    """

    seen = 0

    def __init__(self, data: Iterable[Any] | Tensor, held_out: Iterable[Any] | Tensor | None = None) -> None:
        self.data, self.held_out = _as_batches(data), None if held_out is None else _as_batches(held_out)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Each batch, and whether it is held out."""
        self.seen = 0
        for index, batch in enumerate(self.data):
            self.seen += 1
            yield batch, self.held_out is None and index % HELD_OUT == HELD_OUT - 1
        for batch in () if self.held_out is None else self.held_out:
            self.seen += 1
            yield batch, True

    @property
    def unrepeatable(self) -> str | None:
        """Why a second pass would not see the same; None where it would."""
        if isinstance(self.data, Iterator) or isinstance(self.held_out, Iterator):
            return "Expected data that can be passed over again but got an iterator; give a list or loader."
        if self.held_out is None and isinstance(getattr(self.data, "sampler", None), torch.utils.data.RandomSampler):
            return (
                "Expected batches in the same order each time, so that what is held out stays so, but the loader"
                " shuffles; use shuffle=False or give `held_out`."
            )
        return None


def _as_batches(data: Iterable[Any] | Tensor) -> Iterable[Any]:
    return data.split(max(1, min(256, -(-len(data) // (2 * HELD_OUT))))) if isinstance(data, Tensor) else data


def call_model(model: nn.Module, batch: Any) -> Any:
    """Runs a model on a batch as most loaders make them: a mapping of arguments, a tensor, or (inputs, labels, …)."""
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        if isinstance(batch, Mapping):
            return model(**{key: _to_device(value, device) for key, value in batch.items()})
        return model(_to_device(batch[0] if isinstance(batch, tuple | list) else batch, device))
    except TypeError as error:
        raise InputError(
            f"Expected batches that the model takes but it says: {' '.join(str(error).split())[:200]}; give"
            " `forward=lambda model, batch: …` that runs it."
        ) from error


def _to_device(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def attention_mask(batch: Any) -> Tensor | None:
    """The mask that Hugging Face tokenizers put beside the tokens: under its name in a mapping, or as an attribute."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)


def as_mask(value: Any) -> Tensor | None:
    """`(batch, time)` bool, of what a user's `mask` gave.

    Raises:
        InputError: not that shape, or not zeros and ones: a mask that is added to attention means the opposite.
    """
    if value is None:
        return None
    mask = torch.as_tensor(value)
    if mask.ndim > 2 and mask.numel() == mask.shape[0] * mask.shape[-1]:  # (batch, 1, 1, time), as attention has it
        mask = mask.reshape(mask.shape[0], -1)
    if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        actual = f"shape {tuple(mask.shape)}, {mask.min():g} to {mask.max():g}"
        raise InputError(f"Expected a mask (batch, time) of 1 for tokens and 0 for padding but got {actual}.")
    return mask.bool()
