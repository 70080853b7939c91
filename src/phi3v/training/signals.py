"""SIGTERM and SIGUSR1: finish the step under way, save, leave with an exit code that asks to be started again."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: try again later. Schedulers requeue on it; no Python error ends with it.
REQUEUE_EXIT_CODE = 75


class StopRequest:
    """Whether this process was told to save and leave; listens inside a `with` block."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may handle signals; elsewhere (a notebook's worker) nobody asks.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name
