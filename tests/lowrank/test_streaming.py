"""The metric and the plain sums are one computation, and states of several processes add up."""

import subprocess
import sys

import torch

from distil_rank.lowrank.moments import Moments, MomentSums
from distil_rank.lowrank.streaming import StreamingMoments


def test_the_metric_gives_what_the_plain_sums_give():
    x = torch.randn(500, 12) * torch.logspace(-2, 1, 12) + 4
    metric = StreamingMoments(12)
    for batch in x.split(77):
        metric.update(batch)
    got, expected = metric.compute(), Moments.of(x)
    torch.testing.assert_close(got.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.covariance, expected.covariance, rtol=1e-10, atol=1e-12)
    assert got.rows == expected.rows == 500


def test_states_of_two_processes_add_up_about_any_origin():
    x = torch.randn(400, 6) + 1000
    origin = torch.full((6,), 1000.0)
    halves = [StreamingMoments(6, origin), StreamingMoments(6, origin)]
    for metric, half in zip(halves, x.split(200), strict=True):
        metric.update(half)
    first, second = halves
    for state in ("rows", "sum", "outer"):
        getattr(first, state).add_(getattr(second, state))
    torch.testing.assert_close(first.compute().covariance, torch.cov(x.T.double(), correction=0), rtol=1e-9, atol=1e-9)


PROCESS = """
import sys, torch, torch.distributed as dist
from distil_rank.lowrank.streaming import StreamingMoments
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
x = torch.load(f"{folder}/x.pt", weights_only=True)
metric = StreamingMoments(x.shape[1])
for batch in x[rank::2].split(64):
    metric.update(batch)
found = metric.compute()  # sums the state of both processes
torch.save({"mean": found.mean, "covariance": found.covariance, "rows": found.rows}, f"{folder}/{rank}.pt")
dist.barrier()  # who leaves first would take the other down with it
dist.destroy_process_group()
"""


def test_two_gloo_processes_give_the_moments_of_one(tmp_path):
    x = torch.randn(1000, 40) * torch.logspace(-2, 1, 40) - 8.0
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    expected = Moments.of(x)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["rows"] == 1000
        torch.testing.assert_close(found["mean"], expected.mean, rtol=1e-10, atol=0)
        torch.testing.assert_close(found["covariance"], expected.covariance, rtol=1e-10, atol=1e-10)


def test_a_far_origin_keeps_the_digits():
    x = torch.randn(300, 3, dtype=torch.float64) + 1e7
    sums = MomentSums.zeros(3, origin=x[0])
    sums.add(x)
    torch.testing.assert_close(sums.moments().covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=0)


def test_plain_moments_need_no_torchmetrics():
    code = "import sys; sys.modules['torchmetrics'] = None; import distil_rank.lowrank.low_rank"
    subprocess.run([sys.executable, "-c", code], check=True)
