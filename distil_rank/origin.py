"""What the numbers of a vector depend on: the one record that stores, encoders, students and predictors share."""

from collections.abc import Mapping
from typing import Any

from distil_rank.errors import InputError

VECTOR_ORIGIN = (
    "dim",  # width of the vectors
    "backbone",  # name of the model
    "weights_sha256",  # of the model's weights file
    "layer",  # whose hidden states were pooled, as the store names it
    "pooling",  # how residues became one vector
    "precision",  # of the computation
    "long",  # what was done with proteins above `max_length`
    "max_length",  # residues that the model takes at once
    "calibration_sha256",  # of the int8 calibration, where the precision is int8
    "fallback",  # a sentence where something lesser took the place of what was asked for
)
MUST_AGREE = ("dim", "weights_sha256", "layer", "pooling")  # for one to take what was fitted to others


def vector_origin(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of it, out of a manifest or a provenance record; other keys are passed over.

    >>> vector_origin({"dim": 320, "layer": "4", "pooling": None, "seconds": 1.5})
    {'dim': 320, 'layer': '4'}
    """
    return {key: about[key] for key in VECTOR_ORIGIN if about.get(key) is not None}


def check_origin(mine: Mapping[str, Any], theirs: Mapping[str, Any], what: str, whose: str) -> None:
    """Raises `InputError` unless the vectors of `what` agree with those `whose`, in all that is known of the latter."""
    for key in MUST_AGREE:
        known, other = mine.get(key), theirs.get(key)
        if known is not None and known != other:
            if key.endswith("sha256"):
                known, other = f"{known[:12]}…", f"{other[:12]}…" if other else None
            raise InputError(
                f"Expected vectors like those that {whose} but those of {what} differ ({key} {known} where the other "
                f"has {other}); use the backbone, layer and pooling that belong together."
            )
