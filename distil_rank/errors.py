"""The one exception that the command line turns into a clear line and exit code 2."""

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


def examples(names: Iterable[object]) -> str:
    """Up to three of some names, for a message.

    >>> examples("ab"), examples("abcd"), examples([])
    ('a, b', 'a, b, c, ...', 'nothing')
    """
    first = [str(name) for name in names]
    return ", ".join(first[:3] + ["..."] * (len(first) > 3)) or "nothing"
