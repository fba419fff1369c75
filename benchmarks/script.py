"""What the benchmark scripts share: bad input ends in one line, and results name the machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from distil_rank.cli import configure_output
from distil_rank.errors import InputError
from distil_rank.measure.latency import machine

MACHINE = "Machine: "  # begins the line that `pages.py` looks for


def machine_line() -> str:
    """The line that names this machine."""
    return f"{MACHINE}{machine()}."


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of calls that take turns; a first round warms up and is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def save_markdown(path: Path, lines: list[str]) -> None:
    """Print a results page and write it, after the line that names the machine."""
    text = "\n".join([machine_line(), "", *lines]) + "\n"
    print(text, end="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(main: Callable[..., Any], parse: bool = True) -> None:
    """Run a script's `main`; bad input is one line and exit code 2.

    Args:
        main: the script's work.
        parse: make its signature the command line.
    """
    configure_output(0)
    try:
        if parse:
            auto_cli(main)
        else:
            main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
