"""How far a loop is, on a terminal and on a log."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger(__name__)
EVERY = 10.0  # seconds between two lines where there is no terminal


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, under a bar; where standard error is no terminal, with a line every ten seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what)
        return
    started = said = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if count and now - said >= EVERY:
            left = (now - started) / count * (len(items) - count)
            log.info("%s: %d of %d, about %.0f s left", what, count, len(items), left)
            said = now
        yield item
