"""The exception for a wrong request, and the suggestion that its message may end with."""

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """The request cannot be met. The message says why and what to change, in one line.

    Entry points print it without a traceback and exit with status 2 (``fastgpt.cli``).
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean NEAREST?"``, or an empty string if no known name is similar to ``name``."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""
