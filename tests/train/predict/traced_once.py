"""The dry run of each step, once for all tests of a file that change nothing it depends on."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from fastgpt.train.predict.trace import trace_step


@contextmanager
def traced_once(*users: ModuleType) -> Iterator[None]:
    """Inside, the modules ``users`` keep the trace of each setup."""
    once = functools.cache(trace_step)
    with pytest.MonkeyPatch.context() as patch:
        for user in users:
            patch.setattr(user, "trace_step", once)
        yield
