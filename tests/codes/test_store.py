"""Stores of codes: what they hold, what they refuse, and the same bytes however often the writer was killed."""

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distil_rank.codes import store as code_store
from distil_rank.codes.fit import fit_metric
from distil_rank.codes.store import ENCODER, CodeStore, load_encoder, write_codes
from distil_rank.compression.saved import save
from distil_rank.embedding import planning
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CODE_TYPES
from distil_rank.lowrank.low_rank import LowRankLinear

KILLS = 8
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def source(tiny_esm2, tmp_path_factory) -> Store:
    """300 proteins, some of them equal, in many shards."""
    folder = tmp_path_factory.mktemp("codes")
    dice = random.Random(0)
    sequences = ["".join(dice.choices(AMINO_ACIDS, k=dice.randint(5, 40))) for _ in range(290)]
    sequences += sequences[:10]
    fasta = folder / "proteins.fasta"
    fasta.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(sequences)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_RESIDUES", (200, 200))
        embed(fasta, folder / "store", str(tiny_esm2.fair_esm), accelerator="cpu", precision="fp32")
    store = Store.open(folder / "store")
    assert len(store.manifest["shards"]) > 20
    return store


def fitted(source, dtype="bit"):
    x = source.embeddings()
    about = {key: source.manifest[key] for key in ("weights_sha256", "layer", "pooling")}
    return fit_metric(x, np.ones(len(x), bool), "whitened", provenance=about).encoder(8, dtype)


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_codes_in_the_order_of_the_proteins(source, tmp_path, dtype):
    encoder = fitted(source, dtype)
    save(encoder, tmp_path / "codes" / ENCODER)
    found = write_codes(source, tmp_path / "codes", encoder)
    assert found.ids == source.ids and found.sequences == source.sequences
    expected = encoder.encode(torch.from_numpy(source.embeddings().copy())).numpy()
    # products of other numbers of rows differ in float32's last bits
    assert np.allclose(found.embeddings(), expected, atol=1e-6) and found.embeddings().dtype == expected.dtype
    assert found.encoder.digest == encoder.digest
    found.verify()
    assert found.manifest["code"]["bytes"] == encoder.bytes_per_protein
    before = found.digest
    assert write_codes(source, tmp_path / "codes", encoder).digest == before


def content(store: Path) -> dict[str, bytes]:
    """What two runs agree in; the record of when and where they ran is their own."""
    files = [file for file in sorted(store.iterdir()) if file.is_file() and file.name != "provenance.json"]
    return {file.name: file.read_bytes() for file in files}


def attempt(source, path, encoder, log):
    torch.set_num_threads(1)
    original = code_store._encode_shard

    def slow(*arguments):
        time.sleep(0.02)
        original(*arguments)
        with log.open("a") as file:
            file.write("shard\n")

    code_store._encode_shard = slow
    planning.SHARD_RESIDUES = (200, 200)
    write_codes(Store.open(source), path, encoder)


def test_eight_kills_while_encoding(source, tmp_path):
    _kill_often(attempt, (source.path, fitted(source)), tmp_path, tmp_path / "log")


def embedding_attempt(fasta, path, backbone, encoder, log):
    torch.set_num_threads(1)
    original = Embedder.embed

    def slow(self, sequences):
        time.sleep(0.005)
        with log.open("a") as file:
            file.write("batch\n")
        return original(self, sequences)

    Embedder.embed = slow
    embed(fasta, path, backbone, accelerator="cpu", precision="fp32", max_tokens=200, encoder=encoder)


def test_eight_kills_while_embedding_into_codes(source, tiny_esm2, tmp_path):
    fasta, encoder, log = source.path.parent / "proteins.fasta", fitted(source), tmp_path / "log"
    _kill_often(embedding_attempt, (fasta, str(tiny_esm2.fair_esm), encoder), tmp_path, log)


def _kill_often(attempt, arguments, folder, log):
    """Eight kills, each while work is going on, end in the bytes of a run that nobody killed."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["distil_rank.codes.store"])

    def start(path, log):
        first, *rest = arguments
        process = forks.Process(target=attempt, args=(first, path, *rest, log))
        process.start()
        return process

    def done(log):
        return len(log.read_text().splitlines()) if log.exists() else 0

    whole = start(folder / "whole", folder / "log of the whole")
    whole.join()
    assert whole.exitcode == 0
    dice = random.Random(1)
    for _ in range(KILLS):
        already = done(log)
        process = start(folder / "killed", log)
        while process.is_alive() and done(log) == already:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.03))
        assert process.is_alive(), "everything was done before it had been killed often enough"
        process.kill()
        process.join()
    with pytest.raises(InputError):
        CodeStore.open(folder / "killed")
    last = start(folder / "killed", log)
    last.join()
    assert last.exitcode == 0
    assert content(folder / "killed") == content(folder / "whole")
    CodeStore.open(folder / "killed").verify()


def test_what_does_not_belong_together(source, tmp_path):
    encoder = fitted(source)
    for key, value in (("weights_sha256", "f" * 64), ("layer", 1), ("pooling", "bos"), ("dim", 99)):
        with pytest.raises(InputError, match="belong together"):
            encoder.check_origin({**source.manifest, key: value}, "another store")
    write_codes(source, tmp_path / "codes", encoder)
    with pytest.raises(InputError, match="code"):
        write_codes(source, tmp_path / "codes", fitted(source, "int8"))
    with pytest.raises(InputError, match="holds distil-rank codes"):
        Store.open(tmp_path / "codes")
    with pytest.raises(InputError, match="holds distil-rank embeddings"):
        CodeStore.open(source.path)
    save(fitted(source, "int8"), tmp_path / "codes" / ENCODER)
    with pytest.raises(InputError, match="missing or another"):
        _ = CodeStore.open(tmp_path / "codes").encoder
    save(LowRankLinear(4, 4, 2), tmp_path / "student")
    with pytest.raises(InputError, match="student layer"):
        load_encoder(tmp_path / "student")


def test_damage_is_told(source, tmp_path):
    encoder = fitted(source)
    save(encoder, tmp_path / "codes" / ENCODER)
    write_codes(source, tmp_path / "codes", encoder)
    shard = tmp_path / "codes" / "vectors-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="damaged"):
        CodeStore.open(tmp_path / "codes")
    shard.write_bytes(whole[:-8] + b"changed!")
    with pytest.raises(InputError, match="changed"):
        CodeStore.open(tmp_path / "codes").verify()
    shard.write_bytes(whole)
    manifest = tmp_path / "codes" / ENCODER / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "licence": "another"}))
    with pytest.raises(InputError, match="hash differs"):
        _ = CodeStore.open(tmp_path / "codes").encoder
    shutil.rmtree(tmp_path / "codes" / ENCODER)
    with pytest.raises(InputError, match="missing or another"):
        _ = CodeStore.open(tmp_path / "codes").encoder
