"""Copies as rows to fit to: labelled by the backbone, weighed together as much as their protein, used if better."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embed import embed
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.store import Store
from distil_rank.exits.augmentation import AugmentedRows, augment
from distil_rank.exits.exit_map import fit_exit
from tests.exits.conftest import write_proteins


@pytest.fixture(scope="module")
def store(tiny_esm2, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("states")
    write_proteins(folder / "in.fasta", 40, 10, 20)
    done = embed(folder / "in.fasta", folder / "store", str(tiny_esm2.fair_esm), layer="1,1n,2", precision="fp32")
    return Store.open(done.store)


def test_the_backbone_labels_copies_of_the_chosen_proteins(store, tiny_esm2, tmp_path: Path):
    copies = augment(store, [State(1), State(1, True)], np.array([3, 30, 7]), 2, tmp_path)
    assert sorted(copies.owner.tolist()) == [3, 3, 7, 7, 30, 30] and copies.weight == 0.5
    assert [len(text) for text in copies.sequences] == [round(0.7 * len(store.sequences[row])) for row in copies.owner]
    ours = Embedder(load_backbone(str(tiny_esm2.fair_esm))).embed(list(copies.sequences)).vectors
    torch.testing.assert_close(copies.y, ours, atol=1e-5, rtol=0)
    assert copies.x.shape == (6, 64) and sorted(copies.owner[copies.of(np.array([7, 8]))]) == [7, 7]


def linear(rows: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, 30, generator=draw)
    return x, x @ W.T + noise * torch.randn(rows, 4, generator=draw)


@pytest.mark.parametrize("useful", [True, False])
def test_they_are_used_where_validation_is_better(useful):
    x, y = linear(400, 1.0, 1)
    split = Split(np.arange(40), np.arange(40, 100), np.arange(100, 400), "exact")
    more_x, more_y = linear(400, 1.0, 2)
    more_y = more_y if useful else -more_y
    copies = AugmentedRows(more_x, more_y, np.arange(400) % 100, [""] * 400, 0.25)
    found = fit_exit(lambda rows: (x[rows], y[rows]), [State(1)], split, copies=copies)
    plain = fit_exit(lambda rows: (x[rows], y[rows]), [State(1)], split)
    told = found.augmentation
    assert told is not None and told.used == useful and told.copies == 400
    assert told.without == plain.choice.r2 and (told.r2 > told.without) == useful
    assert (found.r2[-1] > plain.r2[-1]) if useful else (found.r2 == plain.r2)


def test_weights_are_those_of_weighted_least_squares():
    x, y = linear(50, 1.0, 1)
    more_x, more_y = linear(80, 1.0, 2)
    split = Split(np.arange(30), np.arange(30, 50), np.arange(30, 50), "exact")
    copies = AugmentedRows(more_x, more_y, np.arange(80) % 50, [""] * 80, 0.3)
    found = fit_exit(lambda rows: (x[rows], y[rows]), [State(1)], split, copies=copies)
    assert found.augmentation is not None and found.augmentation.used
    a, b = x - x.mean(0), more_x - more_x.mean(0)
    rows = torch.cat([a, 0.3**0.5 * b]).double()
    targets = torch.cat([y - y.mean(0), 0.3**0.5 * (more_y - more_y.mean(0))]).double()
    gram = rows.T @ rows
    expected = torch.linalg.solve(gram + found.choice.ridge * torch.diag(gram.diagonal()), rows.T @ targets).T
    ours = found.layer.to_linear()
    torch.testing.assert_close(ours.weight.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x.mean(0)), y.mean(0), atol=1e-4, rtol=0)
