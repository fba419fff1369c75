"""A layer is read out of every common file, bit for bit, and nothing is ever unpickled."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distil_rank.compression.own_layer import load_head, load_linear, read_state_dict
from distil_rank.errors import InputError


class Touch:
    """What a hostile pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def state(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 2)).to(dtype)
    return {f"head.{name}": value for name, value in model.state_dict().items()}


def write(kind, folder, tensors):
    if kind == "safetensors":
        save_file(tensors, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "pt":
        torch.save(tensors, folder / "m.pt")
        return folder / "m.pt"
    if kind == "lightning":
        torch.save({"state_dict": tensors, "epoch": 3}, folder / "m.ckpt")
        return folder / "m.ckpt"
    if kind == "fair-esm":
        torch.save({"model": tensors, "cfg": argparse.Namespace(layers=6)}, folder / "m.pt")
        return folder / "m.pt"
    if kind == "hugging face":
        save_file(tensors, folder / "model.safetensors")
        return folder
    if kind == "hugging face bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    first, second = dict(list(tensors.items())[:1]), dict(list(tensors.items())[1:])
    save_file(first, folder / "model-1.safetensors")
    save_file(second, folder / "model-2.safetensors")
    shards = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


@pytest.mark.parametrize(
    "kind", ["safetensors", "pt", "lightning", "fair-esm", "hugging face", "hugging face bin", "shards"]
)
def test_every_kind_of_file_gives_the_same_layer(tmp_path, kind):
    tensors = state()
    path = write(kind, tmp_path, tensors)
    for key in ("head.0", "head.0.weight"):
        layer = load_linear(f"{path}:{key}")
        assert torch.equal(layer.weight, tensors["head.0.weight"])
        assert torch.equal(layer.bias, tensors["head.0.bias"])
    assert read_state_dict(path).keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_dtype_and_missing_bias_are_retained(tmp_path, dtype, bias):
    path = write("safetensors", tmp_path, state(dtype, bias))
    layer = load_linear(f"{path}:head.0")
    assert layer.weight.dtype == dtype
    assert (layer.bias is not None) == bias
    assert (layer.out_features, layer.in_features) == (7, 5)


def test_the_key_may_be_left_out_only_where_it_is_clear(tmp_path):
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "one.safetensors")
    assert load_linear(str(tmp_path / "one.safetensors")).bias is not None
    path = write("safetensors", tmp_path, state())
    with pytest.raises(InputError, match=r"holds 2; name one: head\.0\.weight, head\.2\.weight"):
        load_linear(str(path))


def test_at_most_three_of_many_matrices_are_named(tmp_path):
    save_file({f"head.{i}": torch.ones(2, 3) for i in range(706)}, tmp_path / "many.safetensors")
    for key, message in (("", "holds 706; name one: "), (":x", "but it has none; its matrices: ")):
        with pytest.raises(
            InputError, match=message + r"head\.0, head\.1, head\.2, \.\.\.$|head\.10, \.\.\.\.$"
        ) as refused:
            load_linear(f"{tmp_path}/many.safetensors{key}")
        assert str(refused.value).count("head.") == 3


def test_a_hostile_pickle_never_runs(tmp_path):
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="pickled Python objects"):
        load_linear(f"{tmp_path}/evil.pt:w")
    assert not (tmp_path / "ran").exists()


def test_a_shard_index_cannot_lead_elsewhere(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"w": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="names files elsewhere"):
        load_linear(f"{folder}:w")


def broken(tensors, name):
    tensors = dict(tensors)
    if name == "nan":
        tensors["head.0.weight"] = tensors["head.0.weight"].clone().fill_(float("nan"))
    elif name == "bias":
        tensors["head.0.bias"] = torch.ones(3)
    elif name == "integers":
        tensors["head.0.weight"] = torch.ones(7, 5, dtype=torch.int8)
    elif name == "vector":
        tensors["head.0.weight"] = torch.ones(7)
    return tensors


@pytest.mark.parametrize(
    ("name", "message"),
    [("nan", "finite weights"), ("bias", "a bias of 7"), ("integers", "got int8"), ("vector", r"got float32 \(7,\)")],
)
def test_a_layer_that_cannot_be_used_is_one_clear_line(tmp_path, name, message):
    path = write("safetensors", tmp_path, broken(state(), name))
    with pytest.raises(InputError, match=message) as error:
        load_linear(f"{path}:head.0")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.pt:w", "there is nothing"),
        ("{file}:head.9", "its matrices: head.0.weight"),
        ("{empty}:w", "Expected model.safetensors or pytorch_model.bin"),
        ("{garbage}:w", "cannot be loaded safely"),
        ("{tensor}:w", "Expected named weights"),
    ],
)
def test_wrong_specs_say_what_would_be_right(tmp_path, spec, message):
    path = write("safetensors", tmp_path, state())
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.safetensors").write_bytes(b"\x80\x04not a model at all, really")
    torch.save(torch.ones(2, 2), tmp_path / "tensor.pt")
    places = {
        name: tmp_path / f
        for name, f in [("empty", "empty"), ("garbage", "garbage.safetensors"), ("tensor", "tensor.pt")]
    }
    with pytest.raises(InputError, match=message):
        load_linear(spec.format(file=path, **places))


def test_a_tail_is_the_function_behind_the_layer(tmp_path):
    tensors = state()
    path = write("safetensors", tmp_path, tensors)
    head = load_head(f"tanh, {path}:head.2")
    x = torch.randn(4, 7)
    expected = torch.tanh(x) @ tensors["head.2.weight"].T + tensors["head.2.bias"]
    torch.testing.assert_close(head(x), expected)
    assert not any(p.requires_grad for p in head.parameters())
    with pytest.raises(InputError, match="as a step of the head but got 'swish'"):
        load_head("swish")
