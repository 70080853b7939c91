"""Pools of processes that decode and count beside the one that writes."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""


def process_pool(workers: int, start: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of forked processes; each calls start(*arguments) first, which is inherited and not sent."""
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(start, arguments)
    )


def _begin(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # A parent that is killed (out of memory) closes no queue: its processes would wait for ever, and so would whoever
    # reads their output.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if start is not None:
        start(*arguments)
