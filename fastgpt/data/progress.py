"""How far a preparation is: a live line where standard error is a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastgpt import output
from fastgpt.units import count, duration, seconds

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_LOOKS = 0.1  # of a live line

T = TypeVar("T")


class Progress:
    """Shows tokens so far, tokens/s, the part that is done and the time left. Open inside ``with``.

    Nothing here raises because words cannot be delivered. Standard output stays empty.

    Args:
        console: where to show; standard error by default.
        clock: seconds.

    Attributes:
        tokens: that this process has made.
        taken_over: tokens that an earlier process has made.
        goal: tokens of this process at which the work ends, if its text does not end before; ``None`` for no limit.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.tokens = self.taken_over = 0
        self.goal: int | None = None
        self._clock = clock
        self._start = clock()
        self._shown_at = self._start
        self._live: Live | None = None
        # When and at what share the first tokens of this part of the work came, and how many tokens there were then.
        self._since: tuple[float, float, int] | None = None
        self._begin("", None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._draw(self._live.stop)
            self._live = None

    def watch(self, pieces: Iterable[T], doing: str, total: int | None, size: Callable[[T], int]) -> Iterator[T]:
        """The same pieces, of which each is counted when the next one is asked for.

        Args:
            pieces: of one part of the work.
            doing: names it.
            total: sum of all sizes; ``None`` if unknown.
            size: of a piece.
        """
        self._begin(doing, total)
        for piece in pieces:
            yield piece
            self._done += size(piece)
            self._show()

    def add(self, tokens: int) -> None:
        """Count tokens that have been made."""
        self.tokens += tokens
        if self._since is None:  # what was skipped before took less time
            self._since = self._clock(), self._share(), self.tokens
        self._show()

    def summary(self) -> str:
        """``prepared 1,003,854 tokens in 1.2 s: 836,545 tokens/s``."""
        spent = max(self._clock() - self._start, 1e-9)
        return f"prepared {self.tokens:,} tokens in {seconds(spent)}: {self.tokens / spent:,.0f} tokens/s"

    def _begin(self, doing: str, total: int | None) -> None:
        self._doing, self._total, self._done, self._since = doing, total, 0, None

    def _share(self) -> float:
        of_text = self._done / self._total if self._total else 0.0
        return min(1.0, max(of_text, self.tokens / self.goal if self.goal else 0.0))

    def _show(self) -> None:
        now, is_live = self._clock(), self.console.is_terminal
        if not self._doing or now - self._shown_at < (SECONDS_BETWEEN_LOOKS if is_live else SECONDS_BETWEEN_LINES):
            return
        self._shown_at = now
        if not is_live:
            output.note(self._line(now))
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._draw(self._live.start)
        live, line = self._live, Text(self._line(now), overflow="ellipsis", no_wrap=True)
        self._draw(lambda: live.update(line, refresh=True))

    def _line(self, now: float) -> str:
        if self._total is None:
            return f"{self._doing}: {count(self._done)} characters"
        share = self._share()
        said = [f"{self._doing}: {share:.0%}"]
        if self._since is not None:
            said.append(f"{self.tokens + self.taken_over:,} tokens")
            then, share_then, tokens_then = self._since
            if now > then and share > share_then:
                said.append(f"{(self.tokens - tokens_then) / (now - then):,.0f} tokens/s")
                said.append(f"{duration((now - then) / (share - share_then) * (1 - share))} left")
        return "  ".join(said)

    def _draw(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (OSError, ValueError):  # a terminal that was closed
            pass
        except SystemExit as error:
            if error.code != 1:  # which is how rich ends a program whose reader has gone; signals have other codes
                raise
