"""The error that is the user's to mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class FoveateError(ValueError):
    """Bad input or a full disk: one sentence that says what is wrong and what to do.

    The command line prints it as one line, without a traceback, and exits with status 2.
    """


@contextmanager
def bad_input() -> Iterator[None]:
    """Makes a `ValueError` that the block raises a `FoveateError`, of its first sentence.

    For a call into a config, processor or model with what the user gave: a checkpoint's code runs without foveate, and
    can't raise a `FoveateError` itself.
    """
    try:
        yield
    except FoveateError:
        raise
    except ValueError as error:
        raise FoveateError(first_sentence(error)) from error


def first_sentence(error: Exception) -> str:
    """The first sentence of another library's message, on one line: some write a page."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.partition(". ")[0].rstrip(".") + "."
