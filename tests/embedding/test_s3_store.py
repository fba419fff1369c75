"""A store in S3 holds the same bytes as one in a folder, however often its process was killed."""

import os
import random
import time

import numpy as np
import pytest

from distil_rank.embedding import s3 as lease
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store, open_storage
from distil_rank.errors import InputError
from tests.stores import attempt, content, lines, write_fasta

KILLS = 8


def attempt_in_s3(env, *arguments):
    os.environ.update(env)
    lease.SECONDS = 0.2
    attempt(*arguments)


def content_in_s3(store):
    storage = open_storage(store)
    return {name: storage.read_bytes(name) for name in storage.entries() if name != "provenance.json"}


def test_killed_and_resumed(tiny_esm2, tmp_path, forks, s3, s3_server):
    fasta, log, backbone, layer = tmp_path / "in.fasta", tmp_path / "log", str(tiny_esm2.fair_esm), "all"
    write_fasta(fasta, 250, 60)
    whole = forks.Process(target=attempt, args=(fasta, tmp_path / "whole", backbone, tmp_path / "whole.log", layer))
    whole.start()
    whole.join()
    assert whole.exitcode == 0

    def start():
        process = forks.Process(target=attempt_in_s3, args=(s3_server, fasta, s3, backbone, log, layer))
        process.start()
        return process

    dice, worked = random.Random(1), 0
    for kill in range(KILLS):
        already, process = lines(log), start()
        while kill % 4 and process.is_alive() and lines(log) == already:  # every fourth one at any moment
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        assert process.is_alive(), "the extraction was over before it had been killed often enough"
        process.kill()
        process.join()
        worked += lines(log) > already
    with pytest.raises(InputError):
        Store.open(s3)
    last = start()
    last.join()
    assert last.exitcode == 0 and worked >= KILLS // 2
    assert content_in_s3(s3) == content(tmp_path / "whole")
    Store.open(s3).verify()


def test_read_extended_and_damaged(tiny_esm2, tmp_path, s3, caplog):
    backbone = str(tiny_esm2.fair_esm)
    write_fasta(tmp_path / "1.fasta", 60, 30)
    write_fasta(tmp_path / "2.fasta", 90, 30)
    for store in (tmp_path / "store", s3):
        embed(tmp_path / "1.fasta", store, backbone, layer="1,2", accelerator="cpu", precision="fp32")
        done = embed(tmp_path / "2.fasta", store, backbone, layer="1,2", accelerator="cpu", precision="fp32")
        assert done.added == 30
    assert content_in_s3(s3) == content(tmp_path / "store")
    for layer in ("", ":1", ":2"):
        here, there = Store.open(f"{tmp_path / 'store'}{layer}"), Store.open(f"{s3}{layer}")
        assert np.array_equal(here.embeddings(), there.embeddings())
        assert (here.ids, here.sequences, here.digest) == (there.ids, there.sequences, there.digest)
    open_storage(s3).delete("vectors-00001.arrow")
    with pytest.raises(InputError, match=r"s3://.*vectors-00001.arrow but got no file; the store is damaged: run"):
        Store.open(s3)
    embed(tmp_path / "2.fasta", s3, backbone, layer="1,2", accelerator="cpu", precision="fp32")
    assert "vectors-00001.arrow is missing or damaged: it is computed again" in caplog.text
    assert content_in_s3(s3) == content(tmp_path / "store")
