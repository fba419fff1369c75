"""Seeds trained as one batched model: each student as if it had been trained alone."""

import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from torch import nn
from torch.utils.data import RandomSampler

from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.solvers import solve
from distil_rank.measure.metrics import r2
from distil_rank.training import seeds as training
from distil_rank.training.experiment import solve_students
from distil_rank.training.seeds import TrainingOptions, train_recipes, train_students
from distil_rank.training.stacked import StackedStudents

SEEDS = (42, 43, 44)
STEPS = 100


@pytest.fixture
def solved(data):
    torch.manual_seed(0)
    return solve_students(nn.Linear(16, 16), data, rank=4, shrinkage=0.0)


def options(seeds=SEEDS, **distil):
    trainer = {"max_steps": STEPS, "accelerator": "cpu"}
    return TrainingOptions("svd", seeds, {"lr": 1e-2, **distil}, trainer)


def same(a, b):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=2e-3, atol=2e-4)


def recipe_alone(solved, data, seed, steps):
    """The original's loop, written out."""
    seed_everything(seed, verbose=False)
    teacher = solved.teacher
    student = LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, solved.rank, "svd"))
    rows = data.train_dataset()
    batches = data.loader(rows, 64, RandomSampler(rows, replacement=True, num_samples=steps * 64))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.01)
    for x in batches:
        y = teacher(x)
        loss = F.mse_loss(student(x), y) + 0.1 * (1 - F.cosine_similarity(student(x), y)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.requires_grad_(False)


def test_the_original_recipe_gives_each_seed_what_its_own_loop_gives(solved, data, monkeypatch):
    monkeypatch.setattr(training, "ORIGINAL_STEPS", STEPS)
    trained = train_recipes(solved, data, SEEDS)
    x, start = data.rows("test"), solved.students["svd"]
    for seed, student in zip(SEEDS, trained.students, strict=True):
        alone = recipe_alone(solved, data, seed, STEPS)
        same(student, alone)
        target = solved.teacher(x)
        assert r2(student(x).detach(), target, solved.mean) == pytest.approx(
            r2(alone(x), target, solved.mean), abs=1e-5
        )
        assert (student.A - start.A).norm() > 0.1
    assert not torch.allclose(trained.students[0].A, trained.students[1].A, atol=1e-3)
    assert trained.curve.step[-1] == STEPS
    same(train_recipes(solved, data, [SEEDS[0]]).students[0], trained.students[0])


@pytest.mark.parametrize("distil", [{}, {"nested_ranks": [2]}], ids=["plain", "nested"])
def test_our_students_are_those_of_seeds_trained_alone(solved, data, distil):
    together = train_students(solved, data, options(**distil))
    assert together.fit.training_helped and together.fit.steps == STEPS
    for seed, student in zip(SEEDS, together.students, strict=True):
        alone = train_students(solved, data, options([seed], **distil))
        same(student, alone.students[0])
        if seed == SEEDS[0]:
            assert together.curve.val_residual == pytest.approx(alone.curve.val_residual, rel=1e-2, abs=1e-5)
            assert together.fit.best_loss == pytest.approx(alone.fit.best_loss, rel=1e-3)


def test_a_tail_is_matched_by_every_seed(solved, data):
    torch.manual_seed(1)
    head = nn.Sequential(nn.Tanh(), nn.Linear(16, 3))
    together = train_students(solved, data, options(head=head))
    for seed, student in zip(SEEDS, together.students, strict=True):
        same(student, train_students(solved, data, options([seed], head=head)).students[0])


def test_what_couples_the_seeds_trains_them_one_by_one(solved, data):
    assert options().train_together()
    assert not options([42]).train_together()
    assert not options(optimizer="lbfgs").train_together()
    for trainer in ({"gradient_clip_val": 1.0}, {"precision": "16-mixed"}, {"accelerator": "cpu", "devices": 2}):
        assert not TrainingOptions("svd", SEEDS, {}, trainer).train_together()
    clipped = TrainingOptions("svd", SEEDS[:2], {}, {"max_steps": 10, "gradient_clip_val": 1.0})
    assert len(train_students(solved, data, clipped).students) == 2


def test_targets_that_would_fill_memory_are_computed_batch_by_batch(solved, data, monkeypatch):
    expected = train_students(solved, data, options())
    monkeypatch.setattr(training, "MAX_TARGET_BYTES", 0)
    for a, b in zip(train_students(solved, data, options()).students, expected.students, strict=True):
        same(a, b)


def test_an_interrupted_stack_resumes(solved, data, tmp_path):
    first = TrainingOptions("svd", SEEDS, {"lr": 1e-2}, {"max_steps": 30}, checkpoints=tmp_path)
    train_students(solved, data, first)
    again = TrainingOptions("svd", SEEDS, {"lr": 1e-2}, {"max_steps": 60}, tmp_path / "b", str(tmp_path / "last.ckpt"))
    assert train_students(solved, data, again).fit.steps == 60


@torch.no_grad()
def test_a_stack_at_a_lower_rank_is_the_truncated_students(solved):
    students = [solved.students["closed_form"], solved.students["whitened"]]
    stack, x = StackedStudents(students), torch.randn(2, 7, 16)
    for rank in (1, 3, 4):
        for i, student in enumerate(students):
            torch.testing.assert_close(stack(x, rank)[i], student.truncate(rank)(x[i]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stack(x[0], rank)[i], student.truncate(rank)(x[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(stack[1].A, students[1].A) and stack[1].provenance == students[0].provenance


@pytest.mark.parametrize("shape", [(3, 7, 5), (7, 5)])
def test_gradients_are_those_of_the_plain_composition(shape):
    torch.manual_seed(0)
    stack = StackedStudents([LowRankLinear(5, 4, rank=2) for _ in range(3)]).double()
    x, weights = torch.randn(shape, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    plain = x @ stack.A.mT @ stack.B.mT + stack.bias[:, None]
    expected = torch.autograd.grad((plain * weights).sum(), list(stack.parameters()))
    output = stack(x)
    torch.testing.assert_close(output, plain)
    (output * weights).sum().backward()
    for parameter, gradient in zip(stack.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert parameter.grad.stride() == parameter.stride()


def test_lower_precision_goes_through_autocast():
    torch.manual_seed(0)
    stack = StackedStudents([LowRankLinear(5, 4, rank=2) for _ in range(3)])
    x = torch.randn(3, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = stack(x)
    output.sum().backward()
    torch.testing.assert_close(output.float(), stack(x), rtol=0.05, atol=0.05)
    assert all(parameter.grad.dtype == torch.float32 for parameter in stack.parameters())
