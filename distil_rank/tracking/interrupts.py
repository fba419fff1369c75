"""Signals as exceptions, and telling an interrupted run from one that crashed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNAL_EXIT_CODES = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # exit codes


@contextmanager
def exit_on_signals(*signals: signal.Signals) -> Iterator[None]:
    """Turn signals that would end the process at once into `SystemExit`, so that context managers can clean up."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def raise_exit(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, raise_exit) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C or SIGTERM caused an exception: Lightning turns the first into `SystemExit(1)`.

    >>> was_interrupted(KeyboardInterrupt()), was_interrupted(SystemExit(143)), was_interrupted(ValueError("no"))
    (True, True, False)
    """
    if error is None:
        return False
    signalled = isinstance(error, SystemExit) and error.code in SIGNAL_EXIT_CODES
    return signalled or isinstance(error, KeyboardInterrupt) or was_interrupted(error.__cause__ or error.__context__)
