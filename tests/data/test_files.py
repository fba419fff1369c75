"""Embeddings in and out of each format; nothing is unpickled, damaged files are refused."""

import argparse
import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from distil_rank.data.files import Embeddings, layer_names, load_matrix, read_clusters
from distil_rank.embedding.sequences import CleaningReport, Protein
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

h5py = pytest.importorskip("h5py", reason="HDF5 is an extra")

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
FULL = Embeddings(
    ids=list("abcdef"),
    x=X,
    sequences=["MK", "MV", "MK", "MA", "MG", "ML"],
    labels=["x", "y", "x", "y", "x", "y"],
    clusters=["1", "2", "1", "3", "4", "5"],
)


def save_safetensors(path):
    metadata = {name: json.dumps(getattr(FULL, name)) for name in ("ids", "sequences", "labels", "clusters")}
    save_file({"embeddings": X}, path, metadata=metadata)


def save_npz(path):
    columns = {name: np.array(getattr(FULL, name)) for name in ("ids", "sequences", "labels", "clusters")}
    np.savez(path, embeddings=X, **columns)


@pytest.mark.parametrize(("name", "save"), [("e.npz", save_npz), ("e.safetensors", save_safetensors)])
def test_a_matrix_and_all_columns(tmp_path, name, save):
    save(tmp_path / name)
    loaded = load_matrix(tmp_path / name)
    assert np.array_equal(loaded.x, X)
    for column in ("ids", "sequences", "labels", "clusters"):
        assert getattr(loaded, column) == getattr(FULL, column)
    assert loaded.provenance["source"] == str(tmp_path / name)


def test_npy_is_mapped_not_read(tmp_path):
    np.save(tmp_path / "e.npy", X)
    loaded = load_matrix(tmp_path / "e.npy")
    assert np.array_equal(loaded.x, X)
    assert loaded.ids == list("012345")
    assert isinstance(loaded.x.base, np.memmap)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_become_float32(tmp_path, dtype):
    np.save(tmp_path / "e.npy", X.astype(dtype))
    assert load_matrix(tmp_path / "e.npy").x.dtype == np.float32


def test_the_only_matrix_needs_no_name(tmp_path):
    np.savez(tmp_path / "e.npz", something=X, other=np.arange(3))
    assert np.array_equal(load_matrix(tmp_path / "e.npz").x, X)


@pytest.mark.parametrize("content", [torch.from_numpy(X), {"embeddings": torch.from_numpy(X).bfloat16()}])
def test_pt(tmp_path, content):
    torch.save(content, tmp_path / "e.pt")
    np.testing.assert_allclose(load_matrix(tmp_path / "e.pt").x, X, atol=0.02)


def test_pt_with_ids(tmp_path):
    torch.save({"embeddings": torch.from_numpy(X), "ids": FULL.ids}, tmp_path / "e.pt")
    assert load_matrix(tmp_path / "e.pt").ids == FULL.ids


def test_the_originals_pair(tmp_path):
    for half, rows in (("train", X[:4]), ("val", X[4:])):
        torch.save(torch.from_numpy(rows), tmp_path / f"embeddings_{half}.pt")
    loaded = load_matrix(tmp_path)
    assert loaded.provenance["rows_train"] == 4
    assert loaded.ids == ["train:0", "train:1", "train:2", "train:3", "val:0", "val:1"]
    assert np.array_equal(loaded.x, X)


def test_hdf5_per_residue(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file.create_dataset("P1", data=X[:4])
        file.create_dataset("P2", data=X[4:])
    loaded = load_matrix(tmp_path / "e.h5")
    assert (loaded.ids, loaded.x.tolist()) == (["P1"] * 4 + ["P2"] * 2, X.tolist())


def test_hdf5_as_uniprot_and_bio_embeddings_write_it(tmp_path):
    with h5py.File(tmp_path / "uniprot.h5", "w") as file:
        file.create_dataset("P69905", data=X[0].astype(np.float16))
        file.create_dataset("3", data=X[1]).attrs["original_id"] = "Q9XYZ1"
    assert sorted(load_matrix(tmp_path / "uniprot.h5").ids) == ["P69905", "Q9XYZ1"]


@pytest.mark.parametrize("kind", ["mean_representations", "bos_representations", "representations"])
def test_fair_esms_folder(tmp_path, kind):
    for i, name in enumerate(["P1", "P2"]):
        vectors = torch.from_numpy(X[2 * i : 2 * i + 2] if kind == "representations" else X[i])
        torch.save({"label": name, kind: {32: vectors + 1, 33: vectors}}, tmp_path / f"{name}.pt")
    loaded = load_matrix(tmp_path)
    assert loaded.provenance["layer"] == 33
    if kind == "representations":
        assert (loaded.ids, loaded.x.tolist()) == (["P1", "P1", "P2", "P2"], X[:4].tolist())
    else:
        assert (loaded.ids, loaded.x.tolist()) == (["P1", "P2"], X[:2].tolist())
    assert len(load_matrix(tmp_path / "P1.pt").x) == (2 if kind == "representations" else 1)


@pytest.mark.parametrize(
    ("other", "got"),
    [
        ({"mean_representations": {6: torch.zeros(4)}}, "mean of layer 6"),
        ({"bos_representations": {33: torch.zeros(4)}}, "bos of layer 33"),
    ],
)
def test_fair_esms_folder_with_two_kinds_is_refused(tmp_path, other, got):
    torch.save({"label": "P1", "mean_representations": {33: torch.zeros(4)}}, tmp_path / "P1.pt")
    torch.save({"label": "P2", **other}, tmp_path / "P2.pt")
    torch.save({"weight": torch.zeros(4, 4)}, tmp_path / "Model.pt")
    with pytest.raises(InputError, match=r"Model\.pt, as fair-esm writes them"):
        load_matrix(tmp_path)
    (tmp_path / "Model.pt").unlink()
    with pytest.raises(InputError, match=rf"but got mean of layer 33 in P1\.pt and {got} in P2\.pt; separate them"):
        load_matrix(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "residue"])
def test_our_store(tmp_path, pooling):
    writer = StoreWriter(tmp_path / "s")
    settings = {"dim": 4, "pooling": pooling, "long": "window", "max_length": 9}
    with writer.storage.lock():
        writer.plan(
            [Protein("a", "MK"), Protein("b", "MKV")], settings, {"backbone": "x", "fallback": None}, CleaningReport("")
        )
        for shard in writer.pending():
            counts = [2, 3] if pooling == "residue" else [1, 1]
            writer.write_part(shard, [0, 1], counts, X[: sum(counts)])
            writer.seal(shard)
        writer.finish()
    loaded = load_matrix(tmp_path / "s")
    assert loaded.ids == (["a"] * 2 + ["b"] * 3 if pooling == "residue" else ["a", "b"])
    assert loaded.sequences == (["MK"] * 2 + ["MKV"] * 3 if pooling == "residue" else ["MK", "MKV"])
    assert np.array_equal(loaded.x, X[: len(loaded.ids)])
    assert loaded.provenance["format"] == "store"
    assert len(loaded.provenance["digest"]) == 64


def test_one_layer_of_our_store(tmp_path):
    writer = StoreWriter(tmp_path / "s")
    settings = {"dim": 4, "pooling": "mean", "long": "window", "max_length": 9, "layers": [1, 2]}
    with writer.storage.lock():
        writer.plan([Protein("a", "MK")], settings, {"backbone": "x", "fallback": None}, CleaningReport(""))
        (shard,) = writer.pending()
        writer.write_part(shard, [0], [1], np.stack([X[:1], 2 * X[:1]]))
        writer.seal(shard)
        writer.finish()
    for layer, factor in ((1, 1), (2, 2)):
        found = load_matrix(f"{tmp_path}/s:{layer}")
        assert np.array_equal(found.x, factor * X[:1]) and found.provenance["layer"] == layer
    with pytest.raises(InputError, match="layer out of 1, 2"):
        load_matrix(f"{tmp_path}/s:3")
    with pytest.raises(InputError, match="does not exist"):
        load_matrix(f"{tmp_path}/none:1")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match=r"several layers before :1"):
        load_matrix(f"{tmp_path}/x.npy:1")


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_pickles_are_refused_and_not_run(tmp_path):
    bad = Exploit(str(tmp_path / "never"))
    (tmp_path / "e.pt").write_bytes(pickle.dumps(bad, protocol=2))
    torch.save({"embeddings": torch.from_numpy(X), "more": bad}, tmp_path / "f.pt")
    np.save(tmp_path / "g.npy", np.array([[bad]]), allow_pickle=True)
    np.savez(tmp_path / "h.npz", embeddings=np.array([[bad]]))
    for name in ("e.pt", "f.pt", "g.npy", "h.npz"):
        with pytest.raises(InputError, match="cannot be read") as refused:
            load_matrix(tmp_path / name)
        assert "allow_pickle" not in str(refused.value), "nobody is told how to load it unsafely"
    assert not (tmp_path / "never").exists()


def test_text_with_another_name_has_no_arrays(tmp_path):
    for name in ("e.pt", "e.npy", "e.npz"):
        (tmp_path / name).write_text("embeddings of mine")
        with pytest.raises(InputError, match=r"cannot be read \(no arrays\)"):
            load_matrix(tmp_path / name)


def test_namespaces_are_allowed_as_fair_esm_writes_them(tmp_path):
    torch.save({"embeddings": torch.from_numpy(X), "args": argparse.Namespace(layer=3)}, tmp_path / "e.pt")
    assert np.array_equal(load_matrix(tmp_path / "e.pt").x, X)


@pytest.mark.parametrize("name", ["e.npz", "e.safetensors", "e.npy", "e.h5", "e.pt"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_truncated_files_get_one_line(tmp_path, name, keep):
    path = tmp_path / name
    if name == "e.pt":
        torch.save(torch.from_numpy(X), path)
    elif name == "e.safetensors":
        save_safetensors(path)
    elif name == "e.h5":
        with h5py.File(path, "w") as file:
            file.update(dict(zip(FULL.ids, X, strict=True)))
    else:
        (np.save if name == "e.npy" else np.savez)(path, X)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot be read") as caught:
        load_matrix(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embeddings": X[0]}, r"float matrix \(N, d\)"),
        ({"embeddings": X[:0]}, r"float matrix \(N, d\)"),
        ({"embeddings": np.arange(6).reshape(2, 3)}, r"float matrix \(N, d\)"),
        (
            {"embeddings": np.where(np.arange(24).reshape(6, 4) == 14, np.nan, X), "ids": np.array(FULL.ids)},
            r"row 3 \(d\) holds NaN",
        ),
        ({"embeddings": np.where(np.arange(24).reshape(6, 4) == 20, np.inf, X)}, r"row 5 \(5\) holds NaN or inf"),
        ({"embeddings": X, "ids": np.array(["a"])}, "Expected 6 ids .* but got 1"),
        ({"embeddings": X, "labels": np.array(["a"])}, "Expected 6 labels .* but got 1"),
        ({"a": X, "b": X}, "but got a, b; name one of them"),
        ({name: X for name in "abcde"}, r"but got a, b, c, \.\.\.; name one of them"),
        ({}, "but got nothing"),
    ],
)
def test_other_content_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_matrix(tmp_path / "e.npz")


def test_paths(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_matrix(tmp_path / "none.npz")
    (tmp_path / "x.csv").touch()
    with pytest.raises(InputError, match=r"\.npz.* but got x\.csv"):
        load_matrix(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="but got empty"):
        load_matrix(tmp_path / "empty")


def test_vectors_of_several_widths_are_refused(tmp_path):
    for i, width in enumerate((3, 4)):
        torch.save({"label": f"P{i}", "mean_representations": {6: torch.zeros(width)}}, tmp_path / f"{i}.pt")
    with pytest.raises(InputError, match=r"one width .* got 3, 4;"):
        load_matrix(tmp_path)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file.create_dataset("a", data=X[0])
        file.create_dataset("b", data=X[0, :2])
    with pytest.raises(InputError, match="one width"):
        load_matrix(tmp_path / "e.h5")


def test_clusters_are_read_by_member_and_missing_ones_are_named(tmp_path):
    table = tmp_path / "clusters.tsv"
    table.write_text("a\ta\na\tb\n")
    assert read_clusters(table, ["b", "a"]) == ["a", "a"]
    with pytest.raises(InputError, match="c has none"):
        read_clusters(table, ["a", "c"])
    table.write_text("one column\n")
    with pytest.raises(InputError, match="representative, tab, member"):
        read_clusters(table, ["a"])


def test_ids_are_accessions_in_every_format_as_in_fasta(tmp_path, caplog):
    name = "sp|P69905|HBA_HUMAN"
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file.create_dataset(name, data=X[0])
    np.savez(tmp_path / "e.npz", embeddings=X[:1], ids=np.array([name]))
    torch.save({"label": f"{name} Hemoglobin", "mean_representations": {6: torch.zeros(4)}}, tmp_path / "e.pt")
    with caplog.at_level(logging.INFO):
        for file in ("e.h5", "e.npz", "e.pt"):
            assert load_matrix(tmp_path / file).ids == ["P69905"]
    assert f"shortened to accessions: {name} to P69905" in caplog.text
    (tmp_path / "clusters.tsv").write_text(f"{name}\t{name}\n")
    assert read_clusters(tmp_path / "clusters.tsv", ["P69905"]) == [name]


@pytest.fixture(params=["npz", "npy", "hdf5"])
def several_layers(request, tmp_path):
    """A file of three layers of six proteins, and the vectors, (3, 6, 4)."""
    x, path = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32), tmp_path / f"x.{request.param}"
    ids = [f"P{row}" for row in range(6)]
    if request.param == "npz":
        np.savez(path, embeddings=x, ids=ids, layers=["2", "3", "12"])
    elif request.param == "npy":
        np.save(path, x)
    else:
        with h5py.File(path, "w") as file:
            for name, layer in zip(("layer_2", "layer_3", "layer_12"), x, strict=True):
                for key, vector in zip(ids, layer, strict=True):
                    file[f"{name}/{key}"] = vector
    return path, x


def test_one_of_several_layers_is_read(several_layers):
    path, x = several_layers
    names = layer_names(str(path))
    assert names == (["1", "2", "3"] if path.suffix == ".npy" else ["2", "3", "12"])
    for name, layer in zip(names, x, strict=True):
        one = load_matrix(f"{path}:{name}")
        np.testing.assert_array_equal(one.x, layer)
        assert one.provenance["layer"] == name
    np.testing.assert_array_equal(load_matrix(path).x, x[-1])
    with pytest.raises(InputError, match=r"Expected one of 3 different layers of .* but got 7"):
        load_matrix(f"{path}:7")


def test_groups_of_other_names_than_layers_are_parts_of_the_name(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in ("human/P1", "human/P2", "mouse/P1"):
            file[name] = np.zeros(4, dtype=np.float32)
    assert load_matrix(tmp_path / "x.h5").ids == ["human/P1", "human/P2", "mouse/P1"]
