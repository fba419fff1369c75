"""Does a recommended pipeline take the time and the bytes that it promised? New proteins, end to end.

    python benchmarks/recommended.py --folder results/recommend/latest --fasta data/sample.fasta.gz

The proteins go through the recommended pipeline into codes, and through the full backbone into vectors, in turns, each
time as a whole `embed`: reading, tokenising, the forward pass, coding and writing. Loading the backbone is timed apart
and left out, since the promise is a share of the time for each protein.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from script import run, save_markdown

from distil_rank.codes.store import CodeStore, load_encoder
from distil_rank.commands.search import search
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.run import embed
from distil_rank.embedding.sequences import read_proteins
from distil_rank.options.codes import SearchOptions

TOLERANCE = 0.15


def main(
    folder: str = "results/recommend/latest",
    fasta: str = "data/sample.fasta.gz",
    proteins: int = 1000,
    rounds: int = 3,
) -> None:
    """Promise and measurement side by side.

    Args:
        folder: what `recommend` left.
        fasta: new proteins.
        proteins: of it, to embed; 0 for all.
        rounds: of both pipelines in turns.
    """
    place = Path(folder)
    options = yaml.safe_load((place / "recommended.yaml").read_text())
    encoder = load_encoder(options.pop("code"))
    content = json.loads((place / "recommendation.json").read_text())
    promised = content["answers"][content["headline"]]["confirmed"]
    seconds: dict[str, list[float]] = {"recommended": [], "full": []}
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / "new.fasta"
        records = read_proteins(Path(fasta))[0][: proteins or None]
        new.write_text("".join(f">{one.id}\n{one.sequence}\n" for one in records))
        runs = {"recommended": {**options, "encoder": encoder}, "full": {**options, "layer": None}}
        for number in range(rounds + 1):  # the first round warms up
            for name, settings in runs.items():
                store = Path(scratch) / f"{name} {number}"
                started = time.perf_counter()
                embed(new, store, **settings)
                taken = time.perf_counter() - started - loading_seconds(options["backbone"])
                if number:
                    seconds[name].append(taken)
        codes = CodeStore.open(Path(scratch) / f"recommended {rounds}")
        queries, hits = search(SearchOptions(str(place / "codes"), str(new), out=f"{scratch}/hits.tsv", output=scratch))
        stored = sum(file.stat().st_size for file in codes.path.glob("vectors-*")) / len(codes)
    report(promised, seconds, encoder.bytes_per_protein, stored, f"{queries:,} queries, {hits:,} hits")


def loading_seconds(backbone: str) -> float:
    """What loading the backbone takes now."""
    started = time.perf_counter()
    load_backbone(backbone)
    return time.perf_counter() - started


def report(promised: dict, seconds: dict[str, list[float]], width: int, stored: float, searched: str) -> None:
    """The table, and whether both promises hold."""
    ratios = [one / full for one, full in zip(seconds["recommended"], seconds["full"], strict=True)]
    share = statistics.median(ratios)
    lines = [
        "| | promised | measured | off by |",
        "|---|---|---|---|",
        f"| time, share of the full backbone's | {promised['time']:.3f} | {share:.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f}) | {share / promised['time'] - 1:+.1%} |",
        f"| bytes of a code | {promised['bytes']} | {width} | {width / promised['bytes'] - 1:+.1%} |",
        f"| bytes of a code's shard on disk, for each protein | | {stored:.1f} | |",
        "",
        f"`search` with these proteins among the codes: {searched}.",
        f"Within {TOLERANCE:.0%}: "
        + ("yes." if abs(share / promised["time"] - 1) <= TOLERANCE and width == promised["bytes"] else "NO."),
    ]
    save_markdown(Path("results/recommended.md"), lines)


if __name__ == "__main__":
    run(main)
