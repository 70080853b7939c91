"""The plan of a run: each row on the hardware it was placed on, before anything starts.

plan = plan_run(load_run("config/config.yaml"))
print(plan.table()); plan.as_dict()
resources(run, job)                 # what a cluster job should ask for
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phi3v.planning import text
from phi3v.planning.choice import largest_micro_batch, setup_of
from phi3v.planning.disk import DOWNLOADS, check_disk, disk, row_gb
from phi3v.planning.flops import utilisation
from phi3v.planning.geometry import parameters, trainable_parameters
from phi3v.planning.memory import GB, Fit, fits, memory
from phi3v.planning.misfit import needs, refused
from phi3v.planning.published import MemoryConstants, published_memory, published_setup
from phi3v.planning.roofline import images_per_second, peak_tflops, step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.workload import workload
from phi3v.settings import AccuracyRow, Job, ResolvedRun, SettingsError, SpeedRow, Workload
from phi3v.settings.commands import own_settings

# Three passes of an accuracy row: before (shared by rows), after, control.
EVALUATION_PASSES = 3
# A job's time limit over its predicted time, and minutes for start, loading and saving.
MARGIN, START_MINUTES = 1.5, 30
JOB_KINDS = {"accuracy": ("train", "evaluate"), "speed": ("speed",)}
# CPU peaks are those of one machine.
CPU_MARGIN = 4.0


@dataclass(frozen=True)
class Planned:
    """A row on its hardware; quantities of a row that cannot be planned or run are left out, and `status` says why."""

    row: str
    table_row: str
    """Line of the table; the rows of several seeds share it."""
    kind: str
    status: str
    device: str = ""
    nodes: int = 0
    devices: int = 0
    method: str = ""
    dtype: str = ""
    flash_attention: bool = False
    parameters: dict[str, int] | None = None
    trainable: dict[str, int] | None = None
    memory_gb: dict[str, float] | None = None
    """Allocated memory of one device at the peak by part; adds up to allocated_gb (phi3v.planning.memory)."""
    peak_moment: str | None = None
    """The part of a step at which the peak occurs."""
    allocated_gb: float | None = None
    """Live tensors at the peak, as torch.cuda.max_memory_allocated reports them."""
    reserved_gb: float | None = None
    """Memory that PyTorch's allocator holds, cached blocks included. An estimate on top of allocated_gb."""
    context_gb: float | None = None
    """What the process takes beside the allocator: CUDA context, NCCL. An estimate."""
    fits: Fit | None = None
    micro_batch: int | None = None
    """What the row runs with."""
    recompute: float | None = None
    """Share of the layers whose activations are recomputed."""
    largest_micro_batch: int | None = None
    """Largest that fits, and divides the batch."""
    images_per_second: float | None = None
    published_images_per_second: float | None = None
    as_published: float | None = None
    """images_per_second predicted for the published code on the published hardware."""
    as_published_gb: float | None = None
    """Memory predicted for the published code: a reading of the whole device, as published_memory_gb is."""
    published_memory_gb: float | None = None
    step_seconds: dict[str, float] | None = None
    mfu: float | None = None
    hfu: float | None = None
    steps: int | None = None
    hours: float | None = None
    """Training (or timing) and evaluation."""
    gpu_hours: float | None = None
    price: float | None = None
    """In the currency of the pool's price_per_hour."""
    energy_kwh: float | None = None
    """At the boards' full power: an upper bound, without the rest of the machine."""
    disk_gb: float | None = None
    """Final weights or adapters, and checkpoints while training."""
    jobs: dict[str, dict[str, Any]] | None = None
    """What the rules ask a cluster for (Resources), by kind of job; a site's limits may cut it."""


def evaluation_seconds(setup: Setup, load: Workload, constants: Constants, passes: int = EVALUATION_PASSES) -> float:
    """Seconds of the passes: prompts as forward passes, then each answer token reads the weights once."""
    forward = replace(setup, method="frozen_forward_only", recompute=0.0, batch_size=setup.devices, micro_batch=1)
    flops = step_time(forward, constants)
    prompt = flops.matmul + flops.attention + flops.elementwise
    weights = 2 * sum(parameters(setup.geometry).values())
    bandwidth = float(setup.hardware.bandwidth_gb_s or 0) * GB * constants.bandwidth_efficiency
    return passes * load.evaluation / setup.devices * (prompt + load.labels * weights / bandwidth)


def training_steps(row: AccuracyRow | SpeedRow, load: Workload, run: ResolvedRun) -> int:
    """Optimizer steps of the job: the row's own max_steps, epochs over the data, or the timing's."""
    if isinstance(row, SpeedRow):
        timing = run.settings.speed
        return timing.warmup_steps + timing.timed_steps * timing.repeats
    limit = own_settings(row, f"row `{row.row}`").max_steps
    return limit if limit > 0 else math.ceil(load.train / row.batch_size) * math.ceil(row.epochs)


def _published_code(job: Job, run: ResolvedRun, setup: Setup, constants: Constants) -> dict[str, float | None]:
    """Published figures of a speed row, and the predictions for the published code; empty for other rows."""
    row = job.row
    if not isinstance(row, SpeedRow):
        return {}
    published = {
        "published_images_per_second": row.published_images_per_second, "published_memory_gb": row.published_memory_gb,
    }  # fmt: skip
    if job.pool.stand_in or row.published_images_per_second is None:
        return published
    theirs = published_setup(row, setup.geometry, run.hardware[row.hardware])
    return published | {
        "as_published": images_per_second(theirs, constants),
        "as_published_gb": published_memory(theirs, MemoryConstants()).total_gb,
    }


def plan_job(run: ResolvedRun, job: Job, root: Path = Path(), constants: Constants | None = None) -> Planned:
    """The plan of one placed row."""
    constants = constants or Constants()
    row, kind = job.row, "accuracy" if isinstance(job.row, AccuracyRow) else "speed"
    try:
        setup, load = setup_of(run, job, root)
        time, peak = step_time(setup, constants), peak_tflops(setup)
    except SettingsError as error:
        return Planned(row.row, job.table_row, kind, f"not planned: {error}", job.pool.device)
    need, state = memory(setup), fits(setup)
    steps = training_steps(row, load, run)
    seconds = steps * time.seconds
    if kind == "accuracy":
        seconds += evaluation_seconds(setup, load, constants)
    hours = seconds / 3600
    hardware, devices = setup.hardware, setup.devices
    parts = asdict(time)
    parts.pop("flops")
    return Planned(
        row=row.row, table_row=job.table_row, kind=kind,
        status="run" if state != "no" else f"{refused(run, job)} {needs(setup, load, job)}",
        device=job.pool.device, nodes=job.nodes, devices=devices, method=row.method, dtype=row.dtype,
        flash_attention=row.flash_attention, parameters=parameters(setup.geometry),
        trainable=trainable_parameters(setup.geometry, setup.trains_by, setup.rank, row.legacy_freezing),
        memory_gb=need.parts(), peak_moment=need.peak_moment, allocated_gb=need.allocated_gb,
        reserved_gb=need.reserved_gb, context_gb=need.context_gb, fits=state, micro_batch=setup.micro_batch,
        recompute=setup.recompute, largest_micro_batch=largest_micro_batch(setup),
        images_per_second=setup.batch_size / time.seconds, step_seconds=parts,
        mfu=utilisation(time.flops.model, time.seconds, peak, devices),
        hfu=utilisation(time.flops.hardware, time.seconds, peak, devices), steps=steps, hours=hours,
        gpu_hours=hours * devices, price=job.pool.price_per_hour and job.pool.price_per_hour * hours * devices,
        energy_kwh=hardware.power_w and hardware.power_w * hours * devices / 1000,
        disk_gb=sum(row_gb(setup, row, run.settings.save_minutes)) if kind == "accuracy" else None,
        jobs={name: asdict(resources(run, job, root, name)) for name in JOB_KINDS[kind]},
        **_published_code(job, run, setup, constants),
    )  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a cluster job should ask for, per machine where it has several."""

    runtime: int
    """Minutes."""
    mem_mb: int
    cpus: int
    nodes: int
    gres: str
    """SLURM's per-node devices, empty on a CPU."""
    partition: str


def resources(run: ResolvedRun, job: Job, root: Path = Path(), kind: str = "train") -> Resources:
    """Defaults for a job of a placed row: kind `train` (accuracy row), `evaluate`, `official` (the evaluation on the
    authors' own split), or `speed`.

    Times are the plan's with a margin of a half (CPU: fourfold, never under an hour) and half an hour for start and
    saving, rounded up to ten minutes. Where the row cannot be planned yet (no geometry, data not converted): a day.
    """
    cpu = run.hardware[job.pool.device].kind == "cpu"
    processes = job.processes_per_node
    cores, gres = processes * (1 if cpu else 8), "" if cpu else f"gpu:{processes}"
    try:
        setup, load = setup_of(run, job, root)
        constants = Constants()
        if kind == "evaluate":
            seconds = evaluation_seconds(setup, load, constants)
        elif kind == "official":
            name = run.datasets[job.row.dataset].official
            seconds = evaluation_seconds(setup, workload(name, run.datasets[name], root), constants, passes=1)
        else:
            seconds = training_steps(job.row, load, run) * step_time(setup, constants).seconds
        minutes = seconds / 60 * (CPU_MARGIN if cpu else MARGIN) + START_MINUTES
        # A process holds its libraries, the weights it reads and those it gathers to save; a CPU one all its tensors.
        weights = 2 * sum(parameters(setup.geometry).values()) / 1e6
        tensors = memory(setup).allocated_gb * 1000 if cpu else 2 * weights
        mem_mb = processes * (3_000 + tensors if cpu else 12_000 + tensors)
    except SettingsError:
        minutes, mem_mb = 24 * 60.0, processes * (3_000.0 if cpu else 48_000.0)
    minutes = max(minutes, 60.0) if cpu else minutes
    return Resources(10 * math.ceil(minutes / 10), math.ceil(mem_mb), cores, job.nodes, gres, job.pool.slurm_partition)


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    name: str
    rows: list[Planned]
    disk: dict[str, float]
    """GB by kind (phi3v.planning.disk), of all rows that run."""
    disk_missing: dict[str, float]
    """The same without what is there already."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values; units as in Planned, the constants in use beside them."""
        listed = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows]
        sizes = {"disk_gb": self.disk, "disk_missing_gb": self.disk_missing}
        words = {"notes": text.notes(self), "details": [text.detail(row) for row in self.rows if row.hours is not None]}
        return {
            "name": self.name, "constants": asdict(Constants()), "totals": self.totals(), **sizes, **words,
            "rows": listed,
        }  # fmt: skip

    def totals(self) -> dict[str, float | None]:
        """Sums over the rows that run; None for a sum of which a part is not known, as a price that is not set."""
        run = [row for row in self.rows if row.hours is not None and not row.status.startswith("not run")]
        sums: dict[str, float | None] = {}
        for name in ("gpu_hours", "price", "energy_kwh"):
            values = [getattr(row, name) for row in run]
            sums[name] = None if None in values else sum(values)
        return sums

    def table(self) -> str:
        """A line a row, then the sums, the disk, and the rows that cannot run."""
        return text.table(self)

    def detail(self, row: str) -> str:
        """Everything the plan knows of one row; raises SettingsError for a row that is not in it."""
        found = [item for item in self.rows if row in (item.row, item.table_row)]
        if not found:
            close = difflib.get_close_matches(row, [item.row for item in self.rows], cutoff=0)
            raise SettingsError(
                f"row {row!r}: not in the plan of {self.name}; expected one of its rows, the closest: {', '.join(close)}"
            )
        return "\n\n".join(text.detail(item) for item in found)


def plan_run(run: ResolvedRun, root: Path = Path(), constants: Constants | None = None) -> Plan:
    """The plan of every selected row, those that cannot run included with their reason."""
    jobs = [*run.accuracy, *run.speed]
    rows = [plan_job(run, job, root, constants) for job in jobs]
    for skipped in run.not_run:
        kind = "accuracy" if isinstance(skipped.row, AccuracyRow) else "speed"
        rows.append(Planned(skipped.row.row, skipped.row.row, kind, f"not run: {skipped.reason}"))
    running = {row.row for row in rows if row.hours is not None and not row.status.startswith("not run")}
    return Plan(
        run.settings.name, rows, disk_needed(run, running, root), disk_needed(run, running, root, missing_only=True)
    )


def disk_needed(
    run: ResolvedRun, rows: Collection[str], root: Path = Path(), missing_only: bool = False
) -> dict[str, float]:
    """phi3v.planning.disk for the rows named; those that cannot be planned yet count nothing."""
    placed = []
    for job in (*run.accuracy, *run.speed):
        if job.row.row in rows:
            try:
                placed.append((job, setup_of(run, job, root)[0]))
            except SettingsError:
                continue
    return disk(run, placed, root, missing_only)


def check_room(run: ResolvedRun, rows: Collection[str], root: Path = Path(), downloads_only: bool = False) -> None:
    """Raises SettingsError where the disk cannot hold what the rows named still write under ROOT/results."""
    needed = disk_needed(run, rows, root, missing_only=True)
    check_disk({kind: needed[kind] for kind in DOWNLOADS} if downloads_only else needed, root / "results")
