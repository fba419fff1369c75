"""Options of evaluate and recommend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distil_rank.errors import InputError

Kind = Literal["retrieval", "classification", "multilabel", "regression"]
TaskKind = Literal["auto", "retrieval", "classification", "multilabel", "regression"]


@dataclass(frozen=True)
class LabelOptions:
    """Where labels come from, and how to read them.

    Attributes:
        source: CSV or TSV table, FASTA file, or `.npz`; by default what lies with the data (`labels.tsv` in a store's
            folder, or the labels of the data file).
        column: Column of the table, or array of the `.npz`, that holds the label; by default one called label, class,
            family, target or the like, else the second.
        field: Word of each FASTA header that is the label, counted from 1: 2 for SCOPe, whose first is the id.
        separator: Between the levels of a label, coarse to fine; found by itself in labels such as a.1.1.1.
        names: Names of the levels, coarse to fine, separated by commas.
        level: The level that decides whether a found protein is right.
    """

    source: str | None = None
    column: str | None = None
    field: int | None = None
    separator: str | None = None
    names: str | None = None
    level: str | None = None

    def check(self) -> None:
        """Raises `InputError` for files that are not there and for options that contradict each other."""
        files = [] if self.source is None else [self.source, *self.source.split(",")]
        if files and not (Path(files[0]).is_file() or all(Path(one.strip()).is_file() for one in files[1:])):
            raise InputError(
                f"Expected a file of labels at {self.source} but there is none; give a CSV, TSV, FASTA or .npz file."
            )
        if self.field is not None and (self.field < 1 or self.column is not None):
            raise InputError(
                f"Expected --labels.field from 1, without --labels.column, but got {self.field} and {self.column}; "
                "give a field for FASTA headers, a column for tables."
            )
        names = [name.strip() for name in (self.names or "").split(",")]
        if self.names is not None and (not all(names) or len(set(names)) < len(names)):
            raise InputError(f"Expected different --labels.names, coarse to fine, but got {self.names!r}.")
        if self.names is not None and self.level is not None and self.level not in names:
            raise InputError(f"Expected --labels.level out of {', '.join(names)} but got {self.level!r}.")
