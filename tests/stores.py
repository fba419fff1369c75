"""Stores that are filled by processes which are killed, and what their files hold."""

import random
import time
from pathlib import Path

import torch

from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.run import embed

MAX_TOKENS = 200
ALPHABET = "ACDEFGHIKLMNPQRSTVWY"


def write_fasta(path: Path, number: int, longest: int) -> None:
    dice = random.Random(0)
    with path.open("w") as file:
        for i in range(number):
            file.write(f">p{i}\n{''.join(dice.choices(ALPHABET, k=dice.randint(5, longest)))}\n")


def attempt(fasta, store, backbone, log, layer=None):
    """One run, slowed down a little, that writes down each sequence it computes."""
    torch.set_num_threads(1)
    original = Embedder.embed

    def logged(self, sequences):
        time.sleep(0.005)
        with log.open("a") as file:
            file.write("".join(f"{text}\n" for text in sequences))
        return original(self, sequences)

    Embedder.embed = logged
    # fp32: where auto is bf16, the first batch is computed once more, to compare the two
    embed(fasta, store, backbone=backbone, layer=layer, max_tokens=MAX_TOKENS, accelerator="cpu", precision="fp32")


def content(store: Path) -> dict[str, bytes]:
    """Every file but the provenance, which differs between runs."""
    files = [file for file in sorted(store.iterdir()) if file.is_file() and file.name != "provenance.json"]
    return {file.name: file.read_bytes() for file in files}


def lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0
