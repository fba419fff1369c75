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
from distil_rank.measure.calibration import agreement, expected_agreement
from distil_rank.options.training import HeadOptions
from distil_rank.training.head import smallest_student, train_head


def band(rows: int = 2400, kind: str = "classification") -> tuple[EmbeddingDataModule, np.ndarray]:
    """Rows in a band or beside it, which no linear map tells, among columns of unequal scale; or a number of them."""
    dice = np.random.default_rng(0)
    x = dice.normal(size=(rows, 32)).astype(np.float32)
    y = (np.abs(x[:, 0]) > 0.7).astype(np.int64) if kind == "classification" else (7 + 100 * x[:, 0]).astype(np.float32)
    x = x * np.geomspace(0.1, 10, 32, dtype=np.float32) + np.float32(3)
    embeddings = Embeddings([f"p{i}" for i in range(rows)], x)
    split = Split.of(np.repeat([0, 1, 2], [rows // 2, rows // 4, rows // 4]), "given")
    return EmbeddingDataModule.of(embeddings, split, y), y


@pytest.fixture(scope="module")
def trained():
    data, y = band()
    module, words = train_head(data, "classification", 2, HeadOptions(seconds=120, epochs=25), seed=0)
    return data, y, module, words


def test_a_head_learns_what_a_linear_probe_cannot(trained):
    data, y, module, words = trained
    predicted = decide("classification", module.predictor(("in", "out"))(data.rows("test")).detach().numpy())
    test = data.split_rows.test
    target = Target("classification", y=y, classes=("in", "out"))
    split, x = data.split_rows, data.embeddings.x
    (weight, offset), _ = fit_linear(target, x, y, split.train, [(split.train, split.val)])
    linear = decide("classification", x[test] @ weight + offset)
    assert (predicted == y[test]).mean() > 0.8 > (linear == y[test]).mean()
    assert "chosen: lr" in words


def test_plain_layers_give_the_same(trained):
    data, _, module, _ = trained
    predictor, x = module.predictor(("in", "out")), data.rows("val")
    with torch.no_grad():
        assert torch.allclose(predictor(x), module(x), atol=1e-4)
    assert type(predictor.layer) is nn.Linear


def test_numbers_come_out_in_their_own_units():
    data, y = band(800, "regression")
    module, _ = train_head(data, "regression", 1, HeadOptions(seconds=120, epochs=15), seed=0)
    predicted = module.predictor(())(data.rows("test"))[:, 0].detach().numpy()
    assert np.corrcoef(predicted, y[data.split_rows.test])[0, 1] > 0.97 and abs(predicted.mean() - 7) < 30


def test_the_student_has_the_lowest_rank_that_decides_alike(trained):
    data, _, module, _ = trained
    teacher = module.predictor(("in", "out"))
    student, curve = smallest_student(teacher, data, None, 0.95, {"max_steps": 30})
    assert [point["rank"] for point in curve] == [1, 2, 3, 4, 6, 8, 12]
    assert student.rank <= 12
    with torch.no_grad():
        x = data.rows("test")
        ours, theirs = (teacher.head(layer(x)) for layer in (student, teacher.layer))
        assert (ours.argmax(1) == theirs.argmax(1)).double().mean() > 0.9


def test_a_layer_that_no_smaller_one_can_stand_in_for_stays(trained):
    data, _, module, _ = trained
    teacher = module.predictor(("in", "out"))
    student, _ = smallest_student(teacher, data, None, 1 + 1e-9, {"max_steps": 1})
    assert student is teacher.layer


def test_expected_agreement_tells_more_than_a_count_of_equal_decisions():
    """No decision of a hundred differs, and yet one of a thousand would."""
    dice = torch.Generator().manual_seed(0)
    margin = torch.linspace(0.2, 6, 100)
    theirs = torch.stack([margin, torch.zeros(100)], 1)
    ours = theirs + torch.stack([torch.zeros(100), 0.08 * torch.randn(100, generator=dice)], 1)
    ours[-1, 1] += 1.0  # a large change where the margin is large
    assert agreement(ours, theirs, "classification").mean() == 1
    assert 0.99 < expected_agreement(ours, theirs, "classification") < 1
    numbers = torch.arange(4.0)[:, None]
    assert expected_agreement(numbers + 1, numbers, "regression") == pytest.approx(1 - 1 / 1.25)
