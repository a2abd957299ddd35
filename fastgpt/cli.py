"""What every command line of fastgpt shares: flag spelling, one-line errors, exit status.

Exit status: 0 done; 2 the request was wrong; 1 the run failed; 128+N stopped by signal N.
"""

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from fastgpt import __version__, limits, output
from fastgpt.errors import RequestError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that accepts both ``--some_flag`` and ``--some-flag``, and reports errors in one line.

    For an unknown flag it suggests the nearest flag that exists.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=f"fastgpt {__version__}", help="print it and exit")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse a command line whose flags may stand anywhere among its other arguments."""
        args = sys.argv[1:] if args is None else args
        namespace, unknown = self.parse_known_intermixed_args([self._canonical(arg) for arg in args], namespace)
        if unknown:
            self.error(self._unknown_message(unknown[0]))
        return namespace

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")

    def _canonical(self, arg: str) -> str:
        """The spelling of a flag that this parser knows, whichever of ``_`` and ``-`` was typed."""
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return arg
        for spelling in (flag[:2] + flag[2:].replace("-", "_"), flag[:2] + flag[2:].replace("_", "-")):
            if spelling in self._option_string_actions:
                return spelling + equals + value
        return arg

    def _unknown_message(self, arg: str) -> str:
        if not arg.startswith("-"):
            return f"unexpected argument '{arg}'"
        flag = arg.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return f"unknown flag {flag}{did_you_mean(flag, known)}"


def parse_bool(text: str) -> bool:
    """``True``/``False`` as nanoGPT's command lines spell them, and their usual synonyms."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not '{text}'")
    return value


def printable(text: str) -> str:
    """``text`` in one line that does nothing to a terminal: line breaks and the like are written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry point, and exit the process with the status that stands for its outcome."""
    output.make_safe()
    status: object = 0
    try:
        with _ended_by_exception():
            status = main(argv) or 0
            sys.stdout.flush()
    except RequestError as error:
        output.note(f"error: {printable(str(error))}")
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # such as head, which has read enough
        status = 128 + signal.SIGPIPE
    except Exception as error:
        why = limits.exhausted(error) or _refused_by_the_system(error)
        if why is None:
            raise
        output.note(f"error: {why}")
        status = 1
    except SystemExit as error:  # of --help, or of a signal
        status = error.code
    output.flush()
    sys.exit(status)


# Errors of files that can happen to any command, by their names in errno.
_SYSTEM = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE", "ENFILE")


def _refused_by_the_system(error: Exception) -> str | None:
    """A sentence about a file that cannot be used; ``None`` if the exception means something else."""
    if not isinstance(error, OSError) or errno.errorcode.get(error.errno or 0) not in _SYSTEM:
        return None
    return f"{error.filename or 'output'}: {error.strerror}"


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Let signals that would end the process at once raise ``SystemExit`` instead, so that it cleans up."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise SystemExit(128 + number)

    # SIGTERM: kill, and schedulers; SIGHUP: a terminal that is closed. What nohup has ignored stays ignored.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.SIG_DFL for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    for number in previous:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
