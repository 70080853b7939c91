"""Counts and clocks of training steps, over all processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from phi3v.planning.flops import Work


@dataclass
class StepCounts:
    """One optimizer step, summed over all processes."""

    examples: int
    images: int
    tokens: int
    """Without padding."""
    slots: int
    """Tokens with padding."""
    seconds: float
    """Wall time since the step before, without evaluation and saving; of this process."""
    loading_seconds: float
    """Part of it spent waiting for data; of this process."""
    work: Work
    """What FLOP are counted from."""
    stop_asked: bool
    """Whether any process was told to save and leave."""
    save_asked: bool
    """Whether the first process wants a checkpoint by the clock."""


@dataclass
class Meter:
    """What this process has seen in the step under way; `finish_step` adds up all processes."""

    device: torch.device
    examples: int = 0
    images: int = 0
    tokens: int = 0
    slots: int = 0
    work: Work = field(default_factory=Work)
    loading_seconds: float = 0.0
    ids: list[str] = field(default_factory=list)
    """Examples of the step under way, for the report on a loss that is not a number."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Loss of each micro-batch of the step under way."""
    clock: float = field(default_factory=time.perf_counter)

    def saw(self, counts: dict[str, Any], loss: torch.Tensor) -> None:
        """Note a micro-batch."""
        self.examples += counts["example_count"]
        self.images += counts["image_count"]
        self.tokens += counts["token_count"]
        self.slots += counts["slot_count"]
        self.work = self.work + counts["work"]
        self.ids += counts["ids"]
        self.losses.append(loss)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Time the wait for data; on CUDA only if the device has finished its work when the data arrives."""
        start = time.perf_counter()
        yield
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self.loading_seconds += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Leave out what happened since the last step: evaluation, saving, start-up."""
        self.clock = time.perf_counter()

    def finish_step(self, stop_asked: bool, save_asked: bool = False) -> StepCounts:
        """Counts of the step over all processes; a collective call, so that all of them stop or save together."""
        own = (self.examples, self.images, self.tokens, self.slots, stop_asked, save_asked, *astuple(self.work))
        values = [float(value) for value in own]
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            values = total.tolist()
        now = time.perf_counter()
        counts = StepCounts(
            examples=int(values[0]), images=int(values[1]), tokens=int(values[2]), slots=int(values[3]),
            stop_asked=values[4] > 0, save_asked=values[5] > 0, work=Work(*values[6:]),
            seconds=now - self.clock, loading_seconds=self.loading_seconds,
        )  # fmt: skip
        self.clock, self.examples, self.images, self.tokens, self.slots, self.loading_seconds = now, 0, 0, 0, 0, 0.0
        self.work, self.ids, self.losses = Work(), [], []
        return counts
