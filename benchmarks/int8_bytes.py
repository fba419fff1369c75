"""What a byte buys: float and int8 students of one 1280 → 1280 layer, files on disk beside fidelity on held-out rows.

python benchmarks/int8_bytes.py --data my_embeddings.npz
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from distil_rank.compression.int8 import Int8LowRankLinear
from safetensors.torch import save_file
from script import run, save_markdown
from torch import nn

from distil_rank import LowRankLinear, Moments, save
from distil_rank.compression.saved import WEIGHTS
from distil_rank.data.datamodule import EmbeddingDataModule


def main(
    data: str = "data/sample",
    split: Literal["auto", "mmseqs", "clusters", "exact"] = "auto",
    ranks: tuple[int, ...] = (64, 128, 256),
    output: Path = Path("results/int8_bytes.json"),
) -> None:
    """Run the benchmark and print its table.

    Args:
        data: Embeddings of any kind that `distil-rank` reads.
        split: How held-out rows are kept apart.
        ranks: Ranks to try.
        output: Where the figures go.
    """
    rows = EmbeddingDataModule(source=data, split=split)
    rows.setup()
    fit, held_out = torch.cat([rows.rows("train"), rows.rows("val")]), rows.rows("test")
    torch.manual_seed(42)
    teacher = nn.Linear(rows.dim, rows.dim).requires_grad_(False)
    moments, target = Moments.of(fit), teacher(held_out)
    spread = (target - teacher(moments.mean.float())).double().square().sum()

    def measure(name: str, layer: nn.Module, size: int) -> dict[str, Any]:
        residual = (target - layer(held_out)).double().square().sum()
        return {
            "student": name,
            "bytes": size,
            "r2": float(1 - residual / spread),
            "residual": float(residual / spread),
        }

    with tempfile.TemporaryDirectory() as folder:
        save_file(teacher.state_dict(), Path(folder, "dense.safetensors"))
        dense = Path(folder, "dense.safetensors").stat().st_size
        results = [measure("dense, float32", teacher, dense)]
        for rank in ranks:
            layer = LowRankLinear.from_linear(teacher, rank, moments).requires_grad_(False)
            for name, form in (("float32", layer), ("int8", Int8LowRankLinear.from_low_rank(layer))):
                size = (save(form, Path(folder, name)) / WEIGHTS).stat().st_size
                results.append(measure(f"rank {rank}, {name}", form, size))
    text = [
        f"Random teacher, {len(fit)} rows to fit, {len(held_out)} held out; {rows.split_rows.method}.\n",
        "| layer | bytes | smaller | R² | residual (1 − R²) |\n|---|---|---|---|---|",
        *(
            f"| {row['student']} | {row['bytes']:,} | {dense / row['bytes']:.1f}x "
            f"| {row['r2']:.5f} | {row['residual']:.5f} |"
            for row in results
        ),
    ]
    save_markdown(output.with_suffix(".md"), text)
    output.write_text(json.dumps({"data": asdict(rows.description()), "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
