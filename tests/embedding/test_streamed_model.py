"""Layers read one at a time give the same encoders as the whole model, and leave nothing of the file in memory."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from esm.model.esm2 import ESM2

from distil_rank.embedding.backbone import StreamedModel, load_backbone
from distil_rank.embedding.esm2 import FusedEncoder, tokenise
from tests.esm2_files import hugging_face_key

PACKED = ["MKTAYIAKQR", "GDTQLFNW"]


@pytest.mark.parametrize("kind", ["fair_esm", "safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_are_those_of_the_whole_model(tiny_esm2, kind, dtype):
    backbone = load_backbone(str(getattr(tiny_esm2, kind)))
    assert isinstance(backbone.streamed, StreamedModel)
    packed = tokenise(PACKED, backbone.alphabet)
    for layer in (1, 2):
        whole, streamed = (FusedEncoder(model, dtype, layer=layer) for model in (backbone.model, backbone.streamed))
        assert torch.equal(streamed(*packed), whole(*packed))


def test_half_precision_in_files_is_widened(tiny_esm2, tmp_path):
    state = safetensors.torch.load_file(tiny_esm2.safetensors / "model.safetensors")
    halves = {key: value.half() for key, value in state.items() if "inv_freq" not in key}
    safetensors.torch.save_file(halves, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_esm2.safetensors / "config.json").read_text())
    backbone = load_backbone(str(tmp_path))
    packed = tokenise(PACKED, backbone.alphabet)
    assert torch.equal(FusedEncoder(backbone.streamed)(*packed), FusedEncoder(backbone.model)(*packed))


def test_a_checkpoint_of_before_torch_1_6_is_read_as_a_whole(tiny_esm2, tmp_path):
    content = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text((tiny_esm2.bin / "config.json").read_text())
    backbone = load_backbone(str(tmp_path))
    packed = tokenise(PACKED, backbone.alphabet)
    assert backbone.source is None and backbone.streamed is backbone.model
    assert torch.equal(FusedEncoder(backbone.model)(*packed), FusedEncoder(tiny_esm2.model)(*packed))


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
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_nothing_of_the_file_stays_in_memory(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ESM2(6, 192, 4)
    state = {key: value.clone() for key, value in model.state_dict().items() if "lm_head" not in key}
    renamed = {hugging_face_key(key): value for key, value in state.items() if "contact" not in key}
    config = {"model_type": "esm", "position_embedding_type": "rotary", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(renamed, file)
    backbone, size = load_backbone(str(tmp_path)), file.stat().st_size
    before = resident(file)  # what the kernel maps around the file's header
    encoder = FusedEncoder(backbone.streamed, torch.bfloat16)
    assert encoder(*tokenise(PACKED, backbone.alphabet)).isfinite().all()
    assert resident(file) < before + 0.1 * size
    shared = FusedEncoder(backbone.model)
    assert shared(*tokenise(PACKED, backbone.alphabet)).isfinite().all()
    assert resident(file) > 0.9 * size, "where the weights are shared they are read"
