"""Killed at any moment, an extraction resumes and ends in the same bytes.

A fork server loads torch once; each attempt is a fork of it and starts within milliseconds.
"""

import random
import time
from pathlib import Path

import pytest
import torch

from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from tests.stores import MAX_TOKENS, attempt, content, lines, write_fasta

KILLS = 8


def test_killed_again_and_again(tiny_esm2, tmp_path, forks):
    fasta, log = tmp_path / "in.fasta", tmp_path / "log"
    write_fasta(fasta, 450, 60)  # about 75 batches

    def start(store, log):
        process = forks.Process(target=attempt, args=(fasta, store, str(tiny_esm2.fair_esm), log, "all"))
        process.start()
        return process

    def wait_for_work(process, log, already):
        while process.is_alive() and lines(log) == already:
            time.sleep(0.001)

    whole = start(tmp_path / "whole", tmp_path / "log of the whole")
    wait_for_work(whole, tmp_path / "log of the whole", 0)
    begun = time.monotonic()
    whole.join()
    assert whole.exitcode == 0
    duration = time.monotonic() - begun

    dice, worked = random.Random(1), 0
    for kill in range(KILLS):
        already = lines(log)
        process = start(tmp_path / "killed", log)
        if kill % 4:  # every fourth one at any moment, even before the first batch
            wait_for_work(process, log, already)
        time.sleep(dice.uniform(0, duration / KILLS))
        assert process.is_alive(), "the extraction was over before it had been killed often enough"
        process.kill()
        process.join()
        worked += lines(log) > already
    with pytest.raises(InputError):
        Store.open(tmp_path / "killed")
    last = start(tmp_path / "killed", log)
    last.join()
    assert last.exitcode == 0

    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not (tmp_path / "killed" / "parts").exists()
    Store.open(tmp_path / "killed").verify()
    distinct, computed = len(set(Store.open(tmp_path / "whole").sequences)), lines(log)
    print(f"{KILLS} kills, {worked} of them after work; {computed} sequences computed for {distinct}")
    assert worked >= KILLS // 2
    largest_batch = MAX_TOKENS // (5 + 2)
    assert computed - distinct <= 2 * KILLS * largest_batch, "twice only what was in flight: one computed, one written"


def test_killed_while_planning(tiny_esm2, tmp_path, forks):
    """Before the manifest names the proteins nothing is kept, and the next run starts over."""
    fasta = tmp_path / "in.fasta"
    write_fasta(fasta, 50, 20)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".unfinished-proteins-00000.arrow.1").write_bytes(b"half a table")
    (tmp_path / "store" / ".lock").touch()
    process = forks.Process(target=attempt, args=(fasta, tmp_path / "store", str(tiny_esm2.fair_esm), tmp_path / "log"))
    process.start()
    process.join()
    assert len(Store.open(tmp_path / "store")) == 50
    assert sorted(content(tmp_path / "store")) == ["manifest.json", "proteins-00000.arrow", "vectors-00000.arrow"]


def test_two_processes_do_not_share_a_store_but_one_wins(tiny_esm2, tmp_path, forks):
    fasta = tmp_path / "in.fasta"
    write_fasta(fasta, 400, 60)
    processes = [
        forks.Process(target=attempt, args=(fasta, tmp_path / "store", str(tiny_esm2.fair_esm), tmp_path / f"log{i}"))
        for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert 0 in [process.exitcode for process in processes]
    store = Store.open(tmp_path / "store")
    store.verify()
    assert len(store) == 400
    computed = sum(len(path.read_text().splitlines()) for path in tmp_path.glob("log*"))
    assert computed == len(set(store.sequences)), "nobody computed what another did"


def peak_memory(fasta, store, backbone, answer):
    torch.set_num_threads(1)
    embed(fasta, store, backbone=backbone, accelerator="cpu")
    status = Path("/proc/self/status").read_text()
    answer.put(int(status.split("VmHWM:")[1].split()[0]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_number_of_proteins(tiny_esm2, tmp_path, forks):
    def peak(number: int, name: str) -> int:
        fasta = tmp_path / f"{number}.fasta"
        write_fasta(fasta, number, 60)
        answer = forks.SimpleQueue()
        arguments = (fasta, tmp_path / name, str(tiny_esm2.fair_esm), answer)
        process = forks.Process(target=peak_memory, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0
        return answer.get()

    few, many = peak(2_000, "few"), peak(20_000, "many")
    if many >= 1.1 * few:  # how torn the allocator's arenas are differs from run to run
        many = min(many, peak(20_000, "again"))
    print(f"peak memory: {few / 1024:.0f} MiB for 2,000 proteins, {many / 1024:.0f} MiB for 20,000")
    assert many < 1.1 * few
