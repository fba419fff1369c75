"""The compiled steps between int8 products, against torch's operations in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_rank.embedding.int8 import kernels
from distil_rank.embedding.int8.quantisation import LEVELS, UNSIGNED_LEVELS, ZERO_POINT


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def memory(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 1)


def run(kernel, *arguments) -> None:
    kernel(*(argument.numpy() if isinstance(argument, torch.Tensor) else argument for argument in arguments))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().view(torch.uint16)


def decoded(values: torch.Tensor, steps: torch.Tensor, zero_point: int = ZERO_POINT) -> torch.Tensor:
    return (values.double() - zero_point) * steps.double()


def check_rounded(values, steps, exact, levels=LEVELS, zero_point=ZERO_POINT, rtol=1e-5) -> None:
    """Every number is the nearest step to the exact one, and a row's largest is the last step."""
    torch.testing.assert_close(steps.double(), exact.abs().amax(1, keepdim=True) / levels, rtol=rtol, atol=0)
    error = (decoded(values, steps, zero_point) - exact).abs() / steps
    assert error.max() < 0.5 + 5e-3 + rtol * levels


def test_a_step_is_a_row_s_largest_value_over_the_levels():
    x = torch.tensor([[1.0, -2.0, 0.0], [1000.0, 10.0, -1.0], [0.0, 0.0, 0.0]])
    values, steps = memory(3, 3)
    run(kernels.round_rows, x, values, steps)
    assert steps[:2, 0].tolist() == pytest.approx([2 / LEVELS, 1000 / LEVELS])
    assert values.tolist() == [[ZERO_POINT + 64, 1, ZERO_POINT], [255, ZERO_POINT + 1, ZERO_POINT], [ZERO_POINT] * 3]


@pytest.mark.parametrize("columns", [1, 7, 128, 1280])
def test_rows_are_rounded_to_the_nearest(columns):
    x = floats(5, columns)
    values, steps = memory(5, columns)
    run(kernels.round_rows, x, values, steps)
    check_rounded(values, steps, x.double())
    run(kernels.round_rows, bits(x), values, steps)
    check_rounded(values, steps, x.bfloat16().double())


def test_norms_are_torch_s():
    x, scale = 3 + 10 * floats(6, 320), floats(320).abs() + 0.5
    values, steps = memory(6, 320)
    run(kernels.norm_rows, x, scale, np.float32(1e-5), values, steps)
    check_rounded(values, steps, F.layer_norm(x.double(), (320,), scale.double()))


def test_products_are_added_before_the_norm():
    x, product, product_steps, bias = floats(6, 64), 100 * floats(6, 64), floats(6, 1).abs() / 50, floats(64)
    expected = x.double() + product.double() * product_steps + bias
    added = x.clone()
    run(kernels.add_rows, added, product, product_steps, bias)
    torch.testing.assert_close(added.double(), expected, rtol=1e-5, atol=1e-5)
    values = torch.empty(6, 64, dtype=torch.uint8)
    steps = product_steps.clone()
    run(kernels.add_and_norm_rows, x, product, steps, bias, torch.ones(64), np.float32(1e-5), values, steps)
    assert torch.equal(x, added)
    check_rounded(values, steps, F.layer_norm(expected, (64,)))


@pytest.mark.parametrize("low", [False, True])
def test_activation_is_exact_gelu(low):
    product, product_steps, bias = 200 * floats(8, 256), floats(8, 1).abs() / 60, floats(256)
    scale = floats(256).abs() + 0.5
    shift = 0.17 * scale
    values, steps = memory(8, 256)
    given = bits(product) if low else product
    run(kernels.activate_rows, given, product_steps, bias, scale, shift, values, steps)
    seen = product.bfloat16() if low else product
    exact = F.gelu(seen.double() * product_steps + bias) * scale + shift
    check_rounded(values, steps, exact, UNSIGNED_LEVELS, 0, rtol=5e-5)


def test_gelu_s_polynomial_is_within_its_stated_error():
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    a = x.clamp(-kernels.END, kernels.END)
    t = (2 * a**2 / kernels.END**2 - 1).numpy()
    found = x * (0.5 + a * torch.from_numpy(np.polyval([float(c) for c in kernels.COEFFICIENTS], t)))
    assert (found - F.gelu(x)).abs().max() < 5e-5


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs of every head, in float64; angles (T, D / 2)."""
    pairs = torch.view_as_complex(x.double().unflatten(1, (-1, angles.shape[1], 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(1)


@pytest.mark.parametrize(("heads", "width", "together"), [(4, 64, 1), (20, 16, 4), (20, 16, 1), (2, 24, 4)])
def test_queries_keys_and_values_are_split_and_rotated(heads, width, together):
    rows, columns = 9, heads * width
    product, steps, bias = 100 * floats(rows, 3 * columns), floats(rows, 1).abs() / 50, floats(2 * columns)
    angles = floats(rows, width // 2)
    expected = product.double() * steps
    expected[:, : 2 * columns] = turned(expected[:, : 2 * columns] + bias, angles)

    repeated = angles.repeat(1, together)
    rotations, qkv = torch.cat([repeated.cos(), repeated.sin()], dim=1), torch.empty(rows, 3 * columns)
    run(kernels.split_rows, product, steps, bias, rotations, qkv)
    torch.testing.assert_close(qkv.double(), expected, rtol=1e-5, atol=1e-5)
    low = torch.empty(rows, 3 * columns, dtype=torch.uint16)
    run(kernels.split_rows, product, steps, bias, rotations, low)
    assert torch.equal(low, bits(qkv)), "rounded as torch does"


def test_the_first_layer_s_are_looked_up_and_rotated():
    tokens, table, angles = torch.tensor([4, 0, 4, 2]), floats(5, 3 * 48), floats(4, 8)
    expected = table[tokens].double()
    expected[:, :96] = turned(expected[:, :96], angles)
    qkv = torch.empty(4, 3 * 48)
    run(kernels.look_up_rows, table, tokens, torch.cat([angles.cos(), angles.sin()], dim=1), qkv)
    torch.testing.assert_close(qkv.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("keys", "visible"), [(16, 1), (16, 16), (208, 195), (1008, 1003)])
@pytest.mark.parametrize("shift", [-200, 0, 200])
def test_scores_become_powers_of_two(keys, visible, shift):
    scores = 30 * floats(2, 5, keys) + shift
    given, sums = bits(scores), torch.zeros(2, 5)
    assert kernels.exponentiate(given.numpy(), 4, visible, np.float32(0.3), sums.numpy())
    exact = torch.exp2(0.3 * scores.bfloat16().double()[:, :4, :visible])
    found = given.view(torch.bfloat16).double()
    torch.testing.assert_close(found[:, :4, :visible], exact, rtol=2**-8, atol=1e-30)
    assert not found[..., visible:].any()
    assert torch.equal(found[:, 4, :visible], scores.bfloat16().double()[:, 4, :visible]), "another sequence's query"
    torch.testing.assert_close(sums[:, :4].double(), exact.sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [-1000, 1000])
def test_scores_out_of_range_have_their_rows_largest_subtracted(size):
    scores, sums, scale = 30 * floats(2, 5, 32), torch.empty(2, 5), np.float32(0.3)
    in_range = scores.clone()
    scores[1, 2] += size
    given = bits(scores)
    assert not kernels.exponentiate(given.clone().numpy(), 5, 20, scale, sums.numpy())
    kernels.subtract_maxima(given.numpy(), 5, 20, sums.numpy())
    assert kernels.exponentiate(given.numpy(), 5, 20, scale, sums.numpy())
    seen = scores[1, 2, :20].bfloat16().double()
    found, exact = given.view(torch.bfloat16).double(), torch.exp2(0.3 * (seen - seen.max()))
    torch.testing.assert_close(found[1, 2, :20], exact, rtol=2**-7, atol=1e-6)
    expected, others = bits(in_range), torch.arange(10).view(2, 5) != 7
    kernels.exponentiate(expected.numpy(), 5, 20, scale, sums.numpy())
    assert torch.equal(given[others], expected[others]), "the other rows as without it"


def test_mixed_values_are_divided_into_their_rows():
    mixed, sums = floats(2, 16, 24), floats(2, 16).abs() + 1
    out = torch.zeros(20, 3, 24, dtype=torch.uint16)
    run(kernels.divide, bits(mixed), sums, out, 4, 17, 1)
    expected = torch.zeros(20, 3, 24, dtype=torch.double)
    expected[4:17, 1:] = (mixed.bfloat16().double() / sums[..., None]).transpose(0, 1)[:13]
    torch.testing.assert_close(out.view(torch.bfloat16).double(), expected, rtol=2**-8, atol=0)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, scale = floats(50, 1280), floats(1280).abs()
    values, steps = memory(50, 1280)
    run(kernels.norm_rows, x, scale, np.float32(1e-5), values, steps)
    for start, stop in ((0, 1), (3, 17), (49, 50)):
        some, some_steps = memory(stop - start, 1280)
        run(kernels.norm_rows, x[start:stop], scale, np.float32(1e-5), some, some_steps)
        assert torch.equal(some, values[start:stop])
        assert torch.equal(some_steps, steps[start:stop])


def test_kernels_compile_where_nothing_can_be_retained(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels._compiled(len)([1, 2]) == 2
