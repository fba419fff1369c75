"""Precision by request, hardware and comparison; stores of int8 vectors."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distil_rank.embedding import precision
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.run import embed
from distil_rank.embedding.storage import Storage
from distil_rank.embedding.store import Store, read_provenance
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.errors import InputError

needs_units = pytest.mark.usefixtures("int8_units")


@pytest.fixture
def fasta(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    texts = ["".join(rng.choice(letters, rng.integers(10, 200))) for _ in range(80)]
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def run(tiny_esm2, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "MIN_INT8_COSINE", 0.9)  # two random layers amplify errors
    monkeypatch.setattr(precision, "MIN_INT8_NEIGHBOURS", 0.3)
    monkeypatch.setattr(precision, "native_precision", lambda device: "fp32")

    def call(fasta, store="store", **options):
        return embed(fasta, tmp_path / store, **{"backbone": str(tiny_esm2.fair_esm), "accelerator": "cpu", **options})

    return call


@needs_units
def test_an_int8_store_tells_its_calibration_and_its_gate(run, fasta, tmp_path):
    summary = run(fasta, precision="int8")
    manifest = Store.open(tmp_path / "store").manifest
    assert (summary.precision, manifest["precision"]) == ("int8", "int8")
    assert manifest["calibration_sha256"] == precision.read_calibration(tmp_path / "store").sha256
    assert 0.9 < manifest["int8_gate"]["worst_cosine"] < 1
    assert summary.precision_note.startswith("int8: worst cosine 0.9")
    exact = run(fasta, "exact", precision="fp32")
    vectors = [Store.open(tmp_path / name).embeddings() for name in ("store", "exact")]
    cosines = torch.nn.functional.cosine_similarity(*map(torch.as_tensor, vectors))
    assert cosines.min() > 0.9
    assert exact.digest != summary.digest


@needs_units
def test_a_resumed_int8_store_has_the_same_bytes(run, fasta, tmp_path, monkeypatch):
    expected = run(fasta, precision="int8", max_tokens=400)
    write, left = StoreWriter.write_part, iter(range(5))

    def killed(self, *args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            run(fasta, "other", precision="int8", max_tokens=400)
    with monkeypatch.context() as patch:
        patch.setattr(precision, "calibrate", lambda *_: pytest.fail("calibrated again"))
        resumed = run(fasta, "other", precision="int8", max_tokens=400)
    assert 0 < resumed.computed < expected.computed
    assert resumed.digest == expected.digest


@needs_units
def test_stores_of_different_precision_or_calibration_do_not_mix(run, fasta, tmp_path):
    run(fasta, precision="fp32")
    with pytest.raises(InputError, match="Expected precision 'fp32', which the store"):
        run(fasta, precision="int8")
    assert run(fasta, precision="auto-int8").precision == "fp32"
    run(fasta, "int8", precision="int8")
    with pytest.raises(InputError, match="Expected precision 'int8', which the store"):
        run(fasta, "int8", precision="fp32")
    assert run(fasta, "int8").precision == "int8", "auto keeps what the store has"
    with (tmp_path / "int8" / "calibration.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    with pytest.raises(InputError, match="was changed"):
        run(fasta, "int8")


@needs_units
def test_another_store_s_calibration_can_be_used(run, fasta, tmp_path):
    first = run(fasta, precision="int8")
    reversed_ = tmp_path / "reversed.fasta"
    reversed_.write_text("".join(f">{part}" for part in reversed(fasta.read_text().split(">")[1:])))
    assert run(reversed_, "own", precision="int8").digest != first.digest
    run(reversed_, "same", precision="int8", calibration=tmp_path / "store")
    hashes = [
        json.loads((tmp_path / name / "manifest.json").read_text())["calibration_sha256"] for name in ("store", "same")
    ]
    assert hashes[0] == hashes[1]


@needs_units
def test_with_another_store_s_calibration_int8_is_compared_on_the_store_s_own_proteins(
    run, fasta, tmp_path, monkeypatch
):
    run(fasta, precision="int8")
    own = tmp_path / "own.fasta"
    own.write_text("".join(f">q{i}\n{'MKWV' * (i + 3)}\n" for i in range(30)))
    run(own, "own", precision="int8", calibration=tmp_path / "store")
    gates = [Store.open(tmp_path / name).manifest["int8_gate"] for name in ("store", "own")]
    assert gates[0]["worst_cosine"] != gates[1]["worst_cosine"]
    monkeypatch.setattr(precision, "MIN_INT8_COSINE", 1.1)
    with pytest.raises(InputError, match=r"Expected int8 to reach a cosine of 1\.1 to fp32"):
        run(own, "refused", precision="int8", calibration=tmp_path / "store")
    assert run(own, "exact", precision="auto-int8", calibration=tmp_path / "store").precision == "fp32"


@needs_units
def test_int8_that_disagrees_is_refused_by_name_and_replaced_in_auto(run, fasta, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(precision, "MIN_INT8_COSINE", 1.1)
    with pytest.raises(InputError, match=r"Expected int8 to reach a cosine of 1\.1 to fp32 .* in bf16 or fp32"):
        run(fasta, precision="int8")
    assert not (tmp_path / "store").exists(), "a refused request leaves nothing"
    summary = run(fasta, precision="auto-int8")
    assert summary.precision == "fp32"
    assert "int8 is too far from fp32" in summary.precision_note
    assert "going on in fp32" in caplog.text


@needs_units
def test_int8_without_numba_takes_the_next_precision_and_a_store_in_int8_names_it(run, fasta, monkeypatch, caplog):
    run(fasta, "retained", precision="int8", max_tokens=400)
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    for name in ("numba", "distil_rank.embedding.int8.encoder"):
        monkeypatch.setitem(sys.modules, name, None)
    summary = run(fasta, precision="int8")
    assert summary.precision == precision.native_precision(torch.device("cpu"))
    assert "int8 needs numba (pip install 'distil-rank[int8]'): going on in" in caplog.text
    more = fasta.with_name("more.fasta")
    more.write_text(fasta.read_text() + ">other\nMKVLA\n")
    with pytest.raises(InputError, match=r"retained are, but int8 needs numba \(pip install"):
        run(more, "retained")


@needs_units
@pytest.mark.parametrize("requested", ["int8", "auto"])
def test_a_store_in_int8_is_not_continued_where_sums_could_saturate(run, fasta, tmp_path, requested, monkeypatch):
    run(fasta, precision="int8")
    before = Store.open(tmp_path / "store").digest
    monkeypatch.setattr(precision, "has_int8_units", lambda: False)
    with pytest.raises(InputError, match="store are, but this processor has no int8 units"):
        run(fasta, precision=requested)
    writer = StoreWriter(tmp_path / "store")
    with pytest.raises(InputError, match="this processor has no int8 units"):  # as a worker that joins would
        precision.store_calibration(writer, torch.device("cpu"))
    assert Store.open(tmp_path / "store").digest == before


@needs_units
def test_a_calibration_of_another_model_is_refused(run, fasta, tmp_path, tiny_esm2):
    run(fasta, precision="int8", layer=1)
    with pytest.raises(InputError, match="Expected a calibration of 2 layers of width 32 but got 1 of width 32"):
        run(fasta, "other", precision="int8", calibration=tmp_path / "store")
    with pytest.raises(InputError, match=r"Expected the calibration of a store of .* but .*store is of"):
        run(fasta, "other", precision="int8", calibration=tmp_path / "store", backbone=str(tiny_esm2.safetensors))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("requested", ["int8", "auto-int8"])
def test_processors_without_int8_units_take_the_next_precision(run, fasta, requested, monkeypatch, caplog):
    monkeypatch.setattr(precision, "has_int8_units", lambda: False)
    with caplog.at_level(logging.WARNING):
        summary = run(fasta, precision=requested)
    assert summary.precision == "fp32"
    assert "this processor has no int8 units (VNNI or AMX): going on in fp32" in caplog.text
    assert run(fasta, precision=requested).computed == 0, "and again"


def test_a_gpu_takes_the_next_precision():
    assert "CPU" in precision.int8_missing(torch.device("cuda"))


def test_agreement_counts_neighbours_by_brute_force():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 8)) + 3
    b = a + 0.8 * rng.normal(size=a.shape)
    centred = [x - a.mean(0) for x in (a, b)]
    nearest = []
    for x in centred:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores = unit @ unit.T - 9 * np.eye(20)
        nearest.append([set(np.argsort(-row)[:5]) for row in scores])
    retained = np.mean([len(p & q) / 5 for p, q in zip(*nearest, strict=True)])
    figures = precision.agreement(torch.tensor(a), torch.tensor(b))
    assert figures.neighbours_retained == pytest.approx(retained)
    assert 0 < retained < 1
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert figures.worst_cosine == pytest.approx(cosine.min())


def test_nan_does_not_suffice():
    assert not precision.agreement(torch.ones(3, 2), torch.full((3, 2), torch.nan)).suffices(0.0)


def test_bf16_is_compared_with_fp32(run, fasta, monkeypatch, caplog):
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    with caplog.at_level(logging.INFO):
        summary = run(fasta)
    assert summary.precision == "bf16" and "bf16: worst cosine 0.99" in summary.precision_note
    assert "computing in bf16: worst cosine 0.99" in caplog.text
    (extraction,) = read_provenance(Storage(fasta.parent / "store"))["extractions"]
    assert extraction["bf16"].startswith("bf16: worst cosine 0.999")
    assert "going on in fp32" not in caplog.text


def test_bf16_that_disagrees_is_replaced_by_fp32_with_a_warning(run, fasta, monkeypatch, caplog):
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(precision, "MIN_BF16_COSINE", 1.1)
    with caplog.at_level(logging.WARNING):
        assert run(fasta).precision == "fp32"
    assert "going on in fp32" in caplog.text
    store = Store.open(fasta.parent / "store")
    assert store.manifest["precision"] == "fp32"
    assert run(fasta).precision == "fp32", "and the decision stays"


def test_bf16_is_compared_on_the_beginning_of_a_long_protein(run, fasta, monkeypatch):
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    original, compared = precision.pooled, []
    monkeypatch.setattr(precision, "pooled", lambda *given: (compared.append(given[2]), original(*given))[1])
    fasta.write_text(f">titin\n{'MKVL' * 8803}\n{fasta.read_text()}")
    run(fasta, layer=1)
    assert [texts[0] for texts in compared] == ["MKVL" * 64] * 2
    assert sum(map(len, compared[0])) < 2048 + 256


def test_an_explicit_bf16_store_stays_bf16(run, fasta, monkeypatch):
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(precision, "MIN_BF16_COSINE", 1.1)
    assert run(fasta, precision="bf16").computed > 0
    assert (run(fasta).precision, run(fasta).computed) == ("bf16", 0)
    fasta.write_text(fasta.read_text() + ">new\nMKVLAAGIV\n")
    assert (run(fasta).precision, Store.open(fasta.parent / "store").manifest["precision"]) == ("bf16", "bf16")


def test_bf16_with_nan_for_one_protein_is_replaced_by_fp32(run, fasta, monkeypatch, caplog):
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    original = FusedEncoder.__call__

    def overflowing(self, tokens, lengths):
        hidden = original(self, tokens, lengths)
        if self.dtype == torch.bfloat16:
            hidden[-2] = torch.nan
        return hidden

    monkeypatch.setattr(FusedEncoder, "__call__", overflowing)
    assert run(fasta).precision == "fp32"
    assert "going on in fp32" in caplog.text


def test_precision_follows_the_hardware(monkeypatch):
    for flag, expected in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert precision.native_precision(torch.device("cpu")) == expected
