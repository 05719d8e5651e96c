"""The error that is the user's to mend."""


class FoveateError(ValueError):
    """Bad input or a full disk: one sentence that says what is wrong and what to do.

    The command line prints it as one line, without a traceback, and exits with status 2.
    """


def first_sentence(error: Exception) -> str:
    """The first sentence of another library's message, on one line: some write a page."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.partition(". ")[0].rstrip(".") + "."
