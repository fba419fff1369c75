"""Keep the README and docs/ true: their tables come out of results/, and what they tell users to type exists.

    python benchmarks/pages.py            put the measured tables in
    python benchmarks/pages.py --check    exit 1, with a line each, where a page says something else than results/, or
                                          names a make target, a variable, a command, an option or a script that is not

A place in a page is marked `<!-- table: FILE [N] -->` … `<!-- /table -->`; it takes the N-th Markdown table (1 is the
first) of FILE, which the command beside it writes, and below it the machine that FILE names in its line `Machine: …`.
`results/` is not tracked: a place whose FILE is absent, or not finished, stays.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from functools import cache
from pathlib import Path

from distil_rank.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- table: (\S+)(?: (\d+))? -->\n).*?(<!-- /table -->)", re.DOTALL)
EMPTY = "-->\n<!-- /table"
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
MACHINE_LINE = re.compile(r"^(?:- )?Machine: (.*)$", re.MULTILINE)
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """The README and what it leads to."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill_tables(text: str) -> str:
    """A page with every table whose file is there."""

    def place(match: re.Match[str]) -> str:
        path, number = ROOT / match[2], int(match[3] or 1)
        content = path.read_text() if path.exists() else ""
        tables, machine = TABLE.findall(content), MACHINE_LINE.search(content)
        if len(tables) < number:
            return match[0]
        return match[1] + tables[number - 1] + (f"\n*Measured on: {machine[1]}*\n" if machine else "") + match[4]

    return PLACE.sub(place, text)


def code(text: str) -> list[str]:
    """Command lines out of a page's code blocks and spans; a line that ends in a backslash goes on."""
    parts = [(block or span).replace("\\\n", " ") for block, span in CODE.findall(text)]
    return [" ".join(line.split("#")[0].split()) for part in parts for line in part.splitlines()]


@cache
def options(command: str) -> str:
    """What `distil-rank COMMAND --help` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return output.getvalue()


def unknown_names(text: str) -> list[str]:
    """What a page names that does not exist."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    uses = {match[1]: match[2].split() for match in re.finditer(r"^USES_([a-z-]+) := (.*)$", makefile, re.MULTILINE)}
    wrong = []
    for line in code(text):
        if match := re.match(r"make ([a-z-]+)(.*)", line):
            wrong += [f"make {match[1]}"] if match[1] not in targets else []
            quoted = re.sub(r'"[^"]*"', "", match[2])
            known = ["ARGS", "PYTHON", *uses.get(match[1], [])]
            wrong += [f"make {match[1]} {name}=" for name in re.findall(r"\b([A-Z]+)=", quoted) if name not in known]
        elif match := re.match(r"distil-rank ([a-z-]+)(.*)", line):
            if match[1] not in COMMANDS:
                wrong.append(f"distil-rank {match[1]}")
                continue
            for option in re.findall(r"--[a-z_0-9.]+", match[2]):
                if option != "--help" and not re.search(rf"{re.escape(option)}\b", options(match[1])):
                    wrong.append(f"distil-rank {match[1]} {option}")
        for script in re.findall(r"\b(?:benchmarks|configs|data|notebooks)/\w+\.\w+", line):
            wrong += [] if any((place / script).exists() for place in (ROOT, ROOT / "distil_rank")) else [script]
    return wrong


def run() -> int:
    """Write or check."""
    if "--check" not in sys.argv:
        for page in pages():
            page.write_text(fill_tables(page.read_text()))
        return 0
    wrong = []
    for page in pages():
        text = page.read_text()
        wrong += [f"{page.name}: {name} does not exist" for name in unknown_names(text)]
        wrong += [f"{page.name}: its tables are not those of results/"] if fill_tables(text) != text else []
        wrong += [
            f"{page.name}: the place of {place[2]} is empty" for place in PLACE.finditer(text) if EMPTY in place[0]
        ]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run())
