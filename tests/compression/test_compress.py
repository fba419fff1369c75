"""Layers inside any model are replaced by the best students for the user's data, and the report tells the truth."""

import copy
import itertools

import pytest
import torch
from torch import nn

from distil_rank.compression.compress import allocate, compress
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.measure.latency import torch_threads


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):  # these matrices are far too small for two
        yield


class Net(nn.Module):
    """Embedding, two projections in a residual block, a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 12)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return {"logits": self.head(self.dropout(x + self.down(torch.tanh(self.up(x)))))}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 9, (8, 11)), "attention_mask": torch.ones(8, 11)} for _ in range(12)]


def mlp(width=24, classes=3):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)
    )


def rows(n=900, width=24):
    torch.manual_seed(3)
    return torch.randn(n, width) @ torch.diag(torch.logspace(0.3, -1.5, width)) @ torch.randn(width, width) + 0.5


@torch.no_grad()
def test_what_the_report_says_is_what_the_rows_show():
    model, x = mlp(), rows()
    dense = copy.deepcopy(model[0])
    report = compress(model, {"0": 4}, x)
    fit, held_out = (
        torch.cat([b for i, b in enumerate(x.split(90)) if (i % 5 == 4) == last]) for last in (False, True)
    )
    row, y_fit = report.layers[0], dense(fit)

    def r2(z):
        return float(1 - (dense(z) - model[0](z)).square().sum() / (dense(z) - y_fit.mean(0)).square().sum())

    assert row.rank == model[0].rank == 4
    assert row.predicted_r2 == pytest.approx(r2(fit), abs=1e-5)
    assert row.held_out_r2 == pytest.approx(r2(held_out), abs=1e-5)
    assert (row.dense_parameters, row.parameters) == (24 * 24 + 24, 4 * 48 + 24)
    whole = nn.Sequential(dense, *model[1:])
    agree = (whole(held_out).argmax(1) == model(held_out).argmax(1)).float().mean()
    assert report.outputs.rows == len(held_out) == 180
    assert report.outputs.predictions_retained == pytest.approx(float(agree))
    assert row.dense_us > 0 and row.student_us > 0
    assert "| 0 | 24 → 24 | 4 | 600 → 216 |" in str(report)


def test_the_student_brings_its_papers():
    model = mlp()
    compress(model, {"0": 0.95}, rows())
    papers = model[0].provenance
    assert len(papers["r2"]) == len(papers["r2_held_out"]) == model[0].rank
    assert papers["rows"] == 720 and papers["held_out_rows"] == 180


@pytest.mark.parametrize(("rank", "expected"), [(3, 3), (0.9, None), ("auto", None)])
def test_ranks_of_every_kind(rank, expected):
    report = compress(mlp(), {"2": rank}, rows())
    row = report.layers[0]
    assert expected is None or row.rank == expected
    assert rank != 0.9 or row.predicted_r2 >= 0.9


def test_a_copy_leaves_the_original_alone():
    model, x = mlp(), rows()
    before = model(x)
    report = compress(model, {"*": 2}, x, inplace=False)
    assert torch.equal(model(x), before) and isinstance(report.model[0], LowRankLinear)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_the_first_pattern_that_fits_counts(net, tokens):
    compress(net, {"d*n": 2, "?*": 3}, tokens)
    assert net.down.rank == 2 and net.up.rank == 3


def test_a_budget_is_shared_and_retained():
    report = compress(mlp(), ["0", "2"], rows(), parameters=0.5)
    assert sum(row.parameters - row.out_features for row in report.layers) <= 0.5 * 2 * 24 * 24
    assert all(row.rank for row in report.layers)


def test_what_would_not_shrink_stays_dense_and_says_why(net, tokens):
    report = compress(net, {"up": 9, "down": 10**6, "head": 1}, tokens)
    notes = {row.name: (row.rank, row.note) for row in report.layers}
    assert notes["up"] == notes["down"] == (None, "no weights saved from rank 9 on")
    assert notes["head"] == (None, "its weight is used elsewhere too")
    assert isinstance(net.up, nn.Linear) and report.outputs.predictions_retained == 1.0
    assert "dense: no weights saved" in str(report)


def test_a_layer_used_in_two_places_gets_one_student():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh()), "b": nn.Sequential(layer)})
    model.forward = lambda x: model["b"](model["a"](x))
    report = compress(model, {"*": 2}, torch.randn(100, 8), forward=lambda m, x: model.forward(x))
    assert len(report.layers) == 1 and model["a"][0] is model["b"][0]
    assert isinstance(model["b"][0], LowRankLinear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_no_bias(dtype, bias):
    model = nn.Sequential(nn.Linear(20, 12, bias=bias)).to(dtype)
    report = compress(model, {"0": 5}, torch.randn(300, 20).to(dtype))
    assert model[0].A.dtype == dtype and report.layers[0].held_out_r2 > 0.5
    assert model(torch.randn(2, 20).to(dtype)).dtype == dtype


def test_tied_layers_are_both_left_and_counted_once_in_a_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    report = compress(model, ["*"], torch.randn(400, 16), parameters=0.75)
    assert [row.rank is None for row in report.layers] == [True, True, False]
    retained = model[0].weight.numel() + model[4].A.numel() + model[4].B.numel()
    assert retained <= 0.75 * 2 * 256
    with pytest.raises(InputError, match="room for rank 1"):
        compress(model, ["0", "2"], torch.randn(400, 16), parameters=0.5)


def test_a_budget_counts_the_biases_that_students_bring():
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)])
    report = compress(model, ["*"], torch.randn(400, 16), parameters=0.5)
    before, after = report.parameters
    assert after <= 0.5 * before


def test_a_layer_that_runs_more_often_later_is_seen_each_time():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = x[:, 0]
            for i in range(x.shape[1]):
                h = torch.tanh(self.step(h) + x[:, i])
            return self.out(h)

    torch.manual_seed(0)
    batches = [torch.randn(10, 1, 8)] + [torch.randn(10, 4, 8) for _ in range(9)]
    model = Recurrent()
    compress(model, {"step": 2, "out": 2}, batches)
    assert model.step.provenance["rows"] == 10 * (1 + 7 * 4)


def test_inside_a_transformer_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(50, 7, 16)
    report = compress(model, {"*.linear1": 6}, x)
    assert report.outputs.r2 > 0.5
    with torch.inference_mode():  # where PyTorch reads the weights past the layers
        torch.testing.assert_close(model.eval()(x), model.train(False)(x.requires_grad_()), atol=1e-4, rtol=1e-4)


def test_held_out_rows_that_are_not_numbers_are_refused():
    x = torch.randn(400, 8)
    x[-1] = torch.nan
    with pytest.raises(InputError, match="finite rows to measure on"):
        compress(nn.Sequential(nn.Linear(8, 8)), {"0": 2}, x)


def test_what_the_model_cannot_take_points_to_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, a, b):
            return self.l(a + b)

    with pytest.raises(InputError, match="missing 1 required positional argument: 'b'; give `forward="):
        compress(Two(), {"l": 2}, torch.randn(50, 8))


def test_weights_that_are_not_numbers_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="finite weights in '0'"):
        compress(model, {"0": 2}, torch.randn(50, 8))


def test_a_model_of_one_number_is_compressed_and_not_compared(caplog):
    class Mean(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean()

    report = compress(Mean(nn.Linear(8, 8)), {"0": 2}, torch.randn(50, 8))
    assert report.outputs is None and "not compared" in caplog.text


def test_a_second_name_of_a_layer_is_a_name():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    report = compress(model, {"b": 2}, torch.randn(100, 8), forward=lambda m, x: m["b"](x))
    assert report.layers[0].name == "a" and isinstance(model["b"], LowRankLinear)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ({"nothing": 2}, {}, "'nothing' to fit a linear layer of the model but it has 0, 2, 4"),
        ({"0": 0}, {}, r"`rank` in \[1, 24\] but got 0"),
        ({"0": "best"}, {}, "or 'auto' but got 'best'"),
        ({"0": 1.5}, {}, "but got 1.5"),
        ({"0": 1.0}, {}, "but got 1.0"),
        ({"0": True}, {}, "but got True"),
        ({"0": None}, {}, "but got None"),
        (["0"], {"parameters": "half"}, r"`parameters` in \(0, 1\]"),
        (["0"], {}, "a rank for each pattern"),
        ({"0": 2}, {"parameters": 0.5}, "patterns alone"),
        (["0"], {"parameters": 1.5}, r"`parameters` in \(0, 1\]"),
        (["0"], {"parameters": 0.01}, "Expected room for rank 1"),
        ({"0": 2}, {"solver": "magic"}, "Expected a solver out of"),
    ],
)
def test_wrong_requests_are_one_clear_line(layers, options, message):
    with pytest.raises(InputError, match=message) as error:
        compress(mlp(), layers, rows(), **options)
    assert "\n" not in str(error.value)


def test_layers_that_never_run_are_named():
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    with pytest.raises(InputError, match="'out_proj' to run when the model does"):
        compress(attention, {"out_proj": 2}, [x], forward=lambda m, batch: m(batch, batch, batch))


def test_bad_data_are_named():
    with pytest.raises(InputError, match="finite rows of input to '0' but got NaN"):
        compress(mlp(), {"0": 2}, torch.full((50, 24), float("nan")))
    with pytest.raises(InputError, match="finite rows of input to '0' but got none"):
        compress(mlp(), {"0": 2}, rows().view(10, 90, 24), mask=lambda batch: torch.zeros(90, 1))


@torch.no_grad()
def test_one_pass_serves_every_layer_and_the_comparison():
    model, x = mlp(), rows()
    original, passes = copy.deepcopy(model), []
    report = compress(model, {"0": 3, "2": 4}, (passes.append(1) or batch for batch in x.split(90)))
    assert len(passes) == 10  # an iterator is enough
    fit = torch.cat([batch for i, batch in enumerate(x.split(90)) if i % 5 < 4])
    alone = LowRankLinear.from_linear(original[2], 4, Moments.of(torch.tanh(original[0](fit))))
    torch.testing.assert_close(model[2](x), alone(x), atol=1e-4, rtol=1e-4)
    held_out = torch.cat(x.split(90)[4::5])
    y, z = original(held_out), model(held_out)
    r2 = 1 - (z - y).square().sum() / (y - y.mean(0)).square().sum()
    assert report.outputs.rows == 180 and report.outputs.r2 == pytest.approx(float(r2), abs=1e-5)


def test_an_error_at_the_end_leaves_the_model_whole():
    model = mlp()

    def forward(module, batch):
        if isinstance(module[0], LowRankLinear):
            raise RuntimeError("lost the connection")
        return module(batch)

    with pytest.raises(RuntimeError, match="lost"):
        compress(model, {"0": 2, "2": 2}, rows(), forward=forward)
    assert all(isinstance(model[i], nn.Linear) for i in (0, 2)) and model.training


def test_what_falls_short_of_the_share_that_was_asked_for_is_said(caplog):
    torch.manual_seed(0)
    compress(nn.Sequential(nn.Linear(40, 40)), {"0": 0.9}, torch.randn(60, 40))
    assert "R² on held-out rows is" in caplog.text and "below the 0.9 that was asked for" in caplog.text


def cost(ranks, shapes):
    return sum(m * n if ranks[k] is None else ranks[k] * (m + n) for k, (m, n) in shapes.items())


def residual(ranks, spectra):
    return sum(0.0 if r is None else float(spectra[k][r:].sum() / spectra[k].sum()) for k, r in ranks.items())


def test_it_is_the_best_of_all_that_fit():
    torch.manual_seed(0)
    spectra = {
        name: torch.rand(6).sort(descending=True).values ** power for name, power in [("a", 1), ("b", 4), ("c", 2)]
    }
    shapes = dict.fromkeys(spectra, (16, 16))
    for budget in (96, 160, 320, 448):
        chosen = allocate(spectra, shapes, budget)
        assert cost(chosen, shapes) <= budget
        every = (dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(range(1, 7), repeat=3))
        best = min(residual(ranks, spectra) for ranks in every if cost(ranks, shapes) <= budget)
        assert residual(chosen, spectra) == pytest.approx(best)


def test_a_layer_past_its_break_even_becomes_dense():
    spectra = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0]), "b": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    shapes = {"a": (4, 4), "b": (4, 4)}
    assert allocate(spectra, shapes, 24) == {"a": None, "b": 1}
    assert allocate(spectra, shapes, 32)["a"] is None


def test_every_layer_gets_something():
    spectra = {"loud": torch.tensor([9.0, 9.0, 9.0]), "mute": torch.zeros(3)}
    assert allocate(spectra, dict.fromkeys(spectra, (8, 8)), 48) == {"loud": 2, "mute": 1}
    with pytest.raises(InputError, match=r"rank 1 in all 2 layers \(32 weights\) but got 31"):
        allocate(spectra, dict.fromkeys(spectra, (8, 8)), 31)
