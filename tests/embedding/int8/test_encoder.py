"""The int8 encoder against the exact one, on models whose channels differ as little and as much as real ones'."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2

from distil_rank.embedding import embedder
from distil_rank.embedding.backbone import ESM2Backbone, load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.int8 import encoder as int8_encoder
from distil_rank.embedding.int8.encoder import Int8Encoder
from distil_rank.embedding.int8.quantisation import Calibration, CalibrationEncoder
from distil_rank.embedding.precision import calibrate
from distil_rank.errors import InputError
from tests.esm2_files import tokenise

pytestmark = pytest.mark.usefixtures("int8_units")

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def proteins(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(LETTERS, rng.integers(20, 150))) for _ in range(number)]


def backbone_of(model: ESM2) -> ESM2Backbone:
    return ESM2Backbone.of("made here", model, "0" * 64)


@pytest.fixture(scope="module")
def model() -> ESM2:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ESM2(4, 128, 4)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def calibration_of(model: ESM2) -> Calibration:
    encoder = CalibrationEncoder(model)
    encoder(*tokenise(proteins(8, seed=9), model.alphabet))
    return encoder.calibration()


def encoder_of(model: ESM2, layer: int | None = None) -> Int8Encoder:
    return Int8Encoder(CalibrationEncoder(model, layer), calibration_of(model))


def test_the_calibrating_pass_is_exact(model):
    packed = tokenise(proteins(5), model.alphabet)
    torch.testing.assert_close(CalibrationEncoder(model)(*packed), FusedEncoder(model)(*packed), atol=2e-5, rtol=1e-5)


def test_the_noted_ranges_are_those_of_fair_esm_s_own_activations(model):
    text = proteins(1)[0]
    inputs: list[torch.Tensor] = []
    hooks = [layer.fc2.register_forward_hook(lambda m, given, out: inputs.append(given[0])) for layer in model.layers]
    tokens, lengths = tokenise([text], model.alphabet)
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    encoder = CalibrationEncoder(model)
    encoder(tokens, lengths)
    for maxima, given in zip(encoder.maxima, inputs, strict=True):
        torch.testing.assert_close(maxima.fc2, (given + 0.17).abs().flatten(0, -2).amax(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 3, None])
def test_int8_follows_the_exact_encoder(model, layer, bf16, monkeypatch):
    monkeypatch.setattr(int8_encoder, "has_bf16_units", lambda: bf16)
    packed = tokenise(proteins(6), model.alphabet)
    exact = FusedEncoder(model, layer=layer)(*packed)
    rounded = encoder_of(model, layer)(*packed)
    assert rounded.shape == exact.shape
    assert F.cosine_similarity(rounded, exact).min() > 0.995


def test_heads_of_any_number_and_width_are_rotated():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ESM2(3, 168, 7).eval().requires_grad_(False)  # 12 pairs in each of 14 heads
        for layer in model.layers:
            layer.self_attn.q_proj.weight.data *= 6  # otherwise it hardly matters where a token looks
    packed = tokenise(proteins(6), model.alphabet)
    assert F.cosine_similarity(encoder_of(model)(*packed), FusedEncoder(model)(*packed)).min() > 0.995


@pytest.mark.parametrize("wide", [10_000, 64])
def test_bytes_do_not_depend_on_the_batch_or_on_threads(model, wide, monkeypatch):
    for module in (int8_encoder, embedder):
        monkeypatch.setattr(module, "WIDE", wide)
    texts = proteins(12)
    encoder, backbone = encoder_of(model), backbone_of(model)

    def vectors(max_tokens: int, threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        one = Embedder(backbone, max_tokens=max_tokens, encoder=encoder)
        found = torch.zeros(len(texts), 128)
        batches = one.batches([len(text) for text in texts])
        for batch, result in one.stream((batch, [texts[i] for i in batch]) for batch in batches):
            found[batch] = result.vectors
        torch.set_num_threads(before)
        return found

    expected = vectors(10_000, 1)
    with torch.inference_mode():
        assert torch.equal(vectors(10_000, 2), expected)
    for max_tokens, threads in ((1, 1), (300, 1), (300, 2), (700, 2)):
        assert torch.equal(vectors(max_tokens, threads), expected), (max_tokens, threads)


def test_rows_are_cut_evenly(model):
    encoder = encoder_of(model, 1)
    for threads in (1, 2, 3, 8):
        encoder._threads = threads
        for total in (1, 64, 640, 1285, 7000):
            blocks = encoder._blocks(total)
            assert len(blocks) % threads == 0 or total < 16 * threads
            assert all(block.start < block.stop for block in blocks)
            assert [i for block in blocks for i in range(total)[block]] == list(range(total))
            sizes = [block.stop - block.start for block in blocks[:-1]]
            assert max(sizes, default=0) - min(sizes, default=0) <= 16


def test_a_sequence_longer_than_a_thread_s_share_is_cut_by_its_heads(model, monkeypatch):
    encoder = encoder_of(model, 1)
    assert encoder._attention_parts([10, 30]) == [(10, 30, slice(0, 4)), (0, 10, slice(0, 4))]
    monkeypatch.setattr(int8_encoder, "HEADS", 2)
    encoder._pool, encoder._threads = object(), 2
    assert encoder._attention_parts([10, 10, 30, 10, 10]) == [
        *((20, 30, slice(0, 2)), (20, 30, slice(2, 4))),
        *((start, 10, slice(0, 4)) for start in (0, 10, 50, 60)),
    ]


def test_migration_costs_nothing_with_outlier_dimensions():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ESM2(4, 128, 4)
        for layer in model.layers:  # three columns at 50 times the rest
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
                norm.weight.data[[7, 40, 99]] *= 50
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.fc1):
                linear.weight.data[:, [7, 40, 99]] /= 50
    backbone = backbone_of(model)
    calibration, _, migrated = calibrate(backbone, proteins(40), 4)
    _, _, plain = calibrate(backbone, proteins(40), 4, Calibration(calibration.layers, alpha=0))
    assert migrated.worst_cosine > plain.worst_cosine - 1e-4


def test_a_calibration_is_read_as_it_was_written(model, tmp_path):
    calibration = calibration_of(model)
    (tmp_path / "calibration.safetensors").write_bytes(calibration.content())
    read = Calibration.load(tmp_path / "calibration.safetensors")
    assert (read.sha256, read.alpha) == (calibration.sha256, calibration.alpha)
    assert Calibration(calibration.layers, 0.3).sha256 != calibration.sha256


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_what_is_no_calibration_is_refused_in_one_line(content, tmp_path):
    file = tmp_path / "calibration.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="Expected an int8 calibration in"):
        Calibration.load(file)


def test_the_tiny_model_s_files_calibrate(tiny_esm2):
    backbone = load_backbone(str(tiny_esm2.fair_esm))
    calibration, encoder, figures = calibrate(backbone, proteins(30), 2)
    assert (len(calibration.layers), encoder.layer) == (2, 2)
    assert figures.worst_cosine > 0.98
    assert figures.neighbours_retained is not None
