"""The one exception that stands for a wrong request."""


class RequestError(Exception):
    """What the user asked for cannot be done; the message says why and how to mend it, in one line.

    Entry points print it without a traceback and exit with status 2 (see ``fastgpt.cli``).
    """
