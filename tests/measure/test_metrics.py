"""Each metric against an independent computation, and against the ways in which a metric can flatter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distil_rank.measure.metrics import (
    Fidelity,
    centred_cosine,
    cosine,
    effective_rank,
    energy,
    knn_overlap,
    r2,
    residual,
)


def outputs(rows: int = 60, columns: int = 12, seed: int = 0, offset: float = 5.0) -> tuple[Tensor, Tensor]:
    """A teacher with a large mean, as pooled embeddings have, and a student near it."""
    generator = torch.Generator().manual_seed(seed)
    teacher = offset + torch.randn(rows, columns, generator=generator)
    return teacher + 0.3 * torch.randn(rows, columns, generator=generator), teacher


def test_a_constant_wins_raw_cosine_and_nothing_else():
    _, teacher = outputs(rows=400, columns=50, offset=20.0)
    mean = teacher.mean(0)
    constant = mean.expand_as(teacher)
    assert cosine(constant, teacher).mean() > 0.99
    assert residual(constant, teacher).sum() / energy(teacher).sum() < 0.01
    assert centred_cosine(constant, teacher, mean).abs().mean() < 1e-6
    assert r2(constant, teacher, mean) == pytest.approx(0, abs=1e-9)
    assert knn_overlap(constant, teacher).mean() < 0.1


def test_a_perfect_student_scores_one_everywhere():
    _, teacher = outputs()
    mean = teacher.mean(0)
    assert torch.allclose(cosine(teacher, teacher), torch.ones(60, dtype=torch.float64))
    assert torch.allclose(centred_cosine(teacher, teacher, mean), torch.ones(60, dtype=torch.float64))
    assert r2(teacher, teacher, mean) == 1
    assert (knn_overlap(teacher, teacher) == 1).all()


def test_zero_rows_have_cosine_zero_not_nan():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert cosine(zero, one).tolist() == cosine(one, zero).tolist() == cosine(zero, zero).tolist() == [0, 0]
    assert cosine(1e-30 * one, one).tolist() == pytest.approx([1, 1])  # small is not zero
    assert centred_cosine(one, 2 * one, mean=torch.ones(3)).tolist() == [0, 0]


def test_ratios_are_ratios_of_the_rows_parts():
    student, teacher = outputs()
    mean = teacher.mean(0)
    assert residual(student, teacher).sum() == pytest.approx(60 * 12 * torch.nn.functional.mse_loss(student, teacher))
    assert r2(student, teacher, mean) == pytest.approx(
        1 - (residual(student, teacher).sum() / energy(teacher, mean).sum()).item()
    )
    assert energy(teacher).sum() == pytest.approx(teacher.double().square().sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_do_not_lose_digits_in_narrow_types(dtype):
    student = torch.full((4000, 8), 1.0, dtype=dtype)
    teacher = torch.full((4000, 8), 1.5, dtype=dtype)
    assert residual(student, teacher).sum() == 4000 * 8 * 0.25  # 2048 is where float16 stops counting ones


def test_shapes_that_would_broadcast_are_refused():
    for metric in (cosine, residual, knn_overlap):
        with pytest.raises(ValueError, match="outputs of one shape"):
            metric(torch.ones(1, 4), torch.ones(3, 4))


def brute_knn(student: Tensor, teacher: Tensor, k: int) -> list[float]:
    near = []
    for y in (student, teacher):
        distance = torch.cdist(y.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(1e9)
        near.append([set(row.tolist()) for row in distance.argsort(1)[:, :k]])
    return [len(a & b) / k for a, b in zip(*near, strict=True)]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(12, 60), k=st.integers(1, 11), chunk=st.integers(1, 70), seed=st.integers(0, 99))
def test_neighbours_are_those_of_brute_force_in_any_chunks(rows, k, chunk, seed):
    student, teacher = outputs(rows, seed=seed)
    assert knn_overlap(student, teacher, k, chunk).tolist() == pytest.approx(brute_knn(student, teacher, k))


def test_neighbours_ignore_a_shift_and_survive_a_large_mean():
    student, teacher = outputs(rows=200)
    expected = knn_overlap(student, teacher)
    assert 0.1 < expected.mean() < 0.99
    assert torch.equal(knn_overlap(student.double() + 1e6, teacher), expected)


def test_neighbours_are_cut_to_the_rows_there_are():
    student, teacher = outputs(rows=5)
    assert (knn_overlap(student, teacher, k=10) == 1).all()  # all four others, for both
    with pytest.raises(ValueError, match="at least 2 rows"):
        knn_overlap(student[:1], teacher[:1])


def test_effective_rank_counts_equal_directions_and_ignores_scale_and_rounding():
    assert effective_rank(torch.tensor([5.0] * 7 + [0.0, -1e-12])) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    spectrum = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert 1 < effective_rank(spectrum) < 30
    assert effective_rank(1e-9 * spectrum) == pytest.approx(effective_rank(spectrum), rel=1e-5)


def test_fidelity_over_batches_is_that_of_all_rows():
    student, teacher = outputs(rows=70)
    mean = 0.9 * teacher.mean(0)
    whole = Fidelity(mean)
    for batch in (slice(0, 32), slice(32, 64), slice(64, 70)):
        whole.update(student[batch], teacher[batch])
    assert {name: value.item() for name, value in whole.compute().items()} == pytest.approx(
        {
            "cosine": cosine(student, teacher).mean().item(),
            "centred_cosine": centred_cosine(student, teacher, mean).mean().item(),
            "relative_mse": (residual(student, teacher).sum() / energy(teacher).sum()).item(),
            "r2": r2(student, teacher, mean),
        }
    )


def test_fidelity_sums_across_processes_and_starts_anew():
    student, teacher = outputs()
    metric = Fidelity(teacher.mean(0))
    metric.update(student, teacher)
    assert [reduction.__name__ for reduction in metric._reductions.values()] == ["dim_zero_sum"]
    metric.reset()
    assert not metric.sums.any()
    metric.half()  # a trainer in half precision converts its modules
    metric.update(student, teacher)
    assert metric.sums.dtype == torch.float64


def test_fidelity_keeps_no_graph():
    student, teacher = outputs()
    metric = Fidelity(teacher.mean(0))
    metric.update(student.requires_grad_(), teacher)
    assert not metric.compute()["r2"].requires_grad
