"""What the numbers of a vector depend on: the one record that stores, encoders, students and predictors share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from distil_rank.errors import InputError

MUST_AGREE = ("dim", "weights_sha256", "layer", "pooling")  # for one to take what was fitted to others


@dataclass(frozen=True)
class VectorOrigin:
    """Where vectors come from; None where that is not known.

    Attributes:
        dim: width of the vectors.
        backbone: name of the model.
        weights_sha256: of the model's weights file.
        layer: whose hidden states were pooled, as the store names it.
        pooling: how residues became one vector.
        precision: of the computation.
        long: what was done with proteins above `max_length`.
        max_length: residues that the model takes at once.
        calibration_sha256: of the int8 calibration, where the precision is int8.
        fallback: a sentence where something lesser took the place of what was asked for.
    """

    dim: int | None = None
    backbone: str | None = None
    weights_sha256: str | None = None
    layer: str | None = None
    pooling: str | None = None
    precision: str | None = None
    long: str | None = None
    max_length: int | None = None
    calibration_sha256: str | None = None
    fallback: str | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """From a manifest or a provenance record; other keys are passed over.

        >>> VectorOrigin.of({"dim": 320, "layer": "4", "seconds": 1.5})
        VectorOrigin(dim=320, backbone=None, weights_sha256=None, layer='4', pooling=None, precision=None, \
long=None, max_length=None, calibration_sha256=None, fallback=None)
        """
        return cls(**{field.name: facts.get(field.name) for field in fields(cls)})

    def facts(self) -> dict[str, Any]:
        """What is known, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def difference(self, other: Self, keys: tuple[str, ...]) -> str | None:
        """The first of these keys, known here, that has another value in `other`: in words, or None.

        >>> VectorOrigin(layer="4").difference(VectorOrigin(layer="6"), ("pooling", "layer"))
        'layer 4 where the other has 6'
        """
        for key in keys:
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine is not None and mine != theirs:
                mine, theirs = (
                    f"{value[:12]}…" if key.endswith("sha256") and value else value for value in (mine, theirs)
                )
                return f"{key} {mine} where the other has {theirs}"
        return None

    def check(self, facts: Mapping[str, Any], what: str, whose: str) -> None:
        """Raises `InputError` unless vectors that `facts` tell of, those of `what`, agree with these, those `whose`."""
        if difference := self.difference(VectorOrigin.of(facts), MUST_AGREE):
            raise InputError(
                f"Expected vectors like those that {whose} but those of {what} differ ({difference}); use the "
                "backbone, layer and pooling that belong together."
            )
