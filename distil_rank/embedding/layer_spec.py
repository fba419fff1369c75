"""Which layers' hidden states to pool, as users write them: `3,4,5,6`, `4n`, `all`; and `store:4` for one of several.

`4` is the output of layer 4, as fair-esm's `repr_layers=[4]` gives it. `4n` is the same after the model's final norm:
the output of a backbone that ends there. The last layer always has its norm, as in fair-esm, and is plain `6`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distil_rank.embedding.location import is_remote
from distil_rank.embedding.storage import Location
from distil_rank.errors import InputError

STATE = re.compile(r"(\d+)(n?)")  # a layer as it is written

Layers = int | str | Sequence[int | str] | None  # as `parse_layers` takes them


class State(NamedTuple):
    """The hidden states behind one layer.

    Attributes:
        layer: Counted from 1.
        normed: Whether the final norm is applied although the layer is not the last.
    """

    layer: int
    normed: bool = False

    @classmethod
    def parse(cls, text: object) -> State:
        """Reads `4` or `4n`.

        Raises:
            InputError: anything else.

        >>> State.parse(4), str(State.parse("4n"))
        (State(layer=4, normed=False), '4n')
        """
        match = STATE.fullmatch(str(text).strip())
        if match is None:
            raise InputError(f"Expected a layer as a number, or as a number and n, but got {str(text)!r}.")
        return cls(int(match[1]), bool(match[2]))

    def __str__(self) -> str:
        return f"{self.layer}{'n' if self.normed else ''}"

    @property
    def entry(self) -> int | str:
        """As in a manifest: a plain layer is a number."""
        return str(self) if self.normed else self.layer


def parse_layers(layers: Layers, depth: int, model: str = "the model") -> list[State]:
    """The states that are asked for, in ascending order.

    Args:
        layers: `None` for the last layer, `all` for every layer from 1, else one or several.
        depth: The model's layers.
        model: Its name, for errors.

    Raises:
        InputError: a layer that the model lacks, or one that comes twice.

    >>> [str(state) for state in parse_layers("6,4n,4", 6)], len(parse_layers("all", 33))
    (['4', '4n', '6'], 33)
    """
    if layers is None:
        return [State(depth)]
    if isinstance(layers, str) and layers.strip() == "all":
        return [State(layer) for layer in range(1, depth + 1)]
    parts = layers.split(",") if isinstance(layers, str) else [layers] if isinstance(layers, int) else list(layers)
    states = [State.parse(part) for part in parts]
    for state in states:
        if not 1 <= state.layer <= depth:
            raise InputError(f"Expected layers from 1 to {depth} of {model} but got {state}.")
        if state.normed and state.layer == depth:
            raise InputError(f"Expected the last layer of {model} as {depth}, which is always normed, but got {state}.")
    if repeated := next((state for state in states if states.count(state) > 1), None):
        raise InputError(f"Expected different layers but {repeated} comes twice in {','.join(map(str, states))}.")
    return sorted(states)


def split_source(source: Location) -> tuple[Location, str | None]:
    """Path and layer of `PATH:LAYER`; a path that exists as it is written has no layer. An address stays a string.

    >>> split_source("no/store:4n"), split_source("no/store")
    ((PosixPath('no/store'), '4n'), (PosixPath('no/store'), None))
    >>> split_source("s3://bucket/store:4n"), split_source("s3://bucket/store")
    (('s3://bucket/store', '4n'), ('s3://bucket/store', None))
    """
    path, colon, layer = str(source).rpartition(":")
    kind = str if is_remote(source) else Path
    if not colon or not STATE.fullmatch(layer) or Path(source).exists():
        return kind(source), None
    return kind(path), layer
