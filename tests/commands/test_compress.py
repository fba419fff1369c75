"""From a state dict and a file of embeddings to a folder that deploys, and on to other runtimes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distil_rank.commands.compress import compress
from distil_rank.commands.export import export
from distil_rank.compression.saved import load, read_manifest, save
from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder
from distil_rank.measure.latency import torch_threads
from distil_rank.options.compression import CompressOptions, ExportOptions
from distil_rank.options.training import DataOptions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A head of two layers, the inputs of the first, and what `compress` makes of them: folder, head, data, report."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    head = nn.ModuleDict({"dense": nn.Linear(24, 20), "out": nn.Linear(20, 2)})
    save_file(head.state_dict(), folder / "head.safetensors")
    x = torch.randn(500, 24) * torch.logspace(0.5, -1.5, 24) + 1
    np.savez(folder / "x.npz", embeddings=x.numpy(), ids=[f"p{i}" for i in range(500)])
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.chdir(folder)
        report = compress(options("dense", rank=6))
    data = EmbeddingDataModule(source=str(folder / "x.npz"))
    data.setup()
    return folder, head, data, report


def options(layer, rank=6, output="out"):
    return CompressOptions("head.safetensors", layer, DataOptions("x.npz"), rank, output)


@torch.no_grad()
def test_a_layer_from_a_file_becomes_a_folder(made):
    folder, head, data, report = made
    manifest = read_manifest(folder / "out")
    r2 = manifest["metrics"]["held_out_r2"]
    assert r2["low"] < r2["value"] < r2["high"]
    assert r2["value"] == pytest.approx(report.layers[0].held_out_r2, abs=1e-5)
    assert manifest["metrics"]["layers"][0]["name"] == "dense"
    assert manifest["data"]["digest"] == data.digest and manifest["data"]["rows"]["test"] == 100
    fit = torch.cat([data.rows("train"), data.rows("val")])
    x, centre = data.rows("test"), head["dense"](fit).mean(0)
    lost = (load(folder / "out")(x) - head["dense"](x)).square().sum() / (head["dense"](x) - centre).square().sum()
    assert r2["value"] == pytest.approx(1 - float(lost), abs=1e-5)


@torch.no_grad()
def test_one_folder_goes_everywhere(made, tmp_path, capsys):
    pytest.importorskip("onnx")
    out, _, data, _ = made[0] / "out", *made[1:]
    student, x = load(out), data.rows("test")
    assert export(ExportOptions(str(out))).name == "layer.onnx"
    dense = load_file(export(ExportOptions(str(out), "dense", 3)))
    torch.testing.assert_close(x @ dense["weight"].T + dense["bias"], student.truncate(3)(x), atol=1e-5, rtol=1e-4)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Expected to write .* but got: (Not a directory|File exists)"):
        export(ExportOptions(str(out), "dense", output=str(tmp_path / "file" / "w.safetensors")))
    dense = load_file(export(ExportOptions(str(out), "dense", output=str(tmp_path / "new" / "w.safetensors"))))
    torch.testing.assert_close(x @ dense["weight"].T + dense["bias"], student(x), atol=1e-5, rtol=1e-4)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new" / "w.safetensors")
    load(out)  # what was exported into the folder does not make it another one
    save(CodeEncoder.of(torch.zeros(3), torch.eye(3)), tmp_path / "encoder")
    with pytest.raises(InputError, match=r"student layer to export but .* is an encoder"):
        export(ExportOptions(str(tmp_path / "encoder")))


def test_what_does_not_fit_is_one_clear_line(made, monkeypatch):
    monkeypatch.chdir(made[0])
    with pytest.raises(InputError, match="inputs of width 20 for this layer but the data have 24"):
        compress(options("out", output="other"))
    with pytest.raises(InputError, match="saves something but no weights saved from rank 11 on; ask for a lower"):
        compress(options("dense", 20, "other"))
    assert not (made[0] / "other").exists()
