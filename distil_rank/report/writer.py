"""The one report writer: tables, notes, data and a picture, to the terminal, Markdown, JSON and PNG."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

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
        headline: lines that are shown last on the terminal and first in Markdown.
        headline_title: what stands above them in Markdown.
        data: the result itself, for JSON.
        draw: writes the picture to a path.
    """

    tables: Sequence[Table]
    notes: Sequence[str] = ()
    method: str = ""
    headline: Sequence[str] = ()
    headline_title: str = ""
    data: Mapping[str, Any] | None = None
    draw: Callable[[Path], object] | None = None

    def markdown(self) -> str:
        """All of it, for a file and for the tracking server."""
        parts = []
        if self.headline:
            parts.append(Table("", [self.headline_title], [[line] for line in self.headline]).markdown())
        parts += [(f"### {table.title}\n\n" if table.title else "") + table.markdown() for table in self.tables]
        parts.append("".join(f"- {line}\n" for line in self.notes))
        return "\n".join([*parts, f"{self.method}\n"])

    def show(self) -> None:
        """Print tables, notes and the headline; colours only on a terminal."""
        for table in self.tables:
            table.show()
        show_notes(self.notes)
        if self.headline:
            print()
            show_notes(self.headline)

    def save(self, stem: Path, picture: str | None = None) -> list[Path]:
        """Write STEM.md, STEM.json and STEM.png (or a picture of another name); returns their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = [stem.with_suffix(".md")]
        files[0].write_text(self.markdown())
        if self.data is not None:
            files.append(stem.with_suffix(".json"))
            files[-1].write_text(json.dumps(finite(self.data), indent=1, ensure_ascii=False) + "\n")
        if self.draw is not None:
            files.append(stem.with_name(picture) if picture else stem.with_suffix(".png"))
            self.draw(files[-1])
        return files


def finite(value: Any) -> Any:
    """The same with null for figures that are not numbers, which JSON does not have.

    >>> finite({"a": float("nan"), "b": (1, float("inf"))})
    {'a': None, 'b': [1, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
