"""Function against bytes for each protein, a line for each way of coding; the picture of docs/codes.md.

python benchmarks/codes_picture.py          from what `codes.py scope` left in results/codes/scope/
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from script import run

from distil_rank.errors import InputError
from distil_rank.report.figures import STYLE

WAY = re.compile(r"(?:, rank \d+)?(?:, [\d,]+ bytes)$")  # what is left of a name without it is the way of coding


def main(evaluation: str = "results/codes/scope/evaluation.json", picture: str = "docs/codes_scope.png") -> None:
    """Draw it.

    Args:
        evaluation: figures of `codes.py scope`.
        picture: the file to write.
    """
    if not Path(evaluation).is_file():
        raise InputError(f"Expected the figures of `codes.py scope` in {evaluation} but there are none; run it first.")
    content = json.loads(Path(evaluation).read_text())
    headline = "mAP"
    ways: dict[str, list[tuple[int, float]]] = defaultdict(list)
    lines: dict[str, float] = {}
    for entry in content["entries"]:
        name, score = entry["name"], entry["scores"][headline]["value"]
        if entry["bytes"] is not None and WAY.search(name):
            ways[WAY.sub("", name)].append((entry["bytes"], score))
        elif name != "chance" and "student" not in name:
            lines[name] = score
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
        for ax, layer in zip(axes, ("last layer", "early layer"), strict=True):
            mine = {way: sorted(points) for way, points in ways.items() if layer in way or "OPQ of the full" in way}
            for way, points in mine.items():
                baseline = "faiss" in way
                ax.plot(*zip(*points, strict=True), "s:" if baseline else "o-", label=way.removeprefix(f"{layer}, "))
            for name, score in lines.items():
                if name != "early layer, full vector" or layer == "early layer":
                    ax.axhline(score, color="gray", lw=1, ls="--")
                    ax.annotate(name, (256, score), fontsize=8, color="gray", va="bottom", ha="right")
            ax.set(xlabel="bytes stored for each protein", title=layer, xlim=(3, 270), ylim=(0, None))
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.legend(fontsize=8, loc="lower right")
        axes[0].set_ylabel(headline)
        figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    run(main)
