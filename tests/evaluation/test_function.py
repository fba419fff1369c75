"""Function kept by the rungs of the comparison."""

import numpy as np
import pytest
import torch
from torch import nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.comparison import ConstantOutput, solved_students
from distil_rank.evaluation.function import function_retained
from distil_rank.lowrank.moments import Moments


@pytest.fixture
def labelled(request):
    data = EmbeddingDataModule(str(request.config.rootpath / "data" / "functions"))
    data.setup()
    return data


def test_the_teacher_keeps_all_of_its_function_and_a_constant_next_to_nothing(labelled):
    torch.manual_seed(0)
    teacher = nn.Linear(labelled.dim, labelled.dim)
    moments = Moments.of(labelled.stream("train"))
    mean = teacher(moments.mean.float()).detach()
    students = {name: [layer] for name, layer in solved_students(teacher, moments, 64).items()}
    given = {"constant": [ConstantOutput(mean + 1)], "itself": [teacher], **students}
    measured = function_retained(teacher, given, mean, labelled)
    assert measured.keys() == given.keys()
    assert measured["itself"].retained.interval == (1, 1) and measured["itself"].metric == "mAP"
    assert measured["constant"].retained.value < 0.3
    closed_form = measured["closed_form"].retained
    assert closed_form.low < closed_form.value < closed_form.high and closed_form.value > 0.8
    assert measured["svd"].task.endswith("test rows")


def test_data_without_labels_or_with_one_class_have_none(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    for labels in (None, ["k"] * 60):
        extra = {} if labels is None else {"labels": np.array(labels)}
        np.savez(tmp_path / "a.npz", embeddings=x, ids=np.array([f"p{i}" for i in range(60)]), **extra)
        data = EmbeddingDataModule(str(tmp_path / "a.npz"))
        data.setup()
        teacher = nn.Linear(8, 8)
        assert function_retained(teacher, {"svd": [teacher]}, torch.zeros(8), data) == {}
