"""The one exception that the command line turns into a clear line and exit code 2."""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable

# What readers raise on a file that is cut short or no such file at all; torch's checks on nothing before it reads.
DAMAGE = (
    *(OSError, ValueError, LookupError, EOFError, RuntimeError, TypeError, AttributeError, AssertionError),
    *(zipfile.BadZipFile, pickle.UnpicklingError, struct.error),
)


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line that says what was expected, what came, and what to do about it. Whatever is not the
    user's to mend (a bug) stays an ordinary exception with its traceback.
    """


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises `InputError` unless a number is in [low, high].

    >>> check_range("--rank", 64, 1)
    """
    if not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise InputError(f"Expected {name} {limits} but got {value}.")


def check_share(name: str, value: float) -> None:
    """Raises `InputError` unless a number is in (0, 1)."""
    if not 0 < value < 1:
        raise InputError(f"Expected {name} between 0 and 1 but got {value}.")


def examples(names: Iterable[object]) -> str:
    """Up to three of some names, for a message.

    >>> examples("ab"), examples("abcd"), examples([])
    ('a, b', 'a, b, c, ...', 'nothing')
    """
    first = [str(name) for name in names]
    return ", ".join(first[:3] + ["..."] * (len(first) > 3)) or "nothing"
