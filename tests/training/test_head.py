"""A teacher from labels: what it learns, what folding leaves, and the student that decides as it does."""

import numpy as np
import pytest
import torch
from torch import nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.data.files import Embeddings
from distil_rank.data.split import Split
from distil_rank.evaluation.probes import decide, fit_linear
from distil_rank.evaluation.task import Target
from distil_rank.options.training import HeadOptions
from distil_rank.training.head import agreement, expected_agreement, smallest_student, train_head


def band(rows: int = 2400, kind: str = "classification") -> tuple[EmbeddingDataModule, np.ndarray]:
    """Rows in a band or beside it, which no linear map tells, among columns of unequal scale; or a number of them."""
    dice = np.random.default_rng(0)
    x = dice.normal(size=(rows, 32)).astype(np.float32)
    y = (np.abs(x[:, 0]) > 0.7).astype(np.int64) if kind == "classification" else (7 + 100 * x[:, 0]).astype(np.float32)
    x = x * np.geomspace(0.1, 10, 32, dtype=np.float32) + np.float32(3)
    embeddings = Embeddings([f"p{i}" for i in range(rows)], x)
    split = Split.of(np.repeat([0, 1, 2], [rows // 2, rows // 4, rows // 4]), "given")
    return EmbeddingDataModule.of(embeddings, split, torch.from_numpy(y)), y


@pytest.fixture(scope="module")
def trained():
    data, y = band()
    module, search = train_head(data, "classification", 2, HeadOptions(seconds=120, epochs=25), seed=0)
    return data, y, module, search


def test_a_head_learns_what_a_linear_probe_cannot(trained):
    data, y, module, search = trained
    layer, head = module.folded()
    predicted = decide("classification", head(layer(data.rows("test"))).numpy())
    test = data.split_rows.test
    target = Target("classification", y=y, classes=("in", "out"))
    probe = fit_linear(target, data.embeddings.x, data.split_rows.train, [(data.split_rows.train, data.split_rows.val)])
    linear = decide("classification", data.embeddings.x[test] @ probe.weight.T + probe.bias)
    assert (predicted == y[test]).mean() > 0.8 > (linear == y[test]).mean()
    assert 1 <= search.tried <= 6 and "chosen: lr" in str(search)


def test_folding_changes_nothing(trained):
    data, _, module, _ = trained
    layer, head = module.folded()
    x = data.rows("val")
    with torch.no_grad():
        assert torch.allclose(head(layer(x)), module(x), atol=1e-4)
    assert type(layer) is nn.Linear


def test_numbers_come_out_in_their_own_units():
    data, y = band(800, "regression")
    module, _ = train_head(data, "regression", 1, HeadOptions(seconds=120, epochs=15), seed=0)
    layer, head = module.folded()
    predicted = head(layer(data.rows("test")))[:, 0].numpy()
    assert np.corrcoef(predicted, y[data.split_rows.test])[0, 1] > 0.97 and abs(predicted.mean() - 7) < 30


def test_the_student_has_the_lowest_rank_that_decides_alike(trained):
    data, _, module, _ = trained
    layer, head = module.folded()
    vectors = EmbeddingDataModule.of(data.embeddings, data.split_rows)
    student, curve = smallest_student(layer, head, "classification", vectors, None, 0.99, {"max_steps": 30})
    assert [point.rank for point in curve] == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32]
    assert student.rank < 32
    with torch.no_grad():
        x = data.rows("test")
        assert agreement("classification", head(student(x)), head(layer(x))).mean() > 0.95


def test_expected_agreement_tells_more_than_a_count_of_equal_decisions():
    """No decision of a hundred differs, and yet one of a thousand would."""
    dice = torch.Generator().manual_seed(0)
    margin = torch.linspace(0.2, 6, 100)
    theirs = torch.stack([margin, torch.zeros(100)], 1)
    ours = theirs + torch.stack([torch.zeros(100), 0.08 * torch.randn(100, generator=dice)], 1)
    ours[-1, 1] += 1.0  # a large change where the margin is large
    assert agreement("classification", ours, theirs).mean() == 1
    assert 0.99 < expected_agreement("classification", ours, theirs) < 1
