"""Which examples go into which micro-batch of which process: decided up front, by seed, epoch and step alone.

The examples of an optimizer step are fixed by (seed, epoch): neither the number of processes nor the grouping changes
them. Within a step they are spread over W processes x M micro-batches. Every process makes the same number of
micro-steps. If examples run out in the last step of an epoch, a process computes a filler whose loss weighs nothing.

    B = examples of a step, W = processes, M = micro-batches of a process in a step, m = examples of a micro-batch
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Grouping = Literal["fixed", "length", "packed"]


class Pick(NamedTuple):
    """One example of a micro-batch."""

    index: int  # type: ignore[assignment]  # tuple.index is never used
    """Position in the dataset."""
    counted: bool
    """False for a filler, whose loss weighs nothing."""
    in_step: int
    """Examples of the whole optimizer step, over all processes: what the loss is divided by."""


def epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 … examples-1 that depends on seed and epoch only."""
    order = list(range(examples))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of every epoch."""

    examples: int
    """Size of the training split."""
    batch_size: int
    """B."""
    micro_batch_size: int
    """m; with `packed` the pack's examples are bounded by tokens instead."""
    processes: int
    """W."""
    seed: int
    """Decides the order."""
    grouping: Grouping = "fixed"
    """fixed: in order; length: like lengths share a micro-batch; packed: several to a sequence, within a budget."""
    lengths: Sequence[int] | None = None
    """Tokens of each example; needed for length and packed."""
    token_budget: int = 0
    """Tokens of a pack at most; an example that is longer is a pack by itself."""
    packs: int = 0
    """M with `packed`, see `packs_needed`."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be smaller."""
        return math.ceil(self.examples / self.batch_size)

    @property
    def accumulation(self) -> int:
        """M of a whole step."""
        if self.grouping == "packed":
            return self.packs
        return math.ceil(min(self.batch_size, self.examples) / (self.micro_batch_size * self.processes))

    def micro_steps(self, step: int) -> int:
        """M of step 0 … steps_per_epoch-1 of an epoch."""
        count = self._examples_of(step)
        if self.grouping == "packed":
            return self.packs if count == self.batch_size else min(self.packs, math.ceil(count / self.processes))
        return math.ceil(count / (self.micro_batch_size * self.processes))

    def micro_steps_per_epoch(self) -> int:
        """Micro-batches one process sees in an epoch."""
        return self.accumulation * (self.steps_per_epoch - 1) + self.micro_steps(self.steps_per_epoch - 1)

    def epochs_at(self, step: int) -> float:
        """Epochs, counted in micro-steps, after `step` optimizer steps: 2.5."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs + steps * self.accumulation / self.micro_steps_per_epoch()

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch, in order: by seed and epoch alone."""
        return epoch_order(self.examples, self.seed, epoch)

    def epoch(self, epoch: int, rank: int, first_step: int = 0) -> Iterator[list[Pick]]:
        """The micro-batches of process `rank`, in order; `first_step` leaves out the steps before it."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            members = order[step * self.batch_size : (step + 1) * self.batch_size]
            for micro in self.spread(members, self.micro_steps(step))[rank]:
                if micro:
                    yield [Pick(index, True, len(members)) for index in micro]
                else:
                    yield [Pick(members[0], False, len(members))]

    def spread(self, members: Sequence[int], micro_steps: int) -> list[list[list[int]]]:
        """[W][M] lists of dataset indices: `members` each once, possibly with empty lists at the end."""
        if self.grouping == "packed":
            return self._pack(members, micro_steps)
        if self.grouping == "length":
            assert self.lengths is not None
            lengths = self.lengths
            # Neighbours in length run at the same micro-step, so padding is short and so is waiting for others.
            members = sorted(members, key=lambda index: (-lengths[index], index))
        slots: list[list[list[int]]] = [[[] for _ in range(micro_steps)] for _ in range(self.processes)]
        for position, index in enumerate(members):
            if self.grouping == "length":
                micro, rank = divmod(position // self.micro_batch_size, self.processes)
            else:
                # In order, process by process within a micro-step, one example each until all have m.
                micro, place = divmod(position, self.processes * self.micro_batch_size)
                rank = place % self.processes
            slots[rank][micro].append(index)
        return slots

    def _examples_of(self, step: int) -> int:
        return min(self.batch_size, self.examples - step * self.batch_size)

    def _pack(self, members: Sequence[int], micro_steps: int) -> list[list[list[int]]]:
        assert self.lengths is not None
        lengths = self.lengths
        packs = _balanced(members, lengths, self.processes * micro_steps)
        packs.sort(key=lambda pack: -sum(lengths[index] for index in pack))
        return [packs[rank :: self.processes] for rank in range(self.processes)]


def _balanced(members: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Longest first into the emptiest of `bins`: within 4/3 of the best largest bin (Graham 1969)."""
    packs: list[list[int]] = [[] for _ in range(bins)]
    filled = [0] * bins
    for index in sorted(members, key=lambda index: (-lengths[index], index)):
        place = min(range(bins), key=lambda number: (filled[number], number))
        packs[place].append(index)
        filled[place] += lengths[index]
    return packs


def packs_needed(plan: BatchPlan, epochs: int) -> int:
    """The smallest M with which every pack of `epochs` epochs keeps to the budget; longer examples stand alone."""
    assert plan.lengths is not None
    assert plan.token_budget > 0
    needed = 1
    for epoch in range(epochs):
        order = plan.order(epoch)
        for start in range(0, len(order), plan.batch_size):
            members = order[start : start + plan.batch_size]
            while needed * plan.processes < len(members):
                packs = _balanced(members, plan.lengths, needed * plan.processes)
                if all(len(p) <= 1 or sum(plan.lengths[i] for i in p) <= plan.token_budget for p in packs):
                    break
                needed += 1
    return needed


class PlannedBatches:
    """Batch sampler of one process: yields lists of `Pick`. Call `set_epoch` before each epoch."""

    def __init__(self, plan: BatchPlan, rank: int) -> None:
        self.plan, self.rank, self._epoch, self._first_step = plan, rank, 0, 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """The epoch whose batches come next, and its first step: a resumed job leaves out those it has made."""
        self._epoch, self._first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[Pick]]:
        return self.plan.epoch(self._epoch, self.rank, self._first_step)
