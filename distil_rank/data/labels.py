"""Labels of proteins from a table, a FASTA file's headers or the data themselves."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.embedding.sequences import DIALECTS, ID_COLUMNS, name_in_header, open_lines
from distil_rank.errors import InputError

LABEL_COLUMNS = ("label", "labels", "class", "family", "function", "target", "value", "y")
NO_TABLES = {
    b"PK\x03\x04": "an Excel or zip file",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
EXAMPLES = 3  # named in a message about ids that do not match


@dataclass(frozen=True)
class LabelSource:
    """Where labels come from, and how to read them.

    Attributes:
        source: CSV or TSV table, FASTA file, or `.npz`; by default what lies with the data (`labels.tsv` in a store's
            folder, or the labels of the data file).
        column: column of the table or array of the `.npz` that holds the label; by default one called label, class,
            family, target or the like, else the second.
        field: word of each FASTA header that is the label, counted from 1: 2 for SCOPe, whose first is the id.
        separator: what separates the levels of a hierarchical label, coarse to fine; found by itself for labels such
            as a.1.1.1.
        names: names of the levels, coarse to fine, separated by commas.
        level: name of the level that decides whether a found protein is right.
    """

    source: str | None = None
    column: str | None = None
    field: int | None = None
    separator: str | None = None
    names: str | None = None
    level: str | None = None


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

    def aligned(self, ids: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
        """The rows that have a label.

        Args:
            ids: of the data's rows.

        Returns:
            Indices of the labelled rows, their labels, and notes on what does not match.

        Raises:
            InputError: no id matches.
        """
        rows = [row for row, name in enumerate(ids) if name in self.labels]
        if not rows:
            raise InputError(
                f"Expected labels in {self.source} for ids such as {_examples(ids)} but got {len(self.labels):,} for "
                f"ids such as {_examples(self.labels)}; give a table whose ids are the data's."
            )
        notes = list(self.notes)
        if len(rows) < len(ids):
            missing = [name for name in ids if name not in self.labels]
            notes.append(
                f"{len(missing):,} of {len(ids):,} proteins have no label and are left out ({_examples(missing)})"
            )
        present = set(ids)
        if unused := [name for name in self.labels if name not in present]:
            notes.append(f"{len(unused):,} labels in {self.source} are of no protein in the data ({_examples(unused)})")
        return np.array(rows), [self.labels[ids[row]] for row in rows], notes


def read_labels(source: LabelSource) -> LabelTable:
    """Read the labels of a table, of FASTA headers or of an `.npz`.

    Raises:
        InputError: the file is missing or is none of these, a column or header field is absent, a label is empty
            throughout, or one protein has two labels.
    """
    assert source.source is not None
    path = Path(source.source)
    if not path.is_file():
        raise InputError(f"Expected a file of labels at {path} but there is none; give a CSV, TSV, FASTA or .npz file.")
    if path.suffix.lower() == ".npz":
        return _from_npz(path, source.column or "labels")
    text = _text(path)
    if text.lstrip().startswith(">"):
        return _from_headers(path, text, source.field)
    return _from_table(path, text, source.column)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if kind := next((kind for magic, kind in NO_TABLES.items() if start.startswith(magic)), None):
        raise InputError(f"Expected a CSV or TSV table in {path} but got {kind}; save it as CSV (UTF-8).")
    with open_lines(path) as lines:
        return "\n".join(line for _, line in lines)


def _from_headers(path: Path, text: str, field: int | None) -> LabelTable:
    if field is None:
        raise InputError(
            f"Expected --labels.field, the word of each header in {path} that is the label (2 for SCOPe), but got none."
        )
    headers = [line[1:] for line in text.splitlines() if line.startswith(">")]
    pairs = []
    for header in headers:
        words = header.split()
        if not 1 <= field <= len(words):
            raise InputError(
                f"Expected a label as word {field} of every header in {path} but got {header[:40]!r}; choose another "
                "--labels.field."
            )
        pairs.append((name_in_header(header), words[field - 1]))
    return _table(path, pairs, {})


def _from_npz(path: Path, column: str) -> LabelTable:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if column not in archive.files or "ids" not in archive.files:
                raise InputError(
                    f"Expected the arrays `ids` and `{column}` in {path} but got {', '.join(archive.files)}; name one "
                    "with --labels.column."
                )
            ids, labels = archive["ids"], archive[column]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"Expected an .npz file of labels at {path} but it cannot be read ({error}).") from error
    if ids.shape != labels.shape or ids.ndim != 1:
        raise InputError(f"Expected a label for each id in {path} but got {ids.shape} ids and {labels.shape} labels.")
    return _table(path, [(str(name), str(label)) for name, label in zip(ids, labels, strict=True)], {})


def _from_table(path: Path, text: str, column: str | None) -> LabelTable:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **_dialect(path, text.partition("\n")[0]))
        read = [([cell.strip() for cell in line], reader.line_num) for line in reader]
    except csv.Error as error:
        raise InputError(f"Expected a table of labels in {path} but it is malformed ({error}).") from error
    numbered = [(line, number) for line, number in read if any(line)]
    lines = [line for line, _ in numbered]
    if not lines or len(lines[0]) < 2:
        raise InputError(
            f"Expected a table of ids and labels in {path} but got {'one column' if lines else 'nothing'}; separate "
            "columns by commas (.csv) or tabs (.tsv)."
        )
    names = [name.lower() for name in lines[0]]
    has_header = any(name in (*ID_COLUMNS, *LABEL_COLUMNS) for name in names) or column in lines[0]
    header, body = (lines[0], lines[1:]) if has_header else ([f"column {i + 1}" for i in range(len(names))], lines)
    for line, number in numbered:
        if len(line) != len(header):
            raise InputError(f"Expected {len(header)} cells in every line of {path} but line {number} has {len(line)}.")
    id_index, label_index = _columns(path, header, column)
    cells = {name: index for index, name in enumerate(header) if index not in (id_index, label_index)}
    others = {name: {line[id_index]: line[index] for line in body if line[index]} for name, index in cells.items()}
    return _table(path, [(line[id_index], line[label_index]) for line in body], others)


def _dialect(path: Path, first: str) -> dict[str, Any]:
    """How cells are separated: by the file's name, except that many spreadsheets write .csv with semicolons."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix != ".tsv" and ";" in first and "," not in first and "\t" not in first:
        return {"delimiter": ";"}
    return DIALECTS.get(suffix) or {"delimiter": "\t" if "\t" in first else ","}


def _columns(path: Path, header: Sequence[str], column: str | None) -> tuple[int, int]:
    """Which columns hold ids and labels."""
    lower = [name.lower() for name in header]
    id_index = next(
        (lower.index(name) for name in ID_COLUMNS if name in lower and header[lower.index(name)] != column), 0
    )
    if column is not None:
        if column not in header:
            raise InputError(f"Expected a column {column!r} in {path} but got {', '.join(header)}.")
        return id_index, header.index(column)
    named = (lower.index(name) for name in LABEL_COLUMNS if name in lower and lower.index(name) != id_index)
    return id_index, next(named, 1 if id_index == 0 else 0)


def _table(path: Path, pairs: Sequence[tuple[str, str]], columns: Mapping[str, Mapping[str, str]]) -> LabelTable:
    labels: dict[str, str] = {}
    empty = [name for name, label in pairs if not label]
    for name, label in _labelled(pairs):
        if labels.setdefault(name, label) != label:
            raise InputError(
                f"Expected one label for each protein in {path} but {name} has {labels[name]!r} and {label!r}; keep "
                "one, or give several as A|B."
            )
    if not labels:
        raise InputError(f"Expected labels in {path} but every one is empty; choose another --labels.column.")
    repeated = len(pairs) - len(empty) - len(labels)
    notes = [f"{len(empty):,} empty labels in {path} are left out ({_examples(empty)})"] if empty else []
    notes += [f"{repeated:,} repeated lines in {path} are left out"] if repeated else []
    return LabelTable(str(path), labels, columns, tuple(notes))


def _labelled(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((name, label) for name, label in pairs if label)


def _examples(names: Sequence[str] | Mapping[str, str]) -> str:
    first = list(names)[:EXAMPLES]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
