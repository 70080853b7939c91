"""SIGTERM and SIGUSR1: finish the step under way, save, leave with an exit code that asks to be started again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
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


def ignore_sigterm(worker: int) -> None:
    """For a data loading process: who signals a whole job must not take away the data of the step under way.

    PyTorch would let it die of SIGTERM, and the step with it. It ends when its parent asks or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seconds_to_save(command: Sequence[str], environment: Mapping[str, str]) -> float | None:
    """How long torchrun lets its workers live after SIGTERM; None where no torchrun started this process.

    command: the parent's command line. environment: this process's. Torch 2.13: launcher/api.py, 30 s by default.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return float(value or command[at + 1])
    return float(
        environment.get("PET_SHUTDOWN_TIMEOUT") or environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30
    )  # fmt: skip


def parents_command() -> list[str]:
    """The command line of the parent process; empty where it cannot be read."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return []
