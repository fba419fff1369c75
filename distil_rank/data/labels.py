"""Labels of proteins from a table, a FASTA file's headers or the data themselves."""

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from distil_rank.embedding.sequences import DIALECTS, ID_COLUMNS, accession, name_in_header, open_lines
from distil_rank.errors import InputError, examples
from distil_rank.options.evaluation import LabelOptions

LABEL_COLUMNS = ("label", "labels", "class", "family", "function", "target", "value", "y")
NO_TABLES = {
    b"PK\x03\x04": "an Excel or zip file",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
# Cells without label.
MISSING = {"", "-", "?", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None"}
DECIMAL_COMMA = re.compile(r"[-+]?\d+(,\d+)?([eE][-+]?\d+)?")


@dataclass(frozen=True)
class LabelTable:
    """Labels by protein.

    Attributes:
        source: where they were read.
        labels: text of the label by id; proteins without one are absent.
        columns: the other columns of the table by name, each by id.
        notes: what was left out, in words.
    """

    source: str
    labels: Mapping[str, str]
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, source: str, pairs: Sequence[tuple[str, str]], columns: Mapping[str, Mapping[str, str]] | None = None
    ) -> Self:
        """Labels out of ids and texts: ids shortened to accessions, missing labels left out, decimal commas read.

        Raises:
            InputError: no protein has a label, or one has two.
        """
        present = [(accession(name), label.strip()) for name, label in pairs if label.strip() not in MISSING]
        labels: dict[str, str] = {}
        for name, label in present:
            if labels.setdefault(name, label) != label:
                raise InputError(
                    f"Expected one label for each protein in {source} but {name} has {labels[name]!r} and {label!r}; "
                    "keep one, or give several as A|B."
                )
        if not labels:
            raise InputError(f"Expected labels in {source} but every one is empty; choose another --labels.column.")
        empty = [name for name, label in pairs if label.strip() in MISSING]
        notes = [f"{len(empty):,} empty labels in {source} are left out ({examples(empty)})"] if empty else []
        if repeated := len(present) - len(labels):
            notes.append(f"{repeated:,} repeated lines in {source} are left out")
        if long := next((name for name, _ in pairs if name != accession(name)), None):
            notes.append(f"ids in {source} are shortened to accessions: {long} to {accession(long)}")
        if any("," in label for label in labels.values()) and all(map(DECIMAL_COMMA.fullmatch, labels.values())):
            labels = {name: label.replace(",", ".") for name, label in labels.items()}
            notes.append(f"decimal commas in {source} are read as points")
        return cls(source, labels, columns or {}, tuple(notes))

    def aligned(self, ids: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
        """Indices of the rows that have a label, their labels, and notes on what does not match.

        Raises:
            InputError: no id matches.
        """
        rows = [row for row, name in enumerate(ids) if name in self.labels]
        if not rows:
            raise InputError(
                f"Expected labels in {self.source} for ids such as {examples(ids)} but got {len(self.labels):,} for "
                f"ids such as {examples(self.labels)}; give a table whose ids are the data's."
            )
        notes = list(self.notes)
        if missing := [name for name in ids if name not in self.labels]:
            notes.append(
                f"{len(missing):,} of {len(ids):,} proteins have no label and are left out ({examples(missing)})"
            )
        present = set(ids)
        if unused := [name for name in self.labels if name not in present]:
            notes.append(f"{len(unused):,} labels in {self.source} are of no protein in the data ({examples(unused)})")
        return np.array(rows), [self.labels[ids[row]] for row in rows], notes


def read_labels(options: LabelOptions) -> LabelTable:
    """Read the labels of a table, of FASTA headers or of an `.npz`; labels such as NA, None, - or ? count as none.

    Raises:
        InputError: the file is missing or is none of these, a column or header field is absent, no protein has a
            label, or one has two.
    """
    assert options.source is not None
    path = Path(options.source)
    if not path.is_file():
        raise InputError(f"Expected a file of labels at {path} but there is none; give a CSV, TSV, FASTA or .npz file.")
    others: Mapping[str, Mapping[str, str]] = {}
    if path.suffix.lower() == ".npz":
        pairs = _from_npz(path, options.column or "labels")
    else:
        with path.open("rb") as file:
            start = file.read(4)
        if kind := next((kind for magic, kind in NO_TABLES.items() if start.startswith(magic)), None):
            raise InputError(f"Expected a CSV or TSV table in {path} but got {kind}; save it as CSV (UTF-8).")
        with open_lines(path) as lines:
            text = "\n".join(line for _, line in lines)
        if text.lstrip().startswith(">"):
            pairs = _from_headers(path, text, options.field)
        else:
            pairs, others = _from_table(path, text, options.column)
    cells = chain(*pairs, *(column.values() for column in others.values()))
    if spoilt := next((cell for cell in cells if "\ufffd" in cell), None):  # two labels may have become one
        raise InputError(f"Expected UTF-8 text in {path} but got {spoilt!r} of another encoding; save it as UTF-8.")
    return LabelTable.of(str(path), pairs, others)


def _from_headers(path: Path, text: str, field: int | None) -> list[tuple[str, str]]:
    """Ids and labels in the headers of a FASTA file."""
    if field is None:
        raise InputError(
            f"Expected --labels.field, the word of each header in {path} that is the label (2 for SCOPe), but got none."
        )
    headers = [line[1:] for line in text.splitlines() if line.startswith(">")]
    if short := next((header for header in headers if not 1 <= field <= len(header.split())), None):
        raise InputError(
            f"Expected a label as word {field} of every header in {path} but got {short[:40]!r}; choose another "
            "--labels.field."
        )
    return [(name_in_header(header), header.split()[field - 1]) for header in headers]


def _from_npz(path: Path, column: str) -> list[tuple[str, str]]:
    """Ids and labels in the arrays of an `.npz`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if column not in archive.files or "ids" not in archive.files:
                raise InputError(
                    f"Expected the arrays `ids` and `{column}` in {path} but got {examples(archive.files)}; name one "
                    "with --labels.column."
                )
            ids, labels = archive["ids"], archive[column]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"Expected an .npz file of labels at {path} but it cannot be read ({error}).") from error
    if ids.shape != labels.shape or ids.ndim != 1:
        raise InputError(f"Expected a label for each id in {path} but got {ids.shape} ids and {labels.shape} labels.")
    return [(str(name), str(label)) for name, label in zip(ids, labels, strict=True)]


def _from_table(
    path: Path, text: str, column: str | None
) -> tuple[list[tuple[str, str]], Mapping[str, Mapping[str, str]]]:
    """Ids and labels of a table with or without a header, and its other columns."""
    first = text.partition("\n")[0]
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    dialect: dict[str, Any] = DIALECTS.get(suffix) or {"delimiter": "\t" if "\t" in first else ","}
    if suffix != ".tsv" and ";" in first and "," not in re.sub(r"\d,\d", "", first) and "\t" not in first:
        dialect = {"delimiter": ";"}  # many spreadsheets write .csv so
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **dialect)
        numbered = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
        raise InputError(f"Expected a table of labels in {path} but it is malformed ({error}).") from error
    lines = {number: line for number, line in numbered if any(line)}
    if torn := next((number for number, line in lines.items() if any("\n" in cell for cell in line)), None):
        raise InputError(f"Expected a record in every line of {path} but a quote runs on into line {torn}; close it.")
    header = next(iter(lines.values()), [])
    if len(header) < 2:
        raise InputError(
            f"Expected a table of ids and labels in {path} but got {'one column' if lines else 'nothing'}; separate "
            "columns by commas (.csv) or tabs (.tsv)."
        )
    for number, line in lines.items():
        if len(line) != len(header):
            raise InputError(f"Expected {len(header)} cells in every line of {path} but line {number} has {len(line)}.")
    body = list(lines.values())
    if column in header or {*ID_COLUMNS, *LABEL_COLUMNS} & {name.lower() for name in header}:
        body = body[1:]
    else:
        header = [f"column {i + 1}" for i in range(len(header))]
    if column is not None and column not in header:
        raise InputError(f"Expected a column {column!r} in {path} but got {examples(header)}.")
    ids = _first_named(ID_COLUMNS, ["" if name == column else name for name in header], 0)
    label = _first_named(LABEL_COLUMNS, ["" if i == ids else name for i, name in enumerate(header)], int(ids == 0))
    label = label if column is None else header.index(column)
    others = {
        name: {accession(line[ids]): line[i] for line in body if line[i] not in MISSING}
        for i, name in enumerate(header)
        if i not in (ids, label)
    }
    return [(line[ids], line[label]) for line in body], others


def _first_named(wanted: Iterable[str], header: Sequence[str], default: int) -> int:
    """The index of the first of the wanted names that a header has."""
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in wanted if name in lower), default)
