"""Workers of a real Ray cluster, one of them killed and one that joins late, fill a store as one process does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_resume import content

from distil_rank.codes.code_store import write_code_map, write_codes
from distil_rank.codes.fitting import fit_metric
from distil_rank.embedding.elastic import DEATHS, Cluster, compute_elastically
from distil_rank.embedding.embed import embed
from distil_rank.embedding.store import Store
from distil_rank.embedding.store_writer import Shard
from distil_rank.errors import InputError

ray = pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")
SAMPLE = Path(__file__).parents[2] / "data" / "sample.fasta.gz"
OPTIONS = {"precision": "fp32", "max_tokens": 200, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of one machine without cores for workers; machines are processes here."""
    from ray.cluster_utils import Cluster as Machines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield machines
        machines.shutdown()


def workers() -> list[psutil.Process]:
    """Processes that compute a shard; Ray calls them by what they do."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::_Worker.compute"):
            found.append(process)
    return found


def wait_until(condition, process, log, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_one_worker_killed_and_one_that_joins_late(tiny_esm2, tmp_path, cluster, empty_database):
    """The whole sample, then codes of it; the same bytes as from one process."""
    backbone, log, two = str(tiny_esm2.fair_esm), tmp_path / "log", tmp_path / "two"
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns")
    embed(SAMPLE, tmp_path / "one", backbone, **OPTIONS)
    cluster.add_node(num_cpus=1)
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "distil_rank", "embed", "--fasta", SAMPLE, "--store", two, "--backbone", backbone]
    command += [*options, "--engine", "ray", "--cluster", cluster.address, "--worker_cores", "1"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output, cwd=tmp_path)
    wait_until(lambda: workers() and list(two.glob("parts/*/*.arrow")), process, log)
    [first] = workers()
    first.send_signal(signal.SIGKILL)
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(workers()) == 2, process, log)
    assert process.wait(timeout=180) == 0, log.read_text()

    told = log.read_text()
    assert told.count("a worker joined on") == 3 and told.count("a worker died: vectors-") == 1, told
    assert content(two) == content(tmp_path / "one")
    Store.open(two).verify()

    one = Store.open(tmp_path / "one")
    about = {key: one.manifest[key] for key in ("weights_sha256", "layer", "pooling")}
    x = one.embeddings()
    code_map = fit_metric(x, np.ones(len(x), bool), "whitened", provenance=about).code_map(8, "bit")
    for name, used in (("codes", None), ("codes of workers", Cluster(cluster.address, 1))):
        write_code_map(code_map, tmp_path / name)
        write_codes(Store.open(two), tmp_path / name, code_map, used).verify()
    assert content(tmp_path / "codes of workers") == content(tmp_path / "codes")


def test_what_ends_the_work(cluster):
    """What a worker refuses, and a shard that no worker survives."""
    shard = Shard("vectors-00000.arrow", (0, 1), ("proteins-00000.arrow", 0, 1), 10, "")
    cluster.add_node(num_cpus=1)
    here = Cluster(cluster.address, 1)

    def refuses():  # a function within a function travels with its code
        def compute(shard):
            raise InputError(f"Expected something else in {shard.file}.")

        return compute

    def dies():
        return lambda shard: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError, match=r"^Expected something else in vectors-00000\.arrow\.$"):
        compute_elastically([shard], refuses, here, "refuse")
    with pytest.raises(
        InputError, match=f"but {DEATHS} died computing vectors-00000.arrow, for lack of memory perhaps"
    ):
        compute_elastically([shard], dies, here, "die")
    assert compute_elastically([], dies, here, "nothing") == []


def test_what_is_refused(tiny_esm2, tmp_path):
    for options, message in (
        ({"devices": 2}, "no --devices or --num_nodes with --engine ray"),
        ({"worker_cores": 0}, "worker_cores of at least 1 but got 0"),
        ({"cluster": "127.0.0.1:9"}, r"Expected a Ray cluster at 127\.0\.0\.1:9 but got"),
    ):
        with pytest.raises(InputError, match=message):
            embed(SAMPLE, tmp_path / "s", str(tiny_esm2.fair_esm), engine="ray", **options)
