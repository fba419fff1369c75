"""Protein sequences from FASTA or tables: parsed as a stream, cleaned, and every change counted.

Cleaning removes whitespace, digits, alignment gaps and a stop `*` at the end, and converts lowercase to uppercase. An
inner stop becomes `X`, and so does `J` (leucine or isoleucine), for which ESM-2 has no token. `B`, `Z`, `U`, `O` and
`X` have tokens and stay. Empty and repeated records are left out; a repeated name with another sequence gets a number.
Anything else is an error that names file, line and record.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from distil_rank.errors import InputError, examples

ID_COLUMNS = ("id", "accession", "entry", "name", "protein_id", "uniprot", "protein", "header")
SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_sequence")
DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ","},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # quotes are ordinary characters: 5" end, 3' end
    ".tab": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
MISSING = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "none"}  # cells without a sequence
DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}

NUCLEOTIDES = set("ACGTUN")

_CLEAN = re.compile("[ACDEFGHIKLMNPQRSTVWYX]+")
_NOT_ALLOWED = re.compile("[^A-Z*]")
_DIGITS, _GAPS, _RARE = re.compile("[0-9]"), re.compile(r"[-.~]"), re.compile("[BZUO]")
_UNIPROT = re.compile(r"(?:sp|tr)\|([^|\s]+)\|")
_DESCRIPTIONS = {  # of the counts, in the summary line
    "lowercase": "in lowercase",
    "gaps": "with gaps removed",
    "digits": "with digits removed",
    "stops": "with stops removed",
    "unknown": "with J or an inner stop replaced by X",
    "rare": "with B, Z, U or O",
    "empty": "empty records left out",
    "repeated": "repeated records left out",
    "renamed": "renamed because the name is repeated",
    "unnamed": "without a name",
    "comments": "comment lines ignored",
    "nucleotides": "that look like DNA or RNA",
}


@dataclass(frozen=True)
class Protein:
    """A name and its cleaned amino-acid sequence."""

    id: str
    sequence: str


@dataclass
class CleaningReport:
    """Number of records read and kept, and of records with each kind of change, in `counts`."""

    source: str
    counts: Counter[str] = field(default_factory=Counter)

    def count_names(self, repeated: int, renamed: int) -> None:
        """Counts records of `iter_records` that repeat another, and those whose name had to change."""
        for kind, number in (("repeated", repeated), ("renamed", renamed)):
            if number:
                self.counts[kind] += int(number)
        self.counts["kept"] -= int(repeated)

    def __str__(self) -> str:
        changes = [
            f"{self.counts[key]:,} {description}" for key, description in _DESCRIPTIONS.items() if self.counts[key]
        ]
        return ", ".join([f"{self.counts['kept']:,} of {self.counts['records']:,} records kept", *changes])


class _Record(NamedTuple):
    name: str
    sequence: str
    line: int


def read_proteins(path: str | Path) -> tuple[list[Protein], CleaningReport]:
    """Cleaned proteins with unique names, in the order of the file, and what changed; errors as `iter_records`."""
    report, names, proteins = CleaningReport(str(path)), UniqueNames(), []
    for record in iter_records(path, report):
        name = names.resolve(record.id, record.sequence)
        report.count_names(repeated=name is None, renamed=name not in (None, record.id))
        if name is not None:
            proteins.append(Protein(name, record.sequence))
    return proteins, report


def iter_records(path: str | Path, report: CleaningReport) -> Iterator[Protein]:
    """Yields cleaned proteins, whose names may repeat, in the order of the file and counts the changes in `report`.

    The path is FASTA, or a `.csv`/`.tsv` with a sequence column; plain or compressed; `-` is standard input (FASTA).

    Raises:
        InputError: the file is missing, damaged or not FASTA, a record is not of amino acids, or no protein is left.
    """
    with open_lines(path) as lines:
        dialect = DIALECTS.get(Path(uncompressed_name(path)).suffix.lower())
        records = _table_records(lines, dialect, path) if dialect else _fasta_records(lines, report, path)
        for record in records:
            report.counts["records"] += 1
            name = record.name or f"protein_{report.counts['records']}"
            report.counts["unnamed"] += not record.name
            sequence = _cleaned(record, name, report)
            if not sequence:
                report.counts["empty"] += 1
                continue
            report.counts["kept"] += 1
            yield Protein(name, sequence)
    if not report.counts["kept"]:
        raise InputError(
            f"Expected protein sequences in {report.source} but none is left of {report.counts['records']} records; "
            "give a FASTA file, or a table with a sequence column."
        )


class UniqueNames:
    """Makes names unique in the order of the file: repeated records are dropped, other repeated names get a number.

    >>> names = UniqueNames()
    >>> [names.resolve(name, sequence) for name, sequence in [("a", "MK"), ("a", "MV"), ("a", "MK"), ("a_2", "MM")]]
    ['a', 'a_2', None, 'a_2_2']
    """

    def __init__(self) -> None:
        self._sequence_of: dict[str, Hashable] = {}
        self._last_number: Counter[str] = Counter()  # given to a repeated name

    def resolve(self, name: str, sequence: Hashable) -> str | None:
        """A unique name for the next record, of this sequence or digest; None where it repeats a record."""
        if self._sequence_of.get(name) == sequence:
            return None
        unique = name
        while unique in self._sequence_of:
            self._last_number[name] += 1
            unique = f"{name}_{self._last_number[name] + 1}"
        self._sequence_of[unique] = sequence
        return unique


def uncompressed_name(path: str | Path) -> str:
    """A file's name without the suffix of a compressed file.

    >>> uncompressed_name("data/mine.fasta.gz")
    'mine.fasta'
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz").removesuffix(".zst")


def _cleaned(record: _Record, name: str, report: CleaningReport) -> str:
    counts, sequence = report.counts, "".join(record.sequence.split())
    if not _CLEAN.fullmatch(sequence):
        if sequence.isascii():  # upper() turns some non-letters into letters
            counts["lowercase"] += sequence != sequence.upper()
            sequence = sequence.upper()
        for kind, pattern in (("digits", _DIGITS), ("gaps", _GAPS)):
            sequence, removed = pattern.subn("", sequence)
            counts[kind] += removed > 0
        invalid = _NOT_ALLOWED.search(sequence)
        if invalid:
            raise InputError(
                f"Expected amino-acid letters in {report.source}, record {name} at line {record.line}, "
                f"but got {invalid[0]!r}; correct or remove that record."
            )
        without_stop = sequence.rstrip("*")
        counts["stops"] += without_stop != sequence
        counts["unknown"] += "J" in without_stop or "*" in without_stop
        counts["rare"] += _RARE.search(without_stop) is not None
        sequence = without_stop.replace("J", "X").replace("*", "X")
    counts["nucleotides"] += len(sequence) >= 30 and set(sequence) <= NUCLEOTIDES
    return sequence


def _fasta_records(lines: Iterator[tuple[int, str]], report: CleaningReport, path: str | Path) -> Iterator[_Record]:
    name: str | None = None
    start = 0
    parts: list[str] = []
    for number, line in lines:
        if line.startswith(">"):
            if name is not None:
                yield _Record(name, "".join(parts), start)
            name, start, parts = name_in_header(line[1:]), number, []
        elif line.startswith(";"):
            report.counts["comments"] += 1
        elif name is not None:
            parts.append(line)
        elif line.strip():
            raise InputError(
                f"Expected a FASTA header ('>name') in {path}, line {number}, but got {line.strip()[:30]!r}; "
                "give FASTA, or a table that ends in .csv or .tsv."
            )
    if name is not None:
        yield _Record(name, "".join(parts), start)


def name_in_header(header: str) -> str:
    """UniProt's accession, or the header's first word.

    >>> name_in_header("sp|P69905|HBA_HUMAN Hemoglobin"), name_in_header("my protein"), name_in_header(" ")
    ('P69905', 'my', '')
    """
    return accession(next(iter(header.split()), ""))


def accession(name: str) -> str:
    """UniProt's accession in a name such as `sp|P69905|HBA_HUMAN`; another name is unchanged."""
    uniprot = _UNIPROT.match(name)
    return uniprot[1] if uniprot else name


def _unquoted(cell: str) -> str:
    """A cell without surrounding blanks and without the quotes that some programs put around every cell of a `.tsv`."""
    cell = cell.strip()
    return cell[1:-1].strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _table_records(lines: Iterator[tuple[int, str]], dialect: dict[str, Any], path: str | Path) -> Iterator[_Record]:
    csv.field_size_limit(sys.maxsize)  # titin exceeds the default
    reader = csv.reader((line for _, line in lines), strict=True, **dialect)
    try:
        names = [_unquoted(name) for name in next(reader, [])]
        lowered = [name.lower() for name in names]
        columns = [
            next((lowered.index(name) for name in accepted if name in lowered), None)
            for accepted in (ID_COLUMNS, SEQUENCE_COLUMNS)
        ]
        if columns[1] is None:
            raise InputError(
                f"Expected a column named {' or '.join(SEQUENCE_COLUMNS)} in {path} but got "
                f"{examples(names)}; rename the column in the first line."
            )
        for cells in reader:
            if len(cells) > len(names):
                raise InputError(
                    f"Expected {len(names)} cells, as many as column names, in {path}, line {reader.line_num}, but got "
                    f"{len(cells)}; quote cells that hold a comma, or name every column."
                )
            if cells:
                name, sequence = (
                    _unquoted(cells[column]) if column is not None and column < len(cells) else "" for column in columns
                )
                sequence = "" if sequence in MISSING else sequence
                yield _Record(accession(name), sequence, reader.line_num)
    except csv.Error as error:
        raise InputError(f"Expected a table in {path} but line {reader.line_num} is malformed ({error}).") from error


@contextmanager
def open_lines(path: str | Path) -> Iterator[Iterator[tuple[int, str]]]:
    """The numbered text lines of a file or standard input, decompressed, with any line endings."""
    if str(path) == "-":
        if sys.stdin is None:  # as in a process without a console
            raise InputError("Expected FASTA on standard input but this process has none; give a file's path.")
        yield _numbered(sys.stdin.buffer, "standard input")
        return
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        problem = {FileNotFoundError: "it does not exist", IsADirectoryError: "it is a folder"}.get(type(error))
        problem = problem or f"got: {error.strerror}"
        raise InputError(f"Expected a FASTA file at {path} but {problem}; give its path, or - for stdin.") from error
    with file:
        yield _numbered(file, str(path))


def _numbered(file: IO[bytes], source: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        start = file.peek(8)  # type: ignore[attr-defined]  # both a file and stdin's buffer are BufferedReaders
        for magic, decompress in DECOMPRESSORS.items():
            if start.startswith(magic):
                file = decompress(file)
                break
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline=None)
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise InputError(
                    f"Expected text in {source} but line {number} is binary; give a text file, plain or compressed."
                )
            yield number, line.rstrip("\n")
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise InputError(
            f"Expected a whole file in {source} but after line {number} it is cut off or damaged ({error}); "
            "download it again."
        ) from error
