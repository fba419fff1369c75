"""The lease on a store in S3, on a real server."""

import time

import pytest

from distil_rank.embedding import s3 as lease
from distil_rank.embedding.storage import LOCK
from distil_rank.embedding.store import open_storage
from distil_rank.errors import InputError


@pytest.fixture
def storage(s3, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    return open_storage(s3)


def test_a_dead_holder_is_taken_over_from_and_then_writes_no_manifest(storage):
    """The holder that was only slow finds out before it writes the manifest."""
    slow = open_storage(storage.location)
    slow._lease = dead = lease.Lease(slow._files, slow.location)
    dead.acquire()  # and it never renews
    begun = time.monotonic()
    with storage.lock():
        assert time.monotonic() - begun >= 0.5
        slow.write("vectors-00000.arrow", b"the same bytes whoever writes them")
        with pytest.raises(InputError, match="another has taken over"):
            slow.write("manifest.json", b"{}")
        storage.write("manifest.json", b"[]")
        assert not dead.renew()
    assert storage.read_bytes("manifest.json") == b"[]" and LOCK not in storage.entries()


def test_an_answer_that_was_lost_is_not_taken_for_another_holder(storage):
    class LosesAnswers:
        def __getattr__(self, name):
            return getattr(storage._files, name)

        def put(self, *arguments, **options):
            storage._files.put(*arguments, **options)
            return storage._files.put(*arguments, **options)  # as obstore does where no answer came

    with lease.Lease(LosesAnswers(), "here").held():
        assert storage.size(LOCK)
    assert storage.size(LOCK) is None


def test_the_holder_is_named(storage):
    with (
        storage.lock(),
        pytest.raises(InputError, match=r"process \d+ on \S+ is filling it"),
        open_storage(storage.location).lock(),
    ):
        pass
