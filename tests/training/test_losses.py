"""The layer's loss against its plain composition."""

import pytest
import torch
import torch.nn.functional as F

from distil_rank.training.losses import layer_loss


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_loss_and_gradient_are_those_of_the_plain_composition(shape):
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
    parts = layer_loss(output, target, alpha=0.3, variance=2.0)
    mse, angle = (output - target).square().mean(-1), 1 - F.cosine_similarity(output, target, dim=-1)
    torch.testing.assert_close(parts["mse"], mse)
    torch.testing.assert_close(parts["one_minus_cosine"], angle)
    (ours,) = torch.autograd.grad((weights * parts["loss"]).sum(), output)
    (plain,) = torch.autograd.grad((weights * (mse / 2.0 + 0.3 * angle)).sum(), output)
    torch.testing.assert_close(ours, plain)


def test_a_row_of_zeros_has_a_finite_gradient():
    output = torch.zeros(1, 3).requires_grad_()
    layer_loss(output, torch.ones(1, 3), alpha=0.1)["loss"].sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_the_teacher_is_frozen():
    with pytest.raises(AssertionError, match="frozen"):
        layer_loss(torch.ones(1, 3), torch.ones(1, 3, requires_grad=True), alpha=0.1)
