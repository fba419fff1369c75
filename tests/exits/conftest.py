"""A backbone of three layers, and proteins by chance, for the tests of exits."""

import argparse
import random
from pathlib import Path

import pytest
import torch
from esm.model.esm2 import ESM2

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"


def write_proteins(path: Path, count: int, least: int, most: int) -> Path:
    """A FASTA file of so many proteins of so many residues; the same every time."""
    dice = random.Random(0)
    path.write_text(
        "".join(f">p{i}\n{''.join(dice.choices(ALPHABET, k=dice.randint(least, most)))}\n" for i in range(count))
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """ESM-2 of 3 layers, 32 wide."""
    path = tmp_path_factory.mktemp("model") / "esm2_three.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        esm = ESM2(3, 32, 4)
        for parameter in esm.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    state = {f"encoder.sentence_encoder.{key}": value for key, value in esm.state_dict().items()}
    config = argparse.Namespace(encoder_attention_heads=4, token_dropout=True)
    torch.save({"cfg": {"model": config}, "model": state}, path)
    return path
