"""What runs on a GPU, here without one: the numbers on the CPU, the waits on tensors that only claim to be on a GPU."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distil_rank.embedding import embedder, extraction, gpu, planning
from distil_rank.embedding.backbone import ESM2Backbone, load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.esm2 import FusedEncoder, attend_sequentially
from distil_rank.embedding.gpu import GpuEncoder, prepared
from distil_rank.embedding.run import embed
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store import Store, read_provenance
from tests.esm2_files import tokenise
from tests.stores import content, write_fasta

SEQUENCES = ["MKTAYIAKQR", "M", "ACDEFGHIKLMNPQRSTVWY" * 3, "GSHMXBZUO", "MKV"]
POOLINGS = ["mean", "bos", "residue"]


def attend(q, k, v, offsets, _, longest, __):
    """The device's kernel, on a CPU."""
    lengths = offsets.diff().tolist()
    assert offsets.dtype == torch.int32 and max(lengths) == longest and q.dtype == torch.bfloat16
    return attend_sequentially(q, k, v, lengths)


class Stream:
    """Of a device that is done at once."""

    def __init__(self, device=None):
        """Made for a device, or got from it."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return SimpleNamespace(synchronize=lambda: None)


@pytest.fixture
def device(monkeypatch):
    """A CPU in place of the GPU: its kernel, its streams and its pinned memory."""
    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(gpu, "pinned_like", partial(torch.empty_like, device="cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.fixture(scope="module")
def backbone(tiny_esm2):
    return load_backbone(str(tiny_esm2.fair_esm))


def on_gpu(backbone, pooling="mean", dtype=torch.bfloat16, layers=(2,), **options):
    encoder = GpuEncoder(backbone.model, dtype, "cpu", layers[-1])
    return Embedder(backbone, pooling, layers=layers, encoder=encoder, **options)


def streamed(embedder, batches):
    return torch.cat([result.layers for _, result in embedder.stream(enumerate(batches))], dim=1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_encoder_gives_what_the_cpus_gives(device, backbone, layer):
    packed = tokenise(SEQUENCES, backbone.model.alphabet)
    expected = FusedEncoder(backbone.model, layer=layer)(*packed)
    torch.testing.assert_close(
        GpuEncoder(backbone.model, torch.float32, "cpu", layer)(*packed), expected, atol=1e-5, rtol=0
    )
    rounded = GpuEncoder(backbone.model, torch.bfloat16, "cpu", layer)(*packed)
    assert rounded.dtype == torch.float32
    assert F.cosine_similarity(rounded, expected).min() > 0.9995


def test_weights_that_are_rounded_on_the_device_are_those_of_an_encoder_made_in_that_type(device, backbone):
    packed = tokenise(SEQUENCES, backbone.model.alphabet)
    converted = GpuEncoder(backbone.model)
    converted.convert_to(torch.bfloat16)
    assert torch.equal(converted(*packed), GpuEncoder(backbone.model, torch.bfloat16)(*packed))


def test_positions_beyond_the_tables(device, backbone, monkeypatch):
    monkeypatch.setattr(gpu, "POSITIONS", 4)
    packed = tokenise(SEQUENCES, backbone.model.alphabet)
    torch.testing.assert_close(
        GpuEncoder(backbone.model)(*packed), FusedEncoder(backbone.model)(*packed), atol=1e-5, rtol=0
    )


def test_functions_are_compiled_once_for_all_layers_and_any_number_of_tokens(device, backbone, monkeypatch):
    """But for the last step, to C++ here, which takes half a minute: the benchmark does that."""
    graphs, compile_graph, backend = [], torch.compile, torch._dynamo.lookup_backend("aot_eager")
    encoder, plain = (GpuEncoder(backbone.model, torch.bfloat16) for _ in range(2))

    def counted(part, **options):
        return compile_graph(part, backend=lambda *graph: (graphs.append(part), backend(*graph))[1], **options)

    monkeypatch.setattr(torch, "compile", counted)
    encoder.compile()
    assert encoder.kernels == "compiled kernels"
    for sequences in (SEQUENCES, SEQUENCES[:2], SEQUENCES * 3):
        packed = tokenise(sequences, backbone.model.alphabet)
        assert F.cosine_similarity(encoder(*packed), plain(*packed)).min() > 0.9999
    assert graphs == [gpu.project, gpu.feed_forward]


def test_without_a_compiler_it_says_so_once_and_goes_on(device, backbone, monkeypatch, caplog):
    def broken(*graph):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    encoder, packed = GpuEncoder(backbone.model, torch.bfloat16), tokenise(SEQUENCES, backbone.model.alphabet)
    expected = encoder(*packed)
    encoder.compile()
    assert torch.equal(encoder(*packed), expected)
    assert "uncompiled" in encoder.kernels and "no compiler here" in encoder.kernels
    ours = [record for record in caplog.records if record.name.startswith("distil_rank")]
    assert len(ours) == 1 and "no compiler here" in ours[0].getMessage()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
@pytest.mark.parametrize("max_tokens", [4096, 40])
def test_every_pooling_equals_fp32_to_bf16s_rounding(device, backbone, pooling, window, layers, max_tokens):
    expected = Embedder(backbone, pooling, layers=layers, window=window).embed(SEQUENCES).layers
    for dtype in (torch.float32, torch.bfloat16):
        one = on_gpu(backbone, pooling, dtype, layers, window=window, max_tokens=max_tokens)
        result = streamed(one, [SEQUENCES[:3], [], SEQUENCES[3:]])
        assert F.cosine_similarity(result, expected, dim=-1).min() > 0.9995
        torch.testing.assert_close(result, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
        assert torch.equal(result, streamed(one, [SEQUENCES[:3], [], SEQUENCES[3:]])), "the same bytes each time"


def short_of_memory(one, most_tokens, monkeypatch):
    """Makes the encoder fail as torch does on a GPU when more than some tokens come at once."""
    seen, states = [], one.encoder.states

    def limited(tokens, lengths, *places):
        seen.append(len(tokens))
        if len(tokens) > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(tokens, lengths, *places)

    monkeypatch.setattr(one.encoder, "states", limited)
    return seen


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_that_does_not_fit_is_halved_and_later_ones_grow_again(device, backbone, pooling, monkeypatch, caplog):
    monkeypatch.setattr(embedder, "RECOVERY", 2)
    expected = streamed(on_gpu(backbone, pooling), [SEQUENCES])
    one = on_gpu(backbone, pooling, max_tokens=128)
    seen = short_of_memory(one, 70, monkeypatch)
    result = streamed(one, [SEQUENCES])
    assert F.cosine_similarity(result, expected, dim=-1).min() > 0.9995
    assert "out of memory with" in caplog.text and one.max_tokens < 70
    for _ in range(40):
        one.embed(["MKV"])
    assert one.max_tokens == 128, "as much as at first is tried again"
    seen.clear()
    one.embed(["MKV"] * 20)  # 100 tokens
    assert max(seen) == 100


def test_one_sequence_that_does_not_fit_is_skipped(device, backbone, monkeypatch, caplog):
    one = on_gpu(backbone, "residue")
    short_of_memory(one, 30, monkeypatch)
    ((_, result),) = one.stream([("all", SEQUENCES)])
    assert result.counts == [10, 1, 0, 9, 3] and result.vectors.shape == (23, 32)
    assert "skipped a sequence: 60 residues" in caplog.text


def test_batches_leave_no_small_rest(device, backbone):
    batches = on_gpu(backbone, max_tokens=2000).batches([98] * 205)
    assert [len(batch) for batch in batches] == [18] * 4 + [19] * 7
    assert max(map(len, on_gpu(backbone, max_tokens=2000).batches([98] * 40))) == 20


def test_what_fails_in_the_preparing_thread_fails_here(device):
    with pytest.raises(ZeroDivisionError):
        list(prepared([1, 0], lambda number: 1 / number, torch.device("cpu")))
    assert list(prepared(iter(range(9)), lambda number: 2 * number, torch.device("cpu"))) == list(range(0, 18, 2))


@pytest.fixture
def card(device, monkeypatch):
    """`embed` with a GPU, whose encoder computes on the CPU; small shards, several of which fill a batch."""
    properties = SimpleNamespace(total_memory=80 * 2**30)
    answers = {"is_available": True, "current_device": 0, "get_device_properties": properties}
    answers |= {"get_device_name": "a card", "is_bf16_supported": True}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(
        ESM2Backbone, "encoder", lambda self, dtype, _, layers: GpuEncoder(self.model, dtype, layer=max(layers))
    )
    monkeypatch.setattr(planning, "SHARD_RESIDUES", (150, 2**22))


def vectors_of(path, layer=None):
    store = Store.open(f"{path}:{layer}" if layer else path)
    store.verify()
    return torch.from_numpy(store.embeddings())


@pytest.mark.parametrize("options", [{}, {"pooling": "bos"}, {"pooling": "residue"}, {"layer": "1,2"}])
def test_a_store_made_on_a_gpu_holds_what_one_made_on_a_cpu_does(card, tiny_esm2, tmp_path, options):
    fasta, layer = tmp_path / "in.fasta", 1 if "layer" in options else None
    write_fasta(fasta, 60, 40)
    common = {"backbone": str(tiny_esm2.fair_esm), "max_length": 30, **options}
    summary = embed(fasta, tmp_path / "gpu", accelerator="cuda", max_tokens=200, **common)
    embed(fasta, tmp_path / "cpu", accelerator="cpu", precision="fp32", **common)
    mine, expected = (vectors_of(tmp_path / name, layer) for name in ("gpu", "cpu"))
    assert F.cosine_similarity(mine, expected).min() > 0.9995
    assert summary.precision == "bf16" and summary.precision_note.startswith("bf16: worst cosine 0.99")
    assert summary.precision_note.endswith("; uncompiled kernels")
    (entry,) = read_provenance(Storage(tmp_path / "gpu"))["extractions"]
    assert (entry["kernels"], entry["machine"]["device"]) == ("uncompiled kernels", "a card")


def test_batches_are_cut_across_shards(card, tiny_esm2, tmp_path, monkeypatch):
    fasta, batches, states = tmp_path / "in.fasta", [], GpuEncoder.states
    write_fasta(fasta, 60, 40)
    monkeypatch.setattr(
        GpuEncoder, "states", lambda self, tokens, *rest: (batches.append(len(tokens)), states(self, tokens, *rest))[1]
    )
    options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cuda", "precision": "bf16", "max_tokens": 500}
    embed(fasta, tmp_path / "store", **options)
    assert len(list((tmp_path / "store").glob("vectors-*"))) > 8
    assert len(batches) == 3 and min(batches) > 400


def test_killed_at_any_write_it_ends_in_the_same_bytes(card, tiny_esm2, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    fasta, write, writes = tmp_path / "in.fasta", Storage.write, []
    write_fasta(fasta, 60, 40)

    def run(store, killed_at=None):
        def counted(self, name, what):
            writes.append(name)
            if len(writes) == killed_at:
                raise Killed
            write(self, name, what)

        writes.clear()
        monkeypatch.setattr(Storage, "write", counted)
        options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cuda", "precision": "bf16", "max_tokens": 200}
        embed(fasta, store, **options)

    run(tmp_path / "whole")
    expected, count = content(tmp_path / "whole"), len(writes)
    assert sum(name.startswith("parts/") for name in writes) > 5
    for killed_at in range(3, count, 3):
        store = tmp_path / f"killed {killed_at}"
        with pytest.raises(Killed):
            run(store, killed_at)
        run(store)
        assert content(store) == expected
        assert not (store / "parts").exists()


def test_what_did_not_fit_is_tried_again_with_the_shards_that_are_computed_together(
    card, tiny_esm2, tmp_path, monkeypatch
):
    fasta, store, pooled = tmp_path / "in.fasta", tmp_path / "store", Embedder._pooled
    write_fasta(fasta, 60, 40)
    options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cuda", "precision": "bf16", "max_tokens": 200}

    def limited(self, one):
        if max(one.lengths) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pooled(self, one)

    monkeypatch.setattr(Embedder, "_pooled", limited)
    assert embed(fasta, store, **options).skipped > 0
    files = {file.name: file.read_bytes() for file in store.glob("vectors-*")}
    monkeypatch.setattr(Embedder, "_pooled", pooled)
    assert embed(fasta, store, **options).computed == 0
    for shard in Store.open(store).manifest["shards"]:
        if shard["skipped"]:
            (store / shard["file"]).unlink()
    assert embed(fasta, store, **options).skipped == 0
    Store.open(store).verify()
    unchanged = [name for name in files if files[name] == (store / name).read_bytes()]
    assert 0 < len(unchanged) < len(files), "shards that had all keep their files"
    embed(fasta, tmp_path / "whole", **options)
    whole, retried = (vectors_of(path) for path in (tmp_path / "whole", store))
    assert F.cosine_similarity(whole, retried).min() > 0.9995


@pytest.mark.parametrize(("repaid", "kernels"), [(1, "compiled kernels"), (1e9, "uncompiled kernels")])
def test_it_compiles_where_the_residues_repay_it(card, tiny_esm2, tmp_path, monkeypatch, repaid, kernels, caplog):
    caplog.set_level("INFO", "distil_rank")
    monkeypatch.setattr(extraction, "REPAID", repaid)
    monkeypatch.setattr(torch, "compile", lambda part: part)
    write_fasta(tmp_path / "in.fasta", 9, 40)
    options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cuda", "precision": "bf16"}
    assert embed(tmp_path / "in.fasta", tmp_path / "store", **options).precision_note == kernels
    assert f"computing in bf16 on a card, with {kernels}" in caplog.text


def test_several_devices_share_what_is_joined(card, tiny_esm2, tmp_path):
    fasta = tmp_path / "in.fasta"
    write_fasta(fasta, 60, 40)
    request = extraction.EmbedOptions(
        fasta, tmp_path / "store", str(tiny_esm2.fair_esm), precision="bf16", max_tokens=500
    )
    one = extraction.Extraction(request, torch.device("cuda"))
    with one.writer.storage.lock():
        one.plan()
    single = one.writer.pending()
    for devices in (0, 1, 2, 4):
        shards = one.pending(devices)
        rows = [shard.rows for shard in shards]
        assert [row for extent in rows for row in extent] == sorted(row for extent in rows for row in extent)
        assert (rows[0][0], rows[-1][1]) == (single[0].rows[0], single[-1].rows[1])
        assert len(shards) >= devices and (len(shards) < len(single)) == (devices == 1)


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait for the device, or the device for the host's memory."""

    def __init__(self):
        super().__init__()
        self.noted, self.operations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kinds = [
            {tensor.device.type for tensor in tree_leaves(values) if isinstance(tensor, torch.Tensor)}
            for values in ((args, kwargs), result)
        ]
        self.operations += "cuda" in kinds[1]
        across = len(kinds[0] | kinds[1]) > 1 and "copy" in str(function)
        asynchronous = (kwargs or {}).get("non_blocking") or any(value is True for value in args)
        scalars = "cuda" in kinds[0] and not kinds[1] and function.namespace == "aten"
        if (across and not asynchronous) or scalars or torch.Tag.dynamic_output_shape in function.tags:
            self.noted.append(str(function))
        return result


@pytest.fixture
def claimed(device, monkeypatch):
    """Tensors that have a device, cuda, and no content: whatever asks for a value fails."""
    monkeypatch.undo()
    for name, value in {"Stream": Stream, "stream": nullcontext, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(gpu, "pinned_like", partial(torch.empty_like, device="cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("window", [None, 16])
def test_nothing_waits_inside_a_batch(claimed, backbone, pooling, window):
    encoder = GpuEncoder(backbone.model, torch.bfloat16, "cuda:0")
    one = Embedder(backbone, pooling, layers=[1, 2], window=window, max_tokens=40, encoder=encoder)
    with Waits() as waits:
        results = list(one.stream([("first", SEQUENCES), ("second", SEQUENCES[:2])]))
    assert waits.noted == []
    assert waits.operations > 50, "they were seen"
    assert [result.layers.device.type for _, result in results] == ["cpu"] * 2
    assert isinstance(results[0][1].layers, FakeTensor)


@pytest.mark.parametrize("ask", ["item", "cpu", "tolist", "nonzero", "__bool__"])
def test_waits_would_be_seen(claimed, ask):
    tensor = torch.ones(1, device="cuda:0")
    with Waits() as waits:
        try:
            getattr(tensor, ask)()
        except Exception:
            return  # a tensor without content has no value
    assert waits.noted
