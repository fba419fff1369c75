"""The closed form needs exact moments: of streams, of far-off data, and of several processes."""

import weakref

import pytest
import torch

from distil_rank.lowrank.moments import Moments, MomentSums


def outlying_rows(n: int = 500, d: int = 24) -> torch.Tensor:
    """Rows with one dimension far off, as ESM-2 has them."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 3] * 0.1 - 8.0
    return x


def test_a_stream_of_batches_gives_the_moments_of_all_rows():
    x = outlying_rows()
    streamed = Moments.of(iter(x.split(37)))
    reference = torch.cov(x.double().T, correction=0)
    assert streamed.rows == len(x)
    torch.testing.assert_close(streamed.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(streamed.covariance, reference, rtol=1e-10, atol=1e-12)


def test_an_origin_keeps_digits_where_the_mean_dwarfs_the_spread():
    x = outlying_rows().double() * 1e-3 + 1e5
    sums = MomentSums.zeros(x.shape[1], origin=x[0])
    sums.add(x)
    reference = torch.cov(x.T, correction=0)
    error = (sums.moments().covariance - reference).abs().max()
    naive = (Moments.of(x).covariance - reference).abs().max()
    assert error < 1e-12 < 1e-8 < naive


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        Moments.of(iter(()))


def test_no_batch_of_a_stream_is_kept():
    batches = []

    def rows():
        for _ in range(5):
            batch = torch.randn(8, 4)
            batches.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(one() is not None for one in batches) <= 1

    assert Moments.of(rows()).rows == 40
