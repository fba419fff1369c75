"""The packed, fused forward against fair-esm's own."""

import pytest
import torch

from distil_rank.embedding.esm2 import FusedEncoder
from tests.esm2_files import tokenise

SEQUENCES = ["MKTAYIAKQR", "M", "GSHMXBZUO", "ACDEFGHIKLMNPQRSTVWY" * 12]


def reference(model, sequences, layer):
    """fair-esm's hidden states of each sequence, BOS and EOS included."""
    _, _, tokens = model.alphabet.get_batch_converter()([(str(i), text) for i, text in enumerate(sequences)])
    with torch.no_grad():
        hidden = model(tokens, repr_layers=[layer])["representations"][layer]
    return [hidden[i, : len(text) + 2] for i, text in enumerate(sequences)]


def test_tokens_are_fair_esms(tiny_esm2):
    alphabet = tiny_esm2.model.alphabet
    tokens, lengths = tokenise(SEQUENCES, alphabet)
    parts = tokens.split(lengths)
    for text, part in zip(SEQUENCES, parts, strict=True):
        assert part.tolist() == [alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fp32_equals_fair_esm_at_every_layer(tiny_esm2, layer):
    encoder = FusedEncoder(tiny_esm2.model, layer=layer)
    tokens, lengths = tokenise(SEQUENCES, tiny_esm2.model.alphabet)
    ours = encoder(tokens, lengths).split(lengths)
    for mine, theirs in zip(ours, reference(tiny_esm2.model, SEQUENCES, layer), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_sequence_does_not_see_its_neighbours(tiny_esm2):
    encoder = FusedEncoder(tiny_esm2.model)
    alone = encoder(*tokenise(SEQUENCES[:1], tiny_esm2.model.alphabet))
    together = encoder(*tokenise(SEQUENCES, tiny_esm2.model.alphabet))[: len(alone)]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_beyond_the_trained_length(tiny_esm2):
    long = ["MKTAYIAKQRQISFVKSHFSRQ" * 60]  # 1320 residues: positions are rotary, so nothing ends at 1024
    ours = FusedEncoder(tiny_esm2.model)(*tokenise(long, tiny_esm2.model.alphabet))
    torch.testing.assert_close(ours, reference(tiny_esm2.model, long, 2)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bf16_stays_close(tiny_esm2, layer):
    tokens, lengths = tokenise(SEQUENCES, tiny_esm2.model.alphabet)
    half = FusedEncoder(tiny_esm2.model, torch.bfloat16, layer=layer)(tokens, lengths)
    whole = FusedEncoder(tiny_esm2.model, layer=layer)(tokens, lengths)
    assert half.shape == whole.shape and half.dtype == torch.float32
    assert torch.cosine_similarity(half, whole).min() > 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_length_is_attended_within_its_own(tiny_esm2, dtype):
    """Whatever is left of a multiple of the keys that are taken at once, in the middle of a batch and at its end."""
    sequences = ["ACDEFGHIKLMNPQRSTVWY"[: 1 + i % 20] * (1 + i % 3) for i in range(40)]
    encoder = FusedEncoder(tiny_esm2.model, dtype)
    together = encoder(*tokenise(sequences, tiny_esm2.model.alphabet)).split([len(text) + 2 for text in sequences])
    for text, mine in zip(sequences, together, strict=True):
        alone = reference(tiny_esm2.model, [text], 2)[0]
        torch.testing.assert_close(mine, alone, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_without_token_dropout(tiny_esm2, monkeypatch):
    monkeypatch.setattr(tiny_esm2.model, "token_dropout", False)
    ours = FusedEncoder(tiny_esm2.model)(*tokenise(SEQUENCES[:1], tiny_esm2.model.alphabet))
    torch.testing.assert_close(ours, reference(tiny_esm2.model, SEQUENCES[:1], 2)[0], atol=1e-5, rtol=0)
