"""What is saved while a student trains."""

import pytest
import torch
from lightning import Trainer
from torch import nn

from distil_rank.training import callbacks
from distil_rank.training.experiment import solve_students
from distil_rank.training.seeds import TrainingOptions, train_students


@pytest.mark.parametrize(("period", "saved"), [(3600.0, 2), (0.0, 6)])
def test_what_a_run_is_resumed_from_is_saved_once_a_period_and_at_the_end(data, tmp_path, monkeypatch, period, saved):
    monkeypatch.setattr(callbacks, "SAVE_PERIOD", period)
    steps = []
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda self, file, *args, **kw: (steps.append(self.global_step), save(self, file, *args, **kw)),
    )
    torch.manual_seed(0)
    teacher = nn.Linear(16, 16)
    options = {"max_epochs": 5, "max_steps": -1, "accelerator": "cpu"}
    solved = solve_students(teacher, data, rank=4, shrinkage=0.0)
    train_students(solved, data, TrainingOptions("svd", (42,), {"lr": 1e-2, "schedule": "constant"}, options, tmp_path))
    assert len(steps) == saved and (tmp_path / "last.ckpt").is_file()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps[-1] == max(steps)
