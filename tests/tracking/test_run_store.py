import os
import signal
import threading

import pytest

from distil_rank.tracking.run_store import exit_on_signals, was_interrupted


def test_a_signal_becomes_the_exit_that_it_stands_for():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, exit_on_signals(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert was_interrupted(left.value)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_signals_alone():
    seen = []

    def run() -> None:
        with exit_on_signals(signal.SIGTERM):
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_ctrl_c_is_found_behind_what_was_raised_from_it():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does it
    except SystemExit as error:
        assert was_interrupted(error)
    assert not was_interrupted(SystemExit(1))
