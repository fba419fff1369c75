"""Real proteins that ship: under `data/` in a checkout, inside the package where it is installed."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path("data")  # as seen from the root of a checkout, where make runs
PACKAGED = Path(__file__).parent / "sample_data"  # pyproject.toml has the wheel carry these
LABELLED = "functions"  # 706 proteins, their vectors, names as labels, and clusters
UNLABELLED = "sample"  # 2,000 unrelated proteins and their vectors; in a checkout only


def sample(*names: str) -> str:
    """Where the first of these samples is that can be found, as a path to show and to open.

    In a checkout that is `data/NAME`; elsewhere the package's own copy, which has `LABELLED` and its FASTA file.
    """
    places = [folder / name for name in names for folder in (CHECKOUT, PACKAGED)]
    return str(next((place for place in places if place.exists()), places[0]))
