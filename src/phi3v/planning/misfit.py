"""Rows that do not fit their devices: by how much, and what would fit. No torch.

misfit(run, job)        # None: the row fits
runnable(run)           # the run without the rows that cannot fit
"""

from __future__ import annotations

import math
from dataclasses import replace

from phi3v.planning.choice import setup_of
from phi3v.planning.memory import fits, memory
from phi3v.planning.setup import Setup
from phi3v.planning.workload import mean_and_longest
from phi3v.settings import AccuracyRow, Job, NotRun, ResolvedRun, Workload
from phi3v.settings.run import place_accuracy


def _named(run: ResolvedRun, job: Job) -> bool:
    """Whether the run asks for the job's row by its exact name."""
    return job.table_row in (*run.settings.rows.accuracy, *run.settings.rows.speed)


def refused(run: ResolvedRun, job: Job) -> str:
    """How a row that does not fit is announced; a row that the run names exactly is tried anyway."""
    return "running it anyway because you named this row:" if _named(run, job) else "not run:"


def misfit(run: ResolvedRun, job: Job) -> str | None:
    """Why a placed row does not fit its device and what would, or None if it fits or nothing is known.

    Nothing is known of a model without `geometry` or a dataset without `workload`: their sizes come with the download,
    and which rows run must not change in the middle of a run.
    """
    if run.models[job.row.model].geometry is None or run.datasets[job.row.dataset].workload is None:
        return None
    setup, load = setup_of(run, job)
    return needs(setup, load, job) if fits(setup) == "no" else None


def runnable(run: ResolvedRun) -> ResolvedRun:
    """The run without the rows that cannot fit their device: they join `not_run`, with what they need.

    A row that the run names exactly stays: the prediction may be wrong, and training reports what would help.
    """
    missing = {
        job.row.row: reason
        for job in (*run.accuracy, *run.speed)
        if not _named(run, job) and (reason := misfit(run, job)) is not None
    }
    left_out = [
        NotRun(row=job.row, reason=missing[job.row.row])
        for job in (*run.accuracy, *run.speed)
        if job.row.row in missing
    ]
    kept = {
        "accuracy": [job for job in run.accuracy if job.row.row not in missing],
        "speed": [job for job in run.speed if job.row.row not in missing],
        "not_run": [*run.not_run, *left_out],
    }
    # A new object, not a copy: a copy would keep the index of jobs of the old one.
    return ResolvedRun.model_construct(**{**dict(run), **kept})


def device_need(setup: Setup) -> str:
    """Memory of one device that a setup which fits asks for: its peak, or what it needs at least if it is tight."""
    need = memory(setup)
    if fits(setup) == "yes":
        return f"{need.device_gb:.0f} GB"
    return f"tight, {need.least_gb:.0f} GB at least"


def alternatives(setup: Setup, rank: int = 64) -> list[Setup]:
    """Cheaper ways on the same devices, in the recipe's order; only those that the hardware can do and that fit."""
    found = []
    for method in ("full", "frozen", "lora", "qlora"):
        if method == "qlora" and not setup.hardware.quantisation:
            continue
        other = replace(
            setup, method=method, rank=(setup.rank or rank) if "lora" in method else 0, micro_batch=1,
            flash=setup.hardware.flash_attention,
        )  # fmt: skip
        if fits(other) != "no" and (other.method, other.flash) != (setup.method, setup.flash):
            found.append(other)
    return found


def fewer_crops(setup: Setup, load: Workload, num_crops: int) -> tuple[int, Setup] | None:
    """The largest num_crops below `num_crops` with which the setup fits, and that setup; None where none does."""
    for crops in range(num_crops - 1, 0, -1):
        mean, longest = mean_and_longest(load, setup.geometry, crops)
        smaller = replace(setup, work=mean, longest=longest)
        if fits(smaller) != "no":
            return crops, smaller
    return None


def own_devices(setup: Setup, job: Job) -> str | None:
    """The override with which an accuracy row fits on more devices of its pool, the fewest; None where none helps."""
    if not isinstance(job.row, AccuracyRow):
        return None
    for gpus in range(setup.devices + 1, setup.batch_size // setup.micro_batch + 1):
        nodes, per_node = place_accuracy(gpus, job.pool)
        if nodes * per_node != gpus or setup.batch_size % (gpus * setup.micro_batch):
            continue
        wider = replace(setup, nodes=nodes, per_node=per_node)
        if fits(wider) != "no":
            return (
                f"{gpus} devices, which this run has: `overrides: {{{job.table_row}: {{gpus: {gpus}}}}}` "
                f"({device_need(wider)})"
            )
    return None


def other_devices(setup: Setup) -> str | None:
    """How many devices the setup would fit on; None where more do not help."""
    for nodes in (2, 4, 8, 16):
        wider = replace(setup, nodes=setup.nodes * nodes, batch_size=max(setup.batch_size, setup.devices * nodes))
        if fits(wider) != "no":
            return f"{wider.devices} devices ({device_need(wider)})"
    return None


def needs(setup: Setup, load: Workload, job: Job) -> str:
    """By how much a setup exceeds its device, and what would fit."""
    need, capacity = memory(setup), float(setup.hardware.memory_gb or 0)
    ways = []
    if setup.micro_batch > 1 and fits(replace(setup, micro_batch=1)) != "no":
        ways.append("micro_batch_size 1")
    own = None if setup.adapters else own_devices(setup, job)
    if own:
        ways.append(own)
    ways += [
        f"{other.method}{' with flash attention' if other.flash and not setup.flash else ''} ({device_need(other)})"
        for other in alternatives(setup)
    ]
    if smaller := fewer_crops(setup, load, job.num_crops):
        ways.append(f"num_crops {smaller[0]} instead of {job.num_crops} ({device_need(smaller[1])})")
    if not setup.adapters and not own and (other_count := other_devices(setup)):
        ways.append(other_count)
    ways.append(f"a device with {math.ceil(need.device_gb)} GB, or tight, {math.ceil(need.least_gb)} GB")
    return (
        f"predicted peak {need.least_gb:.0f} GB per device, {need.least_gb - capacity:.0f} GB more than "
        f"{setup.hardware.title} has ({capacity:.0f} GB); would fit: {', '.join(ways)}"
    )
