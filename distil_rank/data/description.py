"""What a report says of the data behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitSizes:
    """Rows in each part of a split."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class DataDescription:
    """Where embeddings come from, how many there are and how they were split.

    Attributes:
        source: the store or file, or `synthetic`.
        digest: SHA-256 over the vectors and the split, its first 16 hexadecimal digits.
        dim: d, the width of an embedding.
        rows: of each part.
        split: how the parts were kept apart, in words.
        backbone: the model that made the vectors, or `unknown`.
        pooling: how residues became one vector, or `unknown`.
        fallback: a sentence where something lesser took the place of what was asked for.
        embedding_run: the MLflow run that extracted the vectors.
    """

    source: str
    digest: str
    dim: int
    rows: SplitSizes
    split: str
    backbone: str = "unknown"
    pooling: str = "unknown"
    fallback: str | None = None
    embedding_run: str | None = None
