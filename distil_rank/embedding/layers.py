"""A model's layers: how users name those to pool (`4`, `3,4,5`, `all`, `STORE:4`), and what each costs.

`4` is the output of layer 4, as fair-esm's `repr_layers=[4]` gives it. The last layer's has the model's final norm.
"""

from pathlib import Path

from distil_rank.embedding.storage import Location, is_remote
from distil_rank.errors import InputError
from distil_rank.options.embed import check_layers


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


def layer_costs(last: int, depth: int, seconds: float, sequences: int) -> list[dict[str, float]]:
    """The time of a backbone that stops behind each layer, from a pass through the first `last` of `depth` layers.

    Layers do the same work, so that each has an equal part. The share is of the time of the full depth.

    >>> layer_costs(2, 4, seconds=3.0, sequences=500)[0]
    {'layer': 1, 'share': 0.25, 'seconds_per_1000': 3.0}
    """
    return [
        {"layer": layer, "share": layer / depth, "seconds_per_1000": 1000 * seconds / sequences * layer / last}
        for layer in range(1, last + 1)
    ]
