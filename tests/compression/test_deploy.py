"""From a state dict and a file of embeddings to a folder that deploys, and on to other runtimes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distil_rank.compression.artefact import load, read_manifest
from distil_rank.compression.deploy import compress_file, export_artefact
from distil_rank.compression.int8 import Int8LowRankLinear
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.measure.latency import torch_threads


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


@pytest.fixture
def files(tmp_path):
    """A head of two layers, and the inputs of the first."""
    torch.manual_seed(0)
    head = nn.ModuleDict({"dense": nn.Linear(24, 20), "out": nn.Linear(20, 2)})
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    x = torch.randn(500, 24) * torch.logspace(0.5, -1.5, 24) + 1
    np.savez(tmp_path / "x.npz", embeddings=x.numpy(), ids=[f"p{i}" for i in range(500)])
    return tmp_path, head, EmbeddingDataModule(source=str(tmp_path / "x.npz"))


def test_a_layer_from_a_file_becomes_a_folder(files):
    folder, head, data = files
    report, _ = compress_file(data, str(folder / "head.safetensors"), "dense", 0.99, output=str(folder / "out"))
    manifest = read_manifest(folder / "out")
    r2 = manifest["metrics"]["held_out_r2"]
    assert r2["low"] < r2["value"] < r2["high"]
    assert r2["value"] == pytest.approx(report.layers[0].held_out_r2, abs=1e-5)
    assert manifest["data"]["digest"] == data.digest and manifest["data"]["rows"]["test"] == 100
    x = data.rows("test")
    residual = (load(folder / "out")(x) - head["dense"](x)).square().sum()
    assert residual < 0.02 * (head["dense"](x) - head["dense"](x).mean(0)).square().sum()


def test_with_its_tail_a_lower_rank_is_enough(files):
    folder, _, data = files
    model = str(folder / "head.safetensors")
    options = {"rank": 1, "head": f"tanh,{model}:out", "output": str(folder / "out")}
    report, _ = compress_file(data, model, "dense", tune=400, **options)
    assert report.outputs.probability_error < report.untuned.probability_error
    assert load(folder / "out").provenance["tuned_steps"] == 400


@torch.no_grad()
def test_one_folder_goes_everywhere(files):
    pytest.importorskip("onnx")
    folder, _, data = files
    compress_file(data, str(folder / "head.safetensors"), "dense", 6, output=str(folder / "out"))
    student, x = load(folder / "out"), data.rows("test")
    assert export_artefact(str(folder / "out"), "onnx").name == "layer.onnx"
    program = torch.export.load(export_artefact(str(folder / "out"), "torch", rank=3)).module()
    torch.testing.assert_close(program(x), student.truncate(3)(x), atol=1e-5, rtol=1e-4)
    dense = load_file(export_artefact(str(folder / "out"), "dense"))
    torch.testing.assert_close(x @ dense["weight"].T + dense["bias"], student(x), atol=1e-5, rtol=1e-4)
    teacher = f"{folder / 'head.safetensors'}:dense"
    small = export_artefact(str(folder / "out"), "int8", teacher=teacher, data=str(folder / "x.npz"))
    assert small == folder / "out-int8" and isinstance(load(small), Int8LowRankLinear)
    integers = export_artefact(str(folder / "out"), "onnx-int8", data=str(folder / "x.npz"))
    assert integers == folder.resolve() / "out" / "layer-int8.onnx" and integers.exists()
    with pytest.raises(InputError, match="float student and `data` for onnx-int8"):
        export_artefact(str(small), "onnx-int8", data=str(folder / "x.npz"))
    load(folder / "out")  # what was exported into the folder does not make it another artefact
    with pytest.raises(InputError, match="`teacher` and `data` for int8"):
        export_artefact(str(folder / "out"), "int8")


def test_int8_at_once(files):
    folder, _, data = files
    compress_file(data, str(folder / "head.safetensors"), "dense", 6, int8=True, output=str(folder / "out"))
    assert isinstance(load(folder / "out"), Int8LowRankLinear)


def test_what_does_not_fit_is_one_clear_line(files):
    folder, _, data = files
    model = str(folder / "head.safetensors")
    with pytest.raises(InputError, match="inputs of width 20 for this layer but the data have 24"):
        compress_file(data, model, "out", output=str(folder / "out"))
    with pytest.raises(InputError, match="saves something but no weights saved from rank 11 on; ask for a lower"):
        compress_file(data, model, "dense", 20, output=str(folder / "out"))
    assert not (folder / "out").exists()
