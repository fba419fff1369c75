"""Rows whose directions differ in variance, for the tests of training."""

from pathlib import Path

import numpy as np
import pytest

from distil_rank.data.datamodule import EmbeddingDataModule


@pytest.fixture
def data(tmp_path: Path) -> EmbeddingDataModule:
    """400 rows of 16 dimensions."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 16)) @ (generator.normal(size=(16, 16)) * np.logspace(0, -1, 16)) + 2.0
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    module = EmbeddingDataModule(str(tmp_path / "x.npy"), split="exact", batch_size=32)
    module.setup()
    return module
