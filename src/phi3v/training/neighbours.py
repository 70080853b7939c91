"""What other programs took of a machine's CPUs while something was timed."""

from __future__ import annotations

import os

import psutil


class Neighbours:
    """CPU seconds of all programs but this job's: its processes, their data loaders, and the torchrun above them."""

    def __init__(self) -> None:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._job = psutil.Process(os.getppid() if launched else os.getpid())
        self._before = self._now()

    def _now(self) -> float:
        busy = psutil.cpu_times()
        machine = sum(getattr(busy, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        own = 0.0
        for process in (self._job, *self._job.children(recursive=True)):
            try:
                # The last two: children that have ended.
                own += sum(process.cpu_times()[:4])
            except psutil.NoSuchProcess:
                continue
        return machine - own

    def seconds(self) -> float:
        """CPU seconds that the others took since the last call, or since this was made; to about 0.02 s."""
        now = self._now()
        taken, self._before = now - self._before, now
        return max(0.0, taken)
