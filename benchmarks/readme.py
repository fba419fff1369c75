"""Put measured tables into the README, so that no figure in it is typed by hand.

    python benchmarks/readme.py            write them
    python benchmarks/readme.py --check    exit 1 where the README says something else than results/

A place in the README is marked `<!-- table: FILE [N] -->` … `<!-- /table -->`; it takes the N-th Markdown table (1 is
the first) of FILE.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(r"(<!-- table: (\S+)(?: (\d+))? -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(path: Path, number: int) -> str:
    """One Markdown table of a file."""
    tables = re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE)
    return tables[number - 1]


def filled(text: str) -> str:
    """The README with every table whose file is there."""

    def place(match: re.Match[str]) -> str:
        path = README.parent / match[2]
        return match[1] + table(path, int(match[3] or 1)) + match[4] if path.exists() else match[0]

    return PLACE.sub(place, text)


def main() -> int:
    """Write or check."""
    old = README.read_text()
    new = filled(old)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
