"""The fastest way to run a job that fits its device: how many examples at once, and how many layers to recompute.

choice = best_micro_batch(setup, Constants())       # None: nothing fits, or a CPU, whose memory is not planned
choice.micro_batch, choice.recompute
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.planning.geometry import model_geometry
from phi3v.planning.memory import fits
from phi3v.planning.roofline import step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.workload import mean_and_longest, workload
from phi3v.settings import Job, ResolvedRun, Workload

# Recompute no layer, every eighth, fourth, third, second, or all (transformers' every_n_layers; 0 leaves it off).
RECOMPUTE_SHARES = (0.0, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 1.0)


@dataclass(frozen=True)
class Choice:
    """How a step runs."""

    micro_batch: int
    recompute: float
    """Share of the layers, as Setup.recompute."""

    def applied(self, setup: Setup) -> Setup:
        """The setup run this way."""
        return replace(setup, micro_batch=self.micro_batch, recompute=self.recompute)


def micro_batches(setup: Setup) -> list[int]:
    """Micro-batches that divide a device's share of the batch, ascending."""
    share = setup.batch_size // setup.devices
    return [size for size in range(1, share + 1) if setup.batch_size % (setup.devices * size) == 0]


def best_micro_batch(
    setup: Setup, constants: Constants, shares: Sequence[float] = RECOMPUTE_SHARES, sizes: Sequence[int] | None = None
) -> Choice | None:
    """The (micro-batch, recomputation) with the shortest predicted step among those that fit without being tight.

    shares (of recomputed layers), sizes: what may be chosen; only the row's own if it sets one. None if nothing fits,
    or if the device's memory is not known (a CPU). Of equal times the smaller micro-batch wins.
    """
    if setup.hardware.memory_gb is None:
        return None
    choices = [Choice(size, share) for size in sizes or micro_batches(setup) for share in shares]
    possible = [choice for choice in choices if fits(choice.applied(setup)) == "yes"]
    return min(possible, key=lambda choice: step_time(choice.applied(setup), constants).seconds, default=None)


def largest_micro_batch(setup: Setup) -> int | None:
    """The largest micro-batch that fits without being tight; None if not even one example does, and on a CPU."""
    if setup.hardware.memory_gb is None:
        return None
    return max((size for size in micro_batches(setup) if fits(replace(setup, micro_batch=size)) == "yes"), default=None)


def setup_of(run: ResolvedRun, job: Job, root: Path = Path()) -> tuple[Setup, Workload]:
    """The setup and workload of a placed row, as this project runs it; raises SettingsError where data are missing."""
    row = job.row
    geometry = model_geometry(row.model, run.models[row.model], root)
    load = workload(row.dataset, run.datasets[row.dataset], root)
    mean, longest = mean_and_longest(load, geometry, job.num_crops)
    setup = Setup(
        geometry, run.hardware[job.pool.device], row.method, row.dtype, row.flash_attention, mean, longest,
        row.batch_size, job.nodes, job.processes_per_node, row.known_micro_batch, row.lora_rank or 0,
        recompute=1.0 if row.recompute is None else row.recompute,
    )  # fmt: skip
    if "auto" in (row.micro_batch_size, row.gradient_checkpointing):
        shares = RECOMPUTE_SHARES if row.recompute is None else (row.recompute,)
        sizes = micro_batches(setup) if row.micro_batch_size == "auto" else [row.micro_batch_size]
        if choice := best_micro_batch(setup, Constants(), shares, sizes):
            setup = choice.applied(setup)
    return setup, load
