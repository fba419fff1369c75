"""Options of evaluate, and of labels wherever they are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelOptions:
    """Where labels come from, and how to read them.

    Attributes:
        source: CSV or TSV table, FASTA file, or .npz; by default what lies with the data.
        column: Column of the table or array of the .npz that holds the label.
        field: Word of each FASTA header that is the label, counted from 1.
        separator: Of the levels of a hierarchical label, coarse to fine.
        names: Of the levels, coarse to fine, separated by commas.
        level: Name of the level that decides whether a hit is right.
    """

    source: str | None = None
    column: str | None = None
    field: int | None = None
    separator: str | None = None
    names: str | None = None
    level: str | None = None
