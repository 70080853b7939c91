"""Pools of processes that decode and count in parallel to the process that writes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process receives when its parent ends."""
MOST_WORKERS = 8
"""Most loader processes. An example takes 0.1 to 0.2 s on a core, and an H100 trains on 3 to 4 examples per second."""


def usable_cpus() -> int:
    """CPUs that the processes of a job may use on this machine: SLURM's allocation or the scheduler's mask."""
    allotted, mask = os.environ.get("SLURM_CPUS_PER_TASK", ""), len(os.sched_getaffinity(0))
    return min(int(allotted), mask) if allotted.isdecimal() else mask


def loader_workers(requested: int | Literal["auto"], cuda: bool) -> int:
    """Processes (in evaluation: threads) that load data for one process of a job.

    requested: a number, or `auto`. On a CPU, auto means none, because loading and computing would share the cores. On
    CUDA, it means the CPUs per process minus one for the process itself, from 1 to 8. LOCAL_WORLD_SIZE is the number of
    processes.
    """
    if requested != "auto":
        return requested
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, usable_cpus() // here - 1)) if cuda else 0


def process_pool(workers: int, start: Callable[..., None] | None = None, *arguments: object) -> ProcessPoolExecutor:
    """A pool of processes. Each calls start(*arguments) first, which is inherited by fork and not sent.

    Without `start`, the processes are new interpreters. A fork would copy locks that threads of libraries (pyarrow,
    tqdm, ffmpeg) hold at that moment, and then wait for them forever.
    """
    context = multiprocessing.get_context("fork" if start else "spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(start, arguments))


def read_ahead(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yields (item, its result) in order, while the pool computes the next `ahead` results. This limits the memory."""
    waiting = deque[tuple[Item, Future[Result]]]()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, result in waiting:
            result.cancel()


def _begin(start: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    # A killed parent (out of memory) closes no queue, so its processes and the readers of their output would wait
    # forever. This signal ends them.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if start is not None:
        start(*arguments)
