"""Batches, pooling, windows and short memory."""

import logging
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distil_rank.embedding import embedder
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder, windows

SEQUENCES = ["MKTAYIAKQR", "M", "ACDEFGHIKLMNPQRSTVWY" * 3, "GSHMXBZUO", "MKV"]


@pytest.fixture(scope="module")
def backbone(tiny_esm2):
    return load_backbone(str(tiny_esm2.fair_esm))


def per_sequence(embedded):
    """The vectors of each sequence, (count, dim)."""
    return embedded.vectors.split(embedded.counts)


def reference(model, text):
    """fair-esm's hidden states of one sequence, BOS and EOS included."""
    _, _, tokens = model.alphabet.get_batch_converter()([("x", text)])
    with torch.no_grad():
        return model(tokens, repr_layers=[2])["representations"][2][0]


@pytest.mark.parametrize("max_tokens", [4096, 70, 1])
@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_pooling_equals_fair_esm(tiny_esm2, backbone, pooling, max_tokens):
    results = per_sequence(Embedder(backbone, pooling, max_tokens=max_tokens).embed(SEQUENCES))
    for text, result in zip(SEQUENCES, results, strict=True):
        hidden = reference(tiny_esm2.model, text)
        residues = hidden[1:-1]
        expected = {"mean": residues.mean(0, keepdim=True), "bos": hidden[:1], "residue": residues}[pooling]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400))
def test_batches_hold_each_sequence_once_and_keep_to_the_budget(tiny_esm2, lengths, max_tokens):
    batches = Embedder(load_backbone_once(tiny_esm2), max_tokens=max_tokens).batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] + 2 for i in batch) <= max_tokens for batch in batches)
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_the_last_batches_are_smaller_where_each_core_computes_its_own(tiny_esm2, monkeypatch):
    def sizes() -> list[int]:
        batches = Embedder(load_backbone_once(tiny_esm2), max_tokens=2000).batches([98] * 200)
        return [len(batch) for batch in batches]

    assert sizes() == [20, 20, 20, 20, 20, 20, 20, 15, 11, 8, 6, 5, 5, 5, 5]
    monkeypatch.setattr(embedder, "WIDE", 32)
    assert sizes() == [20] * 10


def test_a_batch_goes_through_the_model_in_one_pass(tiny_esm2, monkeypatch):
    one = Embedder(load_backbone_once(tiny_esm2), max_tokens=2000)
    passes, states = [], one.encoder.states
    monkeypatch.setattr(one.encoder, "states", lambda *given: (passes.append(given), states(*given))[1])
    one.embed(["A" * 98] * 20)
    assert len(passes) == 1


_loaded = {}


def load_backbone_once(tiny_esm2):
    return _loaded.setdefault("tiny", load_backbone(str(tiny_esm2.fair_esm)))


@given(st.integers(1, 3000), st.integers(1, 200))
def test_windows_cover_everything_with_overlap(length, window):
    extents = windows(length, window)
    assert extents[0][0] == 0
    assert extents[-1][1] == length
    assert all(stop - start == min(window, length) for start, stop in extents)
    for (_, stop), (start, _) in pairwise(extents):
        assert stop - start >= window // 4
        assert start > 0


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_windows_average_what_overlaps(tiny_esm2, backbone, pooling):
    text, window = "ACDEFGHIKLMNPQRSTVWY" * 2, 16
    result = Embedder(backbone, pooling, window=window, max_tokens=40).embed([text]).vectors
    sums, counts, bos = torch.zeros(len(text), 32), torch.zeros(len(text), 1), []
    for start, stop in windows(len(text), window):
        hidden = reference(tiny_esm2.model, text[start:stop])
        sums[start:stop] += hidden[1:-1]
        counts[start:stop] += 1
        bos.append(hidden[0])
    residues = sums / counts
    expected = {"mean": residues.mean(0, keepdim=True), "bos": torch.stack(bos).mean(0)[None], "residue": residues}
    torch.testing.assert_close(result, expected[pooling], atol=1e-5, rtol=0)


def test_a_window_that_holds_everything_changes_nothing(backbone):
    whole = per_sequence(Embedder(backbone).embed(SEQUENCES))
    for a, b in zip(whole, per_sequence(Embedder(backbone, window=60).embed(SEQUENCES)), strict=True):
        assert torch.equal(a, b)


def short_of_memory(embedder, most_tokens):
    """Makes the encoder fail as torch does when more than some tokens come at once."""
    encoder, seen = embedder.encoder, []

    class Encoder:
        device, depth, normed = encoder.device, encoder.depth, staticmethod(encoder.normed)

        def states(self, tokens, lengths):
            seen.append(len(tokens))
            if len(tokens) > most_tokens:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return encoder.states(tokens, lengths)

    embedder.encoder = Encoder()
    return seen


def test_a_batch_that_does_not_fit_is_halved(backbone, caplog):
    expected = per_sequence(Embedder(backbone).embed(SEQUENCES))
    embedder = Embedder(backbone)
    seen = short_of_memory(embedder, 70)
    with caplog.at_level(logging.WARNING):
        results = per_sequence(embedder.embed(SEQUENCES))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert "out of memory with" in caplog.text
    assert embedder.max_tokens < 4096, "later batches should be smaller at once"
    seen.clear()
    embedder.embed(["MKV"] * 20)  # 100 tokens
    assert max(seen) <= 70


@pytest.mark.parametrize("pooling", ["mean", "residue"])
def test_one_sequence_that_does_not_fit_is_skipped_and_the_rest_is_computed(backbone, caplog, pooling):
    embedder = Embedder(backbone, pooling)
    short_of_memory(embedder, 30)
    with caplog.at_level(logging.WARNING):
        results = per_sequence(embedder.embed(SEQUENCES))
    assert [len(result) for result in results] == ([1, 1, 0, 1, 1] if pooling == "mean" else [10, 1, 0, 9, 3])
    for text, result in zip(SEQUENCES, results, strict=True):
        expected = Embedder(backbone, pooling).embed([text]).vectors[: len(result)]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert "skipped a sequence: 60 residues do not fit into memory" in caplog.text


def test_a_long_sequence_of_which_one_window_fails_is_skipped_as_a_whole(backbone):
    embedder = Embedder(backbone, window=20, max_tokens=30)
    short_of_memory(embedder, 21)
    assert embedder.embed(["MKV" * 20, "MKV"]).counts == [0, 1]


def test_other_errors_are_not_taken_for_short_memory(backbone, monkeypatch):
    embedder = Embedder(backbone)

    def broken(tokens, lengths):
        raise RuntimeError("a bug")

    monkeypatch.setattr(embedder.encoder, "states", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        per_sequence(embedder.embed(SEQUENCES))


def test_real_lack_of_memory_is_recognised(backbone):
    """The allocator's own error, not an imitation: more than any machine has."""
    embedder = Embedder(backbone)

    class Greedy:
        device = embedder.encoder.device

        def states(self, tokens, lengths):
            return torch.empty(2**60)

    embedder.encoder = Greedy()
    assert embedder.embed(["MKV"]).counts == [0]


def test_results_do_not_depend_on_the_number_of_cores(backbone):
    dice = random.Random(0)
    batches = [(i, ["".join(dice.choices("ACDEFGHIKL", k=dice.randint(5, 90))) for _ in range(7)]) for i in range(9)]
    batches.insert(4, (99, []))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            streamed = list(Embedder(backbone).stream(batches))
            assert torch.get_num_threads() == threads, "as it was before"
            assert [name for name, _ in streamed] == [name for name, _ in batches], "in order"
            results.append(torch.cat([result.vectors for _, result in streamed]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_wide_model_takes_one_batch_after_the_other_with_all_cores(backbone, monkeypatch):
    embedder, batches, before, used = (
        Embedder(backbone),
        [("first", ["MKV"]), ("second", ["ACDE", "F"])],
        torch.get_num_threads(),
        [],
    )
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda texts: (used.append(torch.get_num_threads()), embed(texts))[1])
    torch.set_num_threads(2)
    try:
        narrow = torch.cat([result.vectors for _, result in embedder.stream(batches)])
        monkeypatch.setattr("distil_rank.embedding.embedder.WIDE", backbone.dim)
        wide = torch.cat([result.vectors for _, result in embedder.stream(batches)])
    finally:
        torch.set_num_threads(before)
    assert used == [1, 1, 2, 2]
    torch.testing.assert_close(wide, narrow)


def test_a_failure_in_one_batch_ends_the_stream_and_gives_the_cores_back(backbone, monkeypatch):
    embedder, before = Embedder(backbone), torch.get_num_threads()
    monkeypatch.setattr(embedder, "embed", lambda texts: 1 / 0)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            list(embedder.stream([("one", ["MK"])] * 5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
@pytest.mark.parametrize("window", [None, 8])
def test_several_layers_in_one_pass_are_each_as_alone(backbone, pooling, window):
    layers = [1, 2]
    together = Embedder(backbone, pooling, layers=layers, window=window, max_tokens=30).embed(SEQUENCES)
    for layer, vectors in zip(layers, together.layers, strict=True):
        alone = Embedder(backbone, pooling, layers=[layer], window=window, max_tokens=30).embed(SEQUENCES)
        assert alone.counts == together.counts
        assert torch.equal(vectors, alone.vectors)
