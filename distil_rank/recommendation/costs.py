"""What a pipeline costs, measured on this machine: seconds up to each layer of the backbone, seconds of a query."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distil_rank.codes.index import CodeIndex, has_faiss
from distil_rank.embedding.layers import State
from distil_rank.embedding.run import embed, options_like
from distil_rank.embedding.store import open_storage, read_provenance
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.recommendation.result import Cost

TIMED, TIMED_WIDE, WIDE = 256, 16, 640  # proteins that are timed; fewer where the vectors are at least this wide
QUERIES = 100


def measure_costs(
    layers: Sequence[str | None], about: Mapping[str, Any], sequences: Sequence[str] | None
) -> tuple[dict[str | None, Cost], str]:
    """Time of a backbone that stops behind each layer, on some of the proteins, of all lengths alike.

    By layer, as the store names them; empty where the backbone or the sequences are not at hand. And in words what was
    measured or why not.
    """
    if sequences is None or about.get("backbone") is None or None in layers:
        return {}, "Time was not measured: the vectors do not tell their backbone and layer, or have no sequences."
    states = {name: State.parse(name) for name in layers}
    count = TIMED_WIDE if about.get("dim", 0) >= WIDE else TIMED
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]
    with tempfile.TemporaryDirectory(prefix="distil-rank-") as name:
        fasta = Path(name) / "timed.fasta"
        fasta.write_text("".join(f">{row}\n{sequences[row]}\n" for row in chosen))
        settings = options_like(about, about.get("source"))
        deepest = max(state.layer for state in states.values())
        try:
            embed(fasta, Path(name) / "store", about["backbone"], **{**settings, "layer": deepest})
        except InputError as error:
            return {}, f"Time was not measured: {error}"
        [extraction] = read_provenance(open_storage(Path(name) / "store"))["extractions"]
    measured = {one["layer"]: one for one in extraction["layer_costs"]}
    costs = {
        name: Cost(name, measured[state.layer]["share"], measured[state.layer]["seconds_per_1000"])
        for name, state in states.items()
    }
    return costs, f"Time was measured on {len(chosen):,} of the proteins, of all lengths alike, {about['precision']}."


def query_seconds(encoders: Sequence[CodeEncoder], x: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Median time of one query among all proteins `x (N, d)` of two encoders in turn; None without faiss."""
    if not has_faiss():
        return None
    rows = np.random.default_rng(0).permutation(len(x[0]))[:QUERIES]
    indices, queries = [], []
    for encoder, vectors in zip(encoders, x, strict=True):
        blocks = np.array_split(vectors, max(1, len(vectors) // 8192))
        codes = torch.cat([encoder.encode(torch.from_numpy(np.array(block))) for block in blocks])
        indices.append(CodeIndex(codes.numpy(), encoder))
        queries.append(encoder(torch.from_numpy(vectors[rows])))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(len(rows)):
        for one, (index, some) in enumerate(zip(indices, queries, strict=True)):
            started = time.perf_counter()
            index.search(some[number : number + 1], 10)
            times[one].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])
