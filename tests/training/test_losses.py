"""The losses against their plain composition."""

import torch
import torch.nn.functional as F

from distil_rank.training.distil import head_loss, layer_loss


def test_a_row_of_zeros_has_a_finite_gradient():
    output = torch.zeros(1, 3).requires_grad_()
    layer_loss(output, torch.ones(1, 3), alpha=0.1)["loss"].sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_head_loss_of_regressions_is_the_squared_error():
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(head_loss(a, b, "regression").mean(), F.mse_loss(a, b))


def test_one_column_of_classification_is_a_yes_or_no():
    a, b = torch.randn(5, 1), torch.randn(5, 1)
    p, q = b.sigmoid(), a.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = divergence.squeeze(1) + 0.1 * (a - b).square().squeeze(1)
    torch.testing.assert_close(head_loss(a, b, "classification"), expected)
