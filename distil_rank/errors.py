"""The one exception that the command line turns into a clear line and exit code 2."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line that says what was expected, what came, and what to do about it. Whatever is not the
    user's to mend (a bug) stays an ordinary exception with its traceback.
    """
