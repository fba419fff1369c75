"""Time and peak memory of an evaluation: synthetic rows of two sizes, each in a process of its own.

    python benchmarks/evaluating.py                      both sizes
    python benchmarks/evaluating.py --rows 14000 --dim 320

Rows are Gaussian around the centres of nested classes (four proteins a family, four families a superfamily, five
superfamilies a fold): time and memory depend on sizes only. Evaluated are the full vector, students of four ranks and
chance, half of the rows fitted on.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from script import machine_line, run

SIZES = ((14_000, 320), (100_000, 1280))


def measure(rows: int, dim: int) -> str:
    """One line of the table: evaluate `rows` vectors of width `dim` in this process."""
    from distil_rank.evaluation.evaluate import evaluate
    from distil_rank.evaluation.representations import full_vector, principal_components
    from distil_rank.evaluation.task import make_groups, make_target
    from distil_rank.options.evaluation import LabelOptions

    rng = np.random.default_rng(0)
    family = np.arange(rows) // 4
    labels = [f"a.{number // 20}.{number // 4}.{number}" for number in family]
    x = rng.standard_normal((rows, dim), dtype=np.float32)
    for level in (family, family // 4):
        x += rng.standard_normal((level.max() + 1, dim), dtype=np.float32)[level]
    target = make_target(labels, LabelOptions())
    groups = make_groups(None, target, labels)
    candidates = [full_vector(x), *(principal_components(x, rank) for rank in (16, 32, 64, 128))]
    started = time.perf_counter()
    done = evaluate(target, groups, candidates)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    notes = "; ".join(note for note in done.notes if note.startswith("FEWER")) or "all evaluated rows are queries"
    return f"| {rows:,} x {dim} | {len(done.entries)} | {seconds:.0f} | {peak:.2f} | {notes} |"


def main() -> None:
    """Every size in a fresh process, so that peak memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int)
    options = parser.parse_args()
    if options.rows:
        print(measure(options.rows, options.dim))
        return
    lines = ["| proteins | representations | seconds | peak memory (GiB) | queries |", "|---|---|---|---|---|"]
    for rows, dim in SIZES:
        command = [sys.executable, __file__, "--rows", str(rows), "--dim", str(dim)]
        lines.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        print(lines[-1])
    Path("results").mkdir(exist_ok=True)
    Path("results/evaluating.md").write_text("\n".join([machine_line(), "", *lines]) + "\n")


if __name__ == "__main__":
    run(main, parse=False)
