"""The one report writer: tables, notes, data and a picture, to the terminal, Markdown, JSON and PNG.

Each run's files have a folder of their own, with a link `latest` beside it.
"""

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from distil_rank.artefact import json_text

log = logging.getLogger(__name__)

WIDTH = 100  # characters in a line where the output is not a terminal


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Attributes:
        title: what stands above.
        head: names of the columns; the first is text, the others are figures.
        rows: cells, as shown.
        narrow: columns that are dropped, in this order, on a terminal that is too narrow: figures are never cut.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    narrow: Sequence[str] = ()

    def markdown(self) -> str:
        """As a Markdown table, without the title.

        >>> print(Table("t", ["a", "b"], [["x", "1"]]).markdown())
        | a | b |
        | --- | --- |
        | x | 1 |
        <BLANKLINE>
        """
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    _repr_markdown_ = markdown  # in a notebook

    def show(self) -> None:
        """Print it."""
        console, title, head, rows = _console(), self.title, list(self.head), [list(row) for row in self.rows]
        unlimited = console.options.update(max_width=10_000)
        for name in self.narrow:
            if console.measure(_rich(title, head, rows), options=unlimited).maximum <= console.width:
                break
            if name in head:
                index, title = head.index(name), f"{self.title} (the report has all columns)"
                for line in (head, *rows):
                    del line[index]
        console.print(_rich(title, head, rows))


@dataclass(frozen=True)
class Report:
    """What one command found.

    Attributes:
        tables: shown one under another.
        notes: what a reader must know beside the numbers, one line each.
        method: how it was measured; in Markdown only.
        headline: the answer in a few lines, a table of one column: first in Markdown, last on the terminal.
        data: the result itself, for JSON.
        draw: writes the picture to a path.
    """

    tables: Sequence[Table]
    notes: Sequence[str] = ()
    method: str = ""
    headline: Table | None = None
    data: Mapping[str, Any] | None = None
    draw: Callable[[Path], object] | None = None

    def markdown(self) -> str:
        """All of it, for a file and for the tracking server."""
        tables = [(f"### {table.title}\n\n" if table.title else "") + table.markdown() for table in self.tables]
        headline = self.headline.markdown() if self.headline else ""
        notes = "".join(f"- {line}\n" for line in self.notes)
        return "\n".join(filter(None, [headline, *tables, notes, self.method and f"{self.method}\n"]))

    _repr_markdown_ = markdown  # in a notebook

    def show(self) -> None:
        """Print tables, notes and the headline; colours only on a terminal."""
        for table in self.tables:
            table.show()
        show_notes(self.notes)
        if self.headline:
            show_notes(["", *(line for (line,) in self.headline.rows)])

    def save(self, stem: Path, picture: str | None = None) -> list[Path]:
        """Write STEM.md, STEM.json and STEM.png (or a picture of another name); returns their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = [stem.with_suffix(".md")]
        files[0].write_text(self.markdown())
        if self.data is not None:
            files.append(stem.with_suffix(".json"))
            files[-1].write_text(json_text(self.data) + "\n")
        if self.draw is not None:
            files.append(stem.with_name(picture) if picture else stem.with_suffix(".png"))
            self.draw(files[-1])
        return files


def show_notes(lines: Sequence[str]) -> None:
    """Print notes, one a line, with warnings highlighted."""
    console = _console()
    for line in lines:
        console.print(line, style="bold yellow" if line.startswith(("NOTE", "WARNING")) else None)


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print names and values in two columns, one a line."""
    console = _console()
    console.print(title, style="bold")
    known = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, known), default=0)
    for name, value in known.items():
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        console.print(f"  {name:<{width}}  {text}", style="bold yellow" if name == "fallback" else None)


def number(value: float | None, digits: int = 4) -> str:
    """A figure for a table; small ones keep two significant digits.

    >>> number(0.99671), number(0.0000241), number(None), number(float("nan"))
    ('0.9967', '2.4e-05', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and abs(value) < 10 ** (1 - digits):
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _rich(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("Distil-Rank") else None)
    return table


def run_folder(parent: Path, run_id: str) -> Path:
    """Make `<parent>/<date>-<time>-<start of the run's id>`, which no other run has."""
    folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{run_id[:8]}"
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, place: Path) -> None:
    """Point `latest` to a run's folder, and at `place` every name in it to the latest run's."""
    latest = link(folder.parent / "latest", folder)
    for entry in sorted(folder.iterdir()):
        link(place / entry.name, latest / entry.name)


def link(path: Path, target: Path) -> Path:
    """Make `path` a relative symbolic link to `target`, or a copy of it where the file system has no links.

    Whatever link or copy is there is replaced; returns `path`.
    """
    new = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(os.path.relpath(target, path.parent))
    except OSError as error:
        log.warning("No symbolic links here (%s): %s is a copy of %s.", error.strerror, path, target)
        shutil.copytree(target, new) if target.is_dir() else shutil.copy2(target, new)
    if path.is_dir() and not path.is_symlink():  # an earlier copy; a folder cannot be replaced in one step
        shutil.rmtree(path)
    new.replace(path)
    return path
