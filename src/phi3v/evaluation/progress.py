"""How far a long step is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """`with Progress("row after", 500, bar=True) as progress: progress.advance(8)`.

    bar: draw one where standard error is a terminal. silent: show nothing (all processes but the first).
    """

    def __init__(self, title: str, total: int, bar: bool, silent: bool = False) -> None:
        self.title, self.total, self.silent, self.done = title, total, silent, 0
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, desc=title, unit="example", dynamic_ncols=True)
            if bar and terminal and not silent
            else None
        )
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int) -> None:
        """`count` more examples are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if not self.silent and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate if rate else 0
            print(
                f"{self.title}: {self.done} of {self.total} (this process), {rate:.2f}/s, about {left:.0f} s left",
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
