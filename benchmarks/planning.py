"""Planning a store: time and memory for each number of proteins, out of core and with dictionaries in memory.

    python benchmarks/planning.py
    python benchmarks/planning.py --proteins '[65000000]' --dictionaries 0

Proteins are synthetic: 30 to 129 residues of a random sequence, and its number in 7 more; one in twenty repeats the
sequence of an earlier one. Each measurement is a process of its own, and the engines take turns. The baseline keeps
names and digests in Python dictionaries and writes the same table.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from script import machine_line, run

from distil_rank.embedding.planning import BATCH_ROWS, PROTEINS
from distil_rank.embedding.sequences import CleaningReport, iter_records
from distil_rank.embedding.store_writer import StoreWriter

SETTINGS = {"dim": 320, "pooling": "mean", "long": "window", "max_length": 1022}
LETTERS = "ACDEFGHIKLMNPQRS"
REPEATED = 20  # one in so many


def write_fasta(path: Path, proteins: int) -> None:
    """Writes synthetic proteins."""
    draw = random.Random(0)
    text = "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=1_000_000))
    with path.open("w") as file:
        for number in range(proteins):
            chosen = draw.randrange(number) if number % REPEATED == REPEATED - 1 else number
            start, length = chosen * 7919 % 990_000, 30 + chosen * 31 % 100
            suffix = "".join(LETTERS[int(digit, 16)] for digit in f"{chosen:07x}")
            file.write(f">P{number:08d} synthetic\n{text[start : start + length]}{suffix}\n")


def with_dictionaries(fasta: Path, store: Path) -> None:
    """The table of proteins, with all names and digests in memory."""
    row_of: dict[bytes, int] = {}

    def lines() -> Iterator[tuple[object, ...]]:
        for protein in iter_records(fasta, CleaningReport(str(fasta))):
            digest = hashlib.sha256(protein.sequence.encode()).digest()
            row = row_of.setdefault(digest[:16], len(row_of))
            yield protein.id, protein.sequence, digest, len(protein.sequence), row, ""

    rest = lines()
    store.mkdir()
    with pa.ipc.new_file(store / "proteins-00000.arrow", PROTEINS) as writer:
        while block := list(islice(rest, BATCH_ROWS)):
            columns = zip(zip(*block, strict=True), PROTEINS, strict=True)
            writer.write_batch(pa.record_batch([pa.array(c, field.type) for c, field in columns], schema=PROTEINS))


def out_of_core(fasta: Path, store: Path) -> None:
    """What `distil-rank embed` does before it computes."""
    writer, report = StoreWriter(store), CleaningReport(str(fasta))
    with writer.storage.lock():
        writer.plan(iter_records(fasta, report), SETTINGS, {"backbone": "none", "fallback": None}, report)


ENGINES = {"out of core": out_of_core, "dictionaries": with_dictionaries}


def measure(engine: str, fasta: Path, store: Path) -> dict[str, float]:
    """CPU seconds and peak memory in bytes of a process of its own."""
    command = [sys.executable, __file__, "measured", engine, str(fasta), str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measured(engine: str, fasta: Path, store: Path) -> None:
    """Prints what `measure` reads."""
    cpu = time.process_time()
    ENGINES[engine](fasta, store)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"cpu": time.process_time() - cpu, "memory": memory}))


def main(
    proteins: tuple[int, ...] = (1_000_000, 10_000_000),
    dictionaries: int = 1_000_000,
    output: Path = Path("results/planning.md"),
) -> None:
    """Measure, print, and check that both engines write the same table.

    Args:
        proteins: How many, ascending.
        dictionaries: The most proteins to plan in memory as well.
        output: Where the table goes.
    """
    rows: list[str] = []
    first: dict[str, float] = {}
    for number in proteins:
        with tempfile.TemporaryDirectory() as folder:
            fasta = Path(folder) / "synthetic.fasta"
            write_fasta(fasta, number)
            for engine in ENGINES if number <= dictionaries else ["out of core"]:
                store = Path(folder) / engine.replace(" ", "_")
                result = measure(engine, fasta, store)
                growth = result["memory"] / first.setdefault(engine, result["memory"])
                rows.append(
                    f"| {number:,} | {engine} | {1e6 * result['cpu'] / number:.1f} | "
                    f"{result['memory'] / 1e9:.2f} GB | {growth:.2f} |"
                )
                print(rows[-1], flush=True)
            tables = [hashlib.sha256(file.read_bytes()).digest() for file in Path(folder).glob("*/proteins-*.arrow")]
            if len(set(tables)) != 1:
                sys.exit("The engines wrote different tables.")
    header = "| proteins | engine | CPU µs a protein | peak memory of the process | times the first |"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([f"{machine_line()}\n", header, "|---|---|---|---|---|", *rows]) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measured"]:
        measured(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        run(main)
