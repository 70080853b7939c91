"""SIGTERM and SIGUSR1: finish the step under way, save, leave with an exit code that asks to be started again."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# EX_TEMPFAIL of sysexits.h: try again later. Schedulers requeue on it; no Python error ends with it.
REQUEUE_EXIT_CODE = 75


class StopRequest:
    """Whether this process was told to save and leave."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = ""

    def listen(self) -> StopRequest:
        """Take over SIGTERM and SIGUSR1; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name
