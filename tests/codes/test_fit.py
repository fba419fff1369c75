"""Metrics on made-up families: what each keeps, and that nothing but the fit rows is looked at."""

from typing import get_args

import numpy as np
import pytest
import torch

from distil_rank.codes.fit import copy_noise, fit_metric, group_noise
from distil_rank.compression.saved import load, read_manifest, save
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CODE_TYPES
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve
from distil_rank.options.codes import CodeMetric


def families(count=60, size=12, width=24, seed=0):
    """Signal in the last dimensions, loud noise in the first."""
    dice = np.random.default_rng(seed)
    spread = np.geomspace(8, 0.1, width)
    centres = dice.normal(size=(count, width)) * np.sqrt(1.1 - spread / 8)
    group = np.repeat(np.arange(count), size)
    x = centres[group] + dice.normal(size=(len(group), width)) * spread
    return x.astype(np.float32), group


def same_family_first(queries, targets, group) -> float:
    scores = queries @ torch.nn.functional.normalize(targets, dim=1).T
    nearest = scores.fill_diagonal_(-2).argmax(1).numpy()
    return float((group[nearest] == group).mean())


def test_the_invariant_metric_finds_what_variance_does_not():
    x, group = families()
    fit = group < 30
    noise, judged = group_noise(x, fit, group), torch.from_numpy(x[~fit])
    share = {}
    for metric in get_args(CodeMetric):
        found = fit_metric(x, fit, metric, noise).encoder(8)
        share[metric] = same_family_first(found(judged), found.decode(found.encode(judged)), group[~fit])
    assert share["variance"] < 0.3 < share["invariant"] > share["whitened"]


def test_variance_is_the_closed_form():
    x, _ = families()
    fit = np.ones(len(x), bool)
    found = fit_metric(x, fit, "variance")
    factors = solve(torch.eye(24), None, 6, "closed_form", Moments.of(torch.from_numpy(x)))
    ours = found.encoder(6).weight.double()
    assert torch.allclose(ours.T @ ours, factors.A.T @ factors.A, atol=1e-5)


def test_only_the_fit_rows_matter():
    x, group = families()
    fit = group < 30
    changed = np.where(fit[:, None], x, 1e3).astype(np.float32)
    one, other = (fit_metric(rows, fit, "invariant", group_noise(rows, fit, group)) for rows in (x, changed))
    for dtype in CODE_TYPES:
        assert one.encoder(8, dtype).digest == other.encoder(8, dtype).digest


def test_noise_of_groups_in_any_order_and_of_copies():
    x, group = families(count=30)
    order = np.random.default_rng(1).permutation(len(x))
    fit = np.ones(len(x), bool)
    assert torch.allclose(group_noise(x, fit, group), group_noise(x[order], fit, group[order]))
    alone = np.where(group < 3, -1, group)
    assert torch.allclose(group_noise(x, fit, alone), group_noise(x, group >= 3, group))
    originals, copies = x[::12], x[np.arange(len(x)) % 12 > 0]
    assert torch.allclose(copy_noise(originals, copies, np.repeat(np.arange(30), 11)), group_noise(x, fit, group))


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_a_map_is_saved_and_loaded_bit_for_bit(tmp_path, dtype):
    x, group = families()
    about = {"backbone": "tiny", "weights_sha256": "0" * 64, "layer": 2, "pooling": "mean"}
    found = fit_metric(x, group < 30, "whitened", provenance=about).encoder(8, dtype)
    again = load(save(found, tmp_path / "map"))
    rows = torch.from_numpy(x)
    assert torch.equal(found.encode(rows), again.encode(rows)) and torch.equal(found(rows), again(rows))
    assert again.digest == found.digest and again.provenance == found.provenance
    assert read_manifest(tmp_path / "map")["layers"][""]["kind"] == "encoder"
    if dtype == "bit":
        assert load(tmp_path / "map", rank=4).rank == 4


def test_what_is_refused():
    x, group = families(count=4)
    fit = np.ones(len(x), bool)
    noise = group_noise(x, fit, group)
    for call, message in [
        (lambda: fit_metric(x, ~fit), "at least 2 proteins"),
        (lambda: fit_metric(x, fit, "invariant"), "but got none"),
        (lambda: fit_metric(x, fit, "invariant", noise[:3, :3]), "(3, 3)"),
        (lambda: fit_metric(x, fit, "invariant", torch.zeros(24, 24)), "differ"),
        (lambda: fit_metric(x, fit, "invariant", noise, 0.0).encoder(25), "[1, 24]"),
        (lambda: group_noise(x, fit, np.arange(len(x))), "alone"),
        (lambda: fit_metric(x, fit, "invariant", copy_noise(x[:2], x[2:4], np.arange(2)), 0.0), "fewer pairs"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
