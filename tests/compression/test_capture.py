"""Hooks see every real row of a layer's input, once, in any kind of batch, and leave no trace."""

import pytest
import torch
from torch import nn

from distil_rank.compression.capture import Capture, as_mask, attention_mask, call_model, evaluating, with_held_out
from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments


def captured(model, layers, batches, mask=attention_mask):
    """The inputs of layers while the model runs on batches."""
    with evaluating(model), Capture(layers) as capture:
        for batch in batches:
            capture.mask = as_mask(mask(batch))
            call_model(model, batch)
    return capture.inputs


class TokenModel(nn.Module):
    """Takes padded tokens, as Hugging Face models do."""

    def __init__(self, time_first=False):
        super().__init__()
        self.embed, self.dense, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.time_first = time_first

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = self.dense(x.transpose(0, 1)).transpose(0, 1) if self.time_first else self.dense(x)
        return self.head(x[:, 0])


def token_batches(sizes):
    torch.manual_seed(0)
    batches = []
    for rows, length in sizes:
        lengths = torch.randint(1, length + 1, (rows,))
        lengths[0] = length
        mask = (torch.arange(length) < lengths[:, None]).long()
        batches.append({"input_ids": torch.randint(0, 20, (rows, length)), "attention_mask": mask})
    return batches


@pytest.mark.parametrize("time_first", [False, True])
def test_padding_is_left_out_whichever_axis_is_time(time_first):
    model, batches = TokenModel(time_first), token_batches([(3, 7), (4, 4), (5, 2)])  # one square batch
    inputs = captured(model, {"dense": model.dense}, batches)["dense"]
    real = torch.cat([model.embed(b["input_ids"])[b["attention_mask"].bool()] for b in batches])
    expected, got = Moments.of(real), inputs.fit.moments()
    assert got.rows == len(real)
    torch.testing.assert_close(got.covariance, expected.covariance)


def test_pooled_inputs_are_not_tokens():
    model, batches = TokenModel(), token_batches([(3, 7), (3, 3)])
    inputs = captured(model, {"head": model.head}, batches)
    assert inputs["head"].fit.moments().rows == 6


def test_flattened_tokens_obey_the_mask():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4))
    x, keep = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.5
    inputs = captured(model, {"1": model[1]}, [x], mask=lambda batch: keep)
    torch.testing.assert_close(inputs["1"].fit.moments().mean, x[keep].double().mean(0))


def test_layers_come_in_running_order_and_each_call_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    model, x = Twice(), torch.randn(10, 4)
    inputs = captured(model, {"second": model.second, "first": model.first}, [x])
    assert list(inputs) == ["first", "second"]
    both = torch.cat([x, model.first(x)])
    torch.testing.assert_close(inputs["first"].fit.moments().mean, both.double().mean(0).detach())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x], lambda x: {"input": x}])
def test_batches_of_every_kind(wrap):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    model[0].register_forward_pre_hook(lambda module, arguments: None)
    target = model[0] if isinstance(wrap(x), dict) else model
    assert torch.equal(call_model(target, wrap(x)), model(x))


def test_every_fifth_batch_is_held_out_unless_some_are_given():
    assert [held_out for _, held_out in with_held_out(list(range(10)), None)] == ([False] * 4 + [True]) * 2
    assert list(with_held_out([1, 2], held_out=[3])) == [(1, False), (2, False), (3, True)]
    assert len(list(with_held_out(torch.randn(23, 4), None))) == 8
    rows = torch.cat([batch for batch, _ in with_held_out(torch.arange(1000.0)[:, None], None)])
    assert torch.equal(rows[:, 0], torch.arange(1000.0))


class Half(nn.Linear):
    def forward(self, input):
        return super().forward(input) / 2


def hooked():
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 10,))
    return layer


@pytest.mark.parametrize("layer", [Half(3, 3), hooked()])
def test_a_layer_that_does_more_than_its_weights_say_is_refused(layer):
    with pytest.raises(InputError, match="'0' to give W x \\+ b"):
        captured(nn.Sequential(layer), {"0": layer}, [torch.randn(4, 3)])


def test_a_weight_that_is_computed_is_still_one():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        layer = wrap(nn.Linear(3, 3))
        assert captured(nn.Sequential(layer), {"0": layer}, [torch.randn(4, 3)])["0"].fit.rows == 4


def test_masks_as_attention_has_them():
    layer, x = nn.Linear(3, 3), torch.randn(2, 5, 3)
    model = nn.Sequential(layer)
    retained = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])

    def rows_with(mask):
        return captured(model, {"0": layer}, [x], mask=lambda batch: mask)["0"].fit.rows

    assert rows_with(retained) == rows_with(retained[:, None, None]) == rows_with(retained.tolist()) == 6
    for wrong in ((1 - retained) * -1e9, torch.ones(3), torch.ones(2, 5, 5)):
        with pytest.raises(InputError, match="mask \\(batch, time\\) of 1 for tokens"):
            rows_with(wrong)


def test_inputs_that_a_mask_does_not_fit_are_said(caplog):
    layer = nn.Linear(3, 3)
    mask = torch.ones(2, 5)
    captured(nn.Sequential(layer), {"0": layer}, [torch.randn(2, 4, 5, 3)] * 2, mask=lambda batch: mask)
    assert caplog.text.count("padding is counted") == 1


def test_no_hook_stays_even_after_an_error_and_modes_are_retained():
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].eval()
    with pytest.raises(RuntimeError):
        captured(model, {"1": model[1]}, [torch.randn(2, 7)])
    assert not model[1]._forward_pre_hooks
    assert model.training and not model[2].training
    with evaluating(model):
        assert not any(module.training for module in model.modules())
