"""What is saved comes back bit for bit; what was tampered with is refused in one clear line."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distil_rank.compression import artefact
from distil_rank.compression.artefact import load, read_manifest, save
from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.errors import InputError
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments


def student(bias=True, dtype=torch.float32, guard=True):
    torch.manual_seed(3)
    x = torch.randn(300, 20, dtype=dtype) + 1
    teacher = nn.Linear(20, 14, bias, dtype=dtype)
    layer = LowRankLinear.from_linear(teacher, 6, Moments.of(x))
    layer.guard = Guard.of(teacher, layer, x) if guard else None
    return layer


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
    assert torch.equal(layer.guard.sketch, again.guard.sketch)
    assert (again.guard.scale, again.guard.thresholds) == (layer.guard.scale, layer.guard.thresholds)
    assert load(tmp_path, rank=2).guard.thresholds == layer.guard.thresholds[:2]
    assert again.provenance == layer.provenance
    assert again.A.requires_grad


@pytest.mark.parametrize("int8", [False, True])
def test_one_file_serves_every_rank(tmp_path, int8):
    layer = Int8LowRankLinear.from_low_rank(student()) if int8 else student()
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
    model.back = Int8LowRankLinear.from_low_rank(LowRankLinear.from_linear(model.back, 2, solver="svd"))
    save(model, tmp_path)
    again = load(tmp_path, into=Net().eval())
    assert torch.equal(again(tokens), model(tokens))
    assert isinstance(again.dense, LowRankLinear) and isinstance(again.back, Int8LowRankLinear)
    assert load_file(tmp_path / artefact.WEIGHTS).keys() == model.state_dict().keys() - {"out.weight"}
    assert load(tmp_path, rank=1, into=Net()).dense.rank == 1
    with pytest.raises(InputError, match="Expected `into`, a model"):
        load(tmp_path)
    with pytest.raises(InputError, match="to be \\(12, 8\\) but it is"):
        load(tmp_path, into=nn.ModuleDict({"dense": nn.Linear(3, 3), "back": nn.Linear(12, 8)}))
    with pytest.raises(InputError, match="'dense' in `into` but it has none"):
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
    assert layer["parameters"] == 6 * 34 + 14 and layer["dense_parameters"] == 20 * 14 + 14
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
        manifest["files"]["model.safetensors"]["sha256"] = artefact._file_digest(folder / "model.safetensors")
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


STATE = {name: value.detach() for name, value in student(guard=False).state_dict().items()}
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
    "files elsewhere": (lambda m: m["files"].update({"../x": {"sha256": "0"}}), None, "but it lists"),
    "no files": (lambda m: m.update(files={}), None, "lists nothing"),
    "files of text": (lambda m: m.update(files="x"), None, "cannot be read"),
    "layers of text": (lambda m: m.update(layers="x"), None, "do not fit"),
    "nan": (nothing, {"A": torch.full((6, 20), float("nan"))}, "holds NaN"),
    "another dtype": (nothing, {name: value.half() for name, value in STATE.items()}, "do not fit"),
    "missing tensor": (nothing, {"A": torch.zeros(6, 20)}, "do not fit"),
    "garbage": (nothing, b"not tensors at all", "something else or damaged"),
    "empty": (nothing, b"", "something else or damaged"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_with_right_hashes_are_refused(tmp_path, name):
    change, weights, message = FORGERIES[name]
    save(student(guard=False), tmp_path)
    rewrite(tmp_path, change, weights)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickle_in_place_of_the_weights_never_runs(tmp_path):
    save(student(guard=False), tmp_path)
    rewrite(tmp_path, nothing, pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(InputError, match="something else or damaged"):
        load(tmp_path)
    torch.save({"A": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    rewrite(tmp_path, nothing, (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(InputError, match="something else or damaged"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "guard.safetensors", "manifest.json"])
def test_truncated_and_missing_files_are_refused(tmp_path, name):
    save(student(), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"hash differs|cannot be read"):
        load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"missing|has no manifest"):
        load(tmp_path)


def test_any_changed_byte_is_noticed(tmp_path):
    save(student(guard=False), tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors as it was saved but its hash differs"):
        load(tmp_path)
    save(student(guard=False), tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"rank": 6', '"rank": 5'))
    with pytest.raises(InputError, match=r"manifest\.json as it was saved"):
        load(tmp_path)


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
    model.a.guard = Guard.of(nn.Linear(8, 8), model.a, x)
    again = load(save(model, tmp_path), into=Twice())
    assert again.a is again.b and torch.equal(again(x), model(x))
    assert torch.equal(again.b.guard.sketch, model.a.guard.sketch)
    small = load(tmp_path, rank=2, into=Twice())
    assert small.a is small.b and small.a.rank == 2


def test_what_cannot_be_saved_leaves_the_former_artefact(tmp_path):
    first = student()
    save(first, tmp_path, metrics={"accuracy": np.float32(0.5), "loss": torch.tensor(2.0)})
    assert read_manifest(tmp_path)["metrics"] == {"accuracy": 0.5, "loss": 2.0}
    with pytest.raises(InputError, match="JSON values to save beside the weights but got a Linear"):
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


def test_saving_again_leaves_nothing_of_the_former(tmp_path):
    save(student(), tmp_path)
    save(student(guard=False), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "model.safetensors"]
    assert load(tmp_path).guard is None


def test_loading_takes_torch_and_safetensors_only(tmp_path):
    save(student(), tmp_path)
    blocked = "lightning", "torchmetrics", "mlflow", "esm", "jsonargparse", "pyarrow", "matplotlib", "rich", "tqdm"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        f"from distil_rank.compression.artefact import load; import torch\n"
        f"print(load({str(tmp_path)!r}, rank=2)(torch.ones(1, 20)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 14])"


def test_a_guard_saved_with_the_threshold_of_one_rank_still_loads(tmp_path):
    layer = student()
    save(layer, tmp_path)
    rewrite(tmp_path, lambda manifest: manifest["layers"][""]["guard"].pop("thresholds"))
    assert load(tmp_path).guard.thresholds == (layer.guard.threshold,)
    assert load(tmp_path, rank=3).guard.threshold is None


@pytest.mark.parametrize("thresholds", [[-1.0], [1.0] * 7, "x", [None]])
def test_thresholds_that_cannot_be_are_refused(tmp_path, thresholds):
    save(student(), tmp_path)
    rewrite(tmp_path, lambda manifest: manifest["layers"][""]["guard"].update(thresholds=thresholds))
    with pytest.raises(InputError):
        load(tmp_path)
