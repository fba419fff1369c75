"""Two processes under Lightning's Trainer (gloo) fill one store as one process does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distil_rank.embedding import precision
from distil_rank.embedding.int8.quantisation import has_int8_units
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.embedding.store_writer import StoreWriter
from tests.stores import content, write_fasta

SCRIPT = """
import os
import sys
import torch
from distil_rank.embedding import planning, precision as gates
from distil_rank.embedding.run import embed
from distil_rank.errors import InputError

torch.set_num_threads(1)
backbone = sys.argv[1]
for job in sys.argv[2:]:
    fasta, store, shard, precision = job.split(",")
    gates.MIN_INT8_COSINE = gates.MIN_INT8_NEIGHBOURS = 0.0  # two random layers amplify errors
    planning.SHARD_RESIDUES = (int(shard), int(shard))
    try:
        summary = embed(fasta, store, backbone=backbone, accelerator="cpu", devices=2, precision=precision)
        line = f"SUMMARY {store} {summary.proteins} {summary.added} {summary.computed}\\n"
    except InputError as error:
        line = f"REFUSED {error}\\n"
    os.write(1, line.encode())  # a single write: two processes share the pipe
"""


def interrupted(fasta: Path, store: Path, backbone: str) -> int:
    """A store of which one shard is finished, one sealed but not yet noted, and the others missing."""
    embed(fasta, store, backbone=backbone, accelerator="cpu")
    writer = StoreWriter(store)
    shards = writer.manifest["shards"]
    for i, shard in enumerate(shards):
        if i != 2:
            for key in ("bytes", "sha256", "vectors", "skipped"):
                del shard[key]
            if i != 1:
                (store / shard["file"]).unlink()
    writer._write_manifest({**writer.manifest, "shards": shards})
    return len(writer.pending())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes of `SCRIPT`: the order of a float32 product's sums depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_end_in_the_store_of_one(tiny_esm2, tmp_path, monkeypatch):
    """One launch, since launching is slow: an invalid input, fewer shards than processes, an interrupted run."""
    backbone = str(tiny_esm2.fair_esm)
    bad, few, many = (tmp_path / f"{name}.fasta" for name in ("bad", "few", "many"))
    bad.write_text(">a\nMK@\n")
    write_fasta(few, 5, 20)
    write_fasta(many, 300, 60)
    monkeypatch.setattr("distil_rank.embedding.planning.SHARD_RESIDUES", (1000, 1000))
    embed(many, tmp_path / "one", backbone=backbone, accelerator="cpu")
    for name in ("MIN_INT8_COSINE", "MIN_INT8_NEIGHBOURS"):
        monkeypatch.setattr(precision, name, 0.0)
    embed(many, tmp_path / "int8 one", backbone=backbone, accelerator="cpu", precision="auto-int8")
    assert interrupted(many, tmp_path / "two", backbone) > 5

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    jobs = [
        f"{bad},{tmp_path}/bad,1000,auto",
        f"{few},{tmp_path}/few,100000,auto",
        f"{many},{tmp_path}/two,1000,auto",
        f"{many},{tmp_path}/int8 two,1000,auto-int8",
    ]
    result = subprocess.run(
        [sys.executable, str(script), backbone, *jobs],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert result.stdout.count("record a at line 1") == 2, "both ranks refuse"

    assert f"SUMMARY {tmp_path}/few 5 5 5" in result.stdout
    assert len(Store.open(tmp_path / "few")) == 5

    assert f"SUMMARY {tmp_path}/two 300 0 " in result.stdout
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    two.verify()
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert one.digest == two.digest
    rounded = Store.open(tmp_path / "int8 two")
    assert rounded.manifest["precision"] == ("int8" if has_int8_units() else one.manifest["precision"])
    assert rounded.digest == Store.open(tmp_path / "int8 one").digest
