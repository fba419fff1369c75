"""What is saved comes back bit for bit; what was tampered with is refused in one clear line."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distil_rank import artefact
from distil_rank.compression.saved import load, read_manifest, save
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments


def student(bias=True, dtype=torch.float32):
    torch.manual_seed(3)
    x = torch.randn(300, 20, dtype=dtype) + 1
    teacher = nn.Linear(20, 14, bias, dtype=dtype)
    return LowRankLinear.from_linear(teacher, 6, Moments.of(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.dense = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.back = nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight  # tied

    def forward(self, tokens):
        return self.out(self.back(self.norm(self.dense(self.embed(tokens)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_comes_back_bit_for_bit(tmp_path, dtype):
    layer = student(dtype=dtype)
    again = load(save(layer, tmp_path))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and value.dtype == again.state_dict()[name].dtype
    assert again.provenance == layer.provenance
    assert again.A.requires_grad


def test_one_file_serves_every_rank(tmp_path):
    layer = student()
    save(layer, tmp_path)
    x = torch.randn(5, 20)
    for rank in range(1, 7):
        torch.testing.assert_close(load(tmp_path, rank=rank)(x), layer.truncate(rank)(x), rtol=0, atol=1e-6)
    for rank in (0, 7, -1):
        with pytest.raises(InputError, match=rf"\[1, 6\].* but got {rank}"):
            load(tmp_path, rank=rank)


def test_a_whole_model_comes_back_with_its_students_and_tied_weights(tmp_path):
    torch.manual_seed(0)
    model, tokens = Net().eval(), torch.randint(0, 11, (9,))
    model.dense = LowRankLinear.from_linear(model.dense, 3, Moments.of(torch.randn(50, 8)))
    model.back = LowRankLinear.from_linear(model.back, 2, solver="svd")
    save(model, tmp_path)
    again = load(tmp_path, into=Net().eval())
    assert torch.equal(again(tokens), model(tokens))
    assert isinstance(again.dense, LowRankLinear) and isinstance(again.back, LowRankLinear)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys() - {"out.weight"}
    assert load(tmp_path, rank=1, into=Net()).dense.rank == 1
    with pytest.raises(InputError, match="Expected `into` to load"):
        load(tmp_path)
    with pytest.raises(InputError, match="to be \\(12, 8\\) but it is"):
        load(tmp_path, into=nn.ModuleDict({"dense": nn.Linear(3, 3), "back": nn.Linear(12, 8)}))
    with pytest.raises(InputError, match=r"'dense' of `into` to be .* but it is missing"):
        load(tmp_path, into=nn.Linear(2, 2))
    wrong = Net()
    wrong.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="do not fit"):
        load(tmp_path, into=wrong)


def test_the_manifest_says_what_there_is_to_know(tmp_path):
    save(student(), tmp_path, metrics={"r2": {"value": 0.9, "low": 0.8, "high": float("inf")}}, data={"sha256": "ab"})
    manifest = read_manifest(tmp_path)
    layer = manifest["layers"][""]
    assert (layer["in_features"], layer["out_features"], layer["rank"]) == (20, 14, 6)

    assert len(layer["provenance"]["r2"]) == 6
    assert len(layer["provenance"]["teacher_sha256"]) == len(layer["provenance"]["moments_sha256"]) == 64
    assert manifest["metrics"]["r2"] == {"value": 0.9, "low": 0.8, "high": None}
    assert manifest["versions"]["torch"] and manifest["licence"] and manifest["data"] == {"sha256": "ab"}


def rewrite(folder, change, weights=None):
    """What a careful forger does: change the content and mend every hash."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights) if isinstance(weights, bytes) else save_file(
            weights, folder / "model.safetensors"
        )
        file = folder / "model.safetensors"
        manifest["files"][file.name] = {"sha256": artefact.sha256_of(file), "bytes": file.stat().st_size}
    manifest["sha256"] = artefact._manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge_layer(**changes):
    return lambda manifest: manifest["layers"][""].update(changes)


def nothing(manifest):
    pass


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


STATE = {name: value.detach() for name, value in student().state_dict().items()}
FORGERIES = {
    "later version": (lambda m: m.update(version=99), None, "version 1 but .* has 99; upgrade"),
    "another format": (lambda m: m.update(format="zip"), None, "manifest is of 'zip'"),
    "rank 0": (forge_layer(rank=0), None, r"`rank` in \[1, 14\]"),
    "rank beyond": (forge_layer(rank=10**15), None, r"`rank` in \[1, 14\]"),
    "rank of text": (forge_layer(rank="6"), None, "Expected a layer of"),
    "other rank": (forge_layer(rank=5), None, "do not fit"),
    "other shape": (forge_layer(in_features=19), None, "do not fit"),
    "huge shape": (forge_layer(in_features=10**30), None, "do not fit"),
    "unknown kind": (forge_layer(kind="eval"), None, "Expected a layer of"),
    "unknown dtype": (forge_layer(dtype="object"), None, "do not fit"),
    "no files": (lambda m: m.update(files={}), None, "do not fit"),
    "files of text": (lambda m: m.update(files="x"), None, "cannot be read"),
    "layers of text": (lambda m: m.update(layers="x"), None, "do not fit"),
    "nan": (nothing, {"A": torch.full((6, 20), float("nan"))}, "holds NaN"),
    "another dtype": (nothing, {name: value.half() for name, value in STATE.items()}, "do not fit"),
    "missing tensor": (nothing, {"A": torch.zeros(6, 20)}, "do not fit"),
    "garbage": (nothing, b"not tensors at all", "do not fit"),
    "empty": (nothing, b"", "do not fit"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_with_right_hashes_are_refused(tmp_path, name):
    change, weights, message = FORGERIES[name]
    save(student(), tmp_path)
    rewrite(tmp_path, change, weights)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickle_in_place_of_the_weights_never_runs(tmp_path):
    save(student(), tmp_path)
    rewrite(tmp_path, nothing, pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(InputError, match="do not fit"):
        load(tmp_path)
    torch.save({"A": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    rewrite(tmp_path, nothing, (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(InputError, match="do not fit"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_unusable_is_saved(tmp_path):
    with pytest.raises(InputError, match="got Linear without"):
        save(nn.Linear(2, 2), tmp_path)
    layer = student()
    layer.A.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="'A' holds NaN or inf"):
        save(layer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        save(student(), tmp_path / "file")


def test_a_layer_in_two_places_stays_one(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(50, 8)
    model.a = model.b = LowRankLinear.from_linear(model.a, 3, Moments.of(x))
    again = load(save(model, tmp_path), into=Twice())
    assert again.a is again.b and torch.equal(again(x), model(x))
    small = load(tmp_path, rank=2, into=Twice())
    assert small.a is small.b and small.a.rank == 2


def test_what_cannot_be_saved_leaves_the_former_artefact(tmp_path):
    first = student()
    save(first, tmp_path, metrics={"accuracy": np.float32(0.5), "loss": torch.tensor(2.0)})
    assert read_manifest(tmp_path)["metrics"] == {"accuracy": 0.5, "loss": 2.0}
    with pytest.raises(InputError, match="JSON values to save but got a Linear"):
        save(student(bias=False), tmp_path, metrics={"model": nn.Linear(2, 2)})
    assert torch.equal(load(tmp_path).A, first.A)


def test_what_cannot_be_loaded_leaves_the_model_as_it_was(tmp_path):
    model = Net().eval()
    model.dense = LowRankLinear.from_linear(model.dense, 3, solver="svd")
    save(model, tmp_path)
    other = Net().eval()
    other.norm = nn.LayerNorm(12)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for options in ({}, {"rank": 99}, {"rank": 2.0}, {"rank": True}):
        with pytest.raises(InputError, match="do not fit" if not options else "`rank` in"):
            load(tmp_path, into=other, **options)
        assert isinstance(other.dense, nn.Linear)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
