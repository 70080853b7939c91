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
from phi3v.planning.calibration import published_setup
from phi3v.planning.disk import DOWNLOADS, check_disk, disk, row_gb
from phi3v.planning.flops import utilisation
from phi3v.planning.geometry import model_geometry, parameters, trainable_parameters
from phi3v.planning.memory import GB, Fit, fits, memory
from phi3v.planning.roofline import images_per_second, peak_tflops, step_time
from phi3v.planning.setup import Constants, Setup
from phi3v.planning.workload import mean_and_longest, workload
from phi3v.settings import AccuracyRow, Job, NotRun, ResolvedRun, SettingsError, SpeedRow, Workload
from phi3v.settings.commands import own_settings
from phi3v.settings.run import place_accuracy

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
    peak_gb: float | None = None
    floor_gb: float | None = None
    fits: Fit | None = None
    micro_batch: int | None = None
    """Largest that fits, and divides the batch."""
    images_per_second: float | None = None
    published_images_per_second: float | None = None
    as_published: float | None = None
    """images_per_second of what the recipe's scripts ran, on the published hardware."""
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


def setup_of(run: ResolvedRun, job: Job, root: Path = Path()) -> tuple[Setup, Workload]:
    """The setup and workload of a placed row, as this project runs it; raises SettingsError where data are missing."""
    row = job.row
    geometry = model_geometry(row.model, run.models[row.model], root)
    load = workload(row.dataset, run.datasets[row.dataset], root)
    mean, longest = mean_and_longest(load, geometry, job.num_crops)
    setup = Setup(
        geometry, run.hardware[job.pool.device], row.method, row.dtype, row.flash_attention, mean, longest,
        row.batch_size, job.nodes, job.processes_per_node, row.known_micro_batch, row.lora_rank or 0,
        checkpointing=row.gradient_checkpointing,
    )  # fmt: skip
    if row.micro_batch_size == "auto":
        setup = replace(setup, micro_batch=largest_micro_batch(setup, Constants()) or 1)
    return setup, load


def largest_micro_batch(setup: Setup, constants: Constants) -> int | None:
    """The largest micro-batch that fits with room and divides the batch; None where not even one does, and on a CPU."""
    best = None
    if setup.hardware.memory_gb is None:
        return None
    for size in range(1, setup.batch_size // setup.devices + 1):
        if setup.batch_size % (setup.devices * size):
            continue
        if fits(replace(setup, micro_batch=size), constants) != "yes":
            break
        best = size
    return best


def evaluation_seconds(setup: Setup, load: Workload, constants: Constants, passes: int = EVALUATION_PASSES) -> float:
    """Seconds of the passes: prompts as forward passes, then each answer token reads the weights once."""
    forward = replace(setup, method="frozen_forward_only", checkpointing=False, batch_size=setup.devices, micro_batch=1)
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


def _published_prediction(job: Job, run: ResolvedRun, setup: Setup, constants: Constants) -> float | None:
    row = job.row
    if not isinstance(row, SpeedRow) or job.pool.stand_in or row.published_images_per_second is None:
        return None
    return images_per_second(published_setup(row, setup.geometry, run.hardware[row.hardware]), constants)


def plan_job(run: ResolvedRun, job: Job, root: Path = Path(), constants: Constants | None = None) -> Planned:
    """The plan of one placed row."""
    constants = constants or Constants()
    row, kind = job.row, "accuracy" if isinstance(job.row, AccuracyRow) else "speed"
    try:
        setup, load = setup_of(run, job, root)
        time, peak = step_time(setup, constants), peak_tflops(setup)
    except SettingsError as error:
        return Planned(row.row, job.table_row, kind, f"not planned: {error}", job.pool.device)
    need, state = memory(setup, constants), fits(setup, constants)
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
        status="run" if state != "no" else f"{_refused(run, job)} {needs(setup, load, job, constants)}",
        device=job.pool.device, nodes=job.nodes, devices=devices, method=row.method, dtype=row.dtype,
        flash_attention=row.flash_attention, parameters=parameters(setup.geometry),
        trainable=trainable_parameters(setup.geometry, setup.trains_by, setup.rank, row.legacy_freezing),
        memory_gb=need.parts(), peak_gb=need.total_gb, floor_gb=need.floor_gb, fits=state,
        micro_batch=largest_micro_batch(setup, constants), images_per_second=setup.batch_size / time.seconds,
        published_images_per_second=getattr(row, "published_images_per_second", None),
        as_published=_published_prediction(job, run, setup, constants), step_seconds=parts,
        mfu=utilisation(time.flops.model, time.seconds, peak, devices),
        hfu=utilisation(time.flops.hardware, time.seconds, peak, devices), steps=steps, hours=hours,
        gpu_hours=hours * devices, price=job.pool.price_per_hour and job.pool.price_per_hour * hours * devices,
        energy_kwh=hardware.power_w and hardware.power_w * hours * devices / 1000,
        disk_gb=sum(row_gb(setup, row, run.settings.save_minutes)) if kind == "accuracy" else None,
        jobs={name: asdict(resources(run, job, root, name)) for name in JOB_KINDS[kind]},
    )  # fmt: skip


def _named(run: ResolvedRun, job: Job) -> bool:
    """Whether the run asks for the job's row by its exact name."""
    return job.table_row in (*run.settings.rows.accuracy, *run.settings.rows.speed)


def _refused(run: ResolvedRun, job: Job) -> str:
    """How a row that does not fit is announced: one that was asked for by its exact name is tried all the same."""
    return "asked for by name, so it is tried, but it" if _named(run, job) else "not run:"


def misfit(run: ResolvedRun, job: Job, constants: Constants | None = None) -> str | None:
    """What a placed row needs that its device does not have, or None where it fits or nothing is known.

    Nothing is known of a model without `geometry` or a dataset without `workload`: their sizes come with the download,
    and which rows run must not change in the middle of a run.
    """
    if run.models[job.row.model].geometry is None or run.datasets[job.row.dataset].workload is None:
        return None
    constants = constants or Constants()
    setup, load = setup_of(run, job)
    return needs(setup, load, job, constants) if fits(setup, constants) == "no" else None


def runnable(run: ResolvedRun) -> ResolvedRun:
    """The run without the rows that cannot fit their device: they join `not_run`, with what they need.

    A row that is asked for by its exact name stays: the prediction may be wrong, and training says what would help.
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


def room(setup: Setup, constants: Constants) -> str:
    """How a setup that fits does so: its peak where there is room, else the floor of a device that it fills."""
    need = memory(setup, constants)
    if fits(setup, constants) == "yes":
        return f"{need.total_gb:.0f} GB"
    return f"fills the device, {need.floor_gb:.0f} GB at least"


def alternatives(setup: Setup, constants: Constants, rank: int = 64) -> list[Setup]:
    """Cheaper ways on the same devices, in the recipe's order; only those that the hardware can do and that fit."""
    found = []
    for method in ("full", "frozen", "lora", "qlora"):
        if method == "qlora" and not setup.hardware.quantisation:
            continue
        other = replace(
            setup, method=method, rank=(setup.rank or rank) if "lora" in method else 0, micro_batch=1,
            flash=setup.hardware.flash_attention,
        )  # fmt: skip
        if fits(other, constants) != "no" and (other.method, other.flash) != (setup.method, setup.flash):
            found.append(other)
    return found


def fewer_crops(setup: Setup, load: Workload, num_crops: int, constants: Constants) -> tuple[int, Setup] | None:
    """The largest num_crops below `num_crops` with which the setup fits, and that setup; None where none does."""
    for crops in range(num_crops - 1, 0, -1):
        mean, longest = mean_and_longest(load, setup.geometry, crops)
        smaller = replace(setup, work=mean, longest=longest)
        if fits(smaller, constants) != "no":
            return crops, smaller
    return None


def own_devices(setup: Setup, job: Job, constants: Constants) -> str | None:
    """The override with which an accuracy row fits on more devices of its pool, the fewest; None where none helps."""
    if not isinstance(job.row, AccuracyRow):
        return None
    for gpus in range(setup.devices + 1, setup.batch_size // setup.micro_batch + 1):
        nodes, per_node = place_accuracy(gpus, job.pool)
        if nodes * per_node != gpus or setup.batch_size % (gpus * setup.micro_batch):
            continue
        wider = replace(setup, nodes=nodes, per_node=per_node)
        if fits(wider, constants) != "no":
            return (
                f"{gpus} devices, which this run has: `overrides: {{{job.table_row}: {{gpus: {gpus}}}}}` "
                f"({room(wider, constants)})"
            )
    return None


def other_devices(setup: Setup, constants: Constants) -> str | None:
    """How many devices the setup would fit on; None where more do not help."""
    for nodes in (2, 4, 8, 16):
        wider = replace(setup, nodes=setup.nodes * nodes, batch_size=max(setup.batch_size, setup.devices * nodes))
        if fits(wider, constants) != "no":
            return f"{wider.devices} devices ({room(wider, constants)})"
    return None


def needs(setup: Setup, load: Workload, job: Job, constants: Constants) -> str:
    """ "needs …": by how much a setup misses its device, and what would do."""
    need, capacity = memory(setup, constants), float(setup.hardware.memory_gb or 0)
    ways = []
    if setup.micro_batch > 1 and fits(replace(setup, micro_batch=1), constants) != "no":
        ways.append("micro_batch_size 1")
    own = None if setup.adapters else own_devices(setup, job, constants)
    if own:
        ways.append(own)
    ways += [
        f"{other.method}{' with flash attention' if other.flash and not setup.flash else ''} ({room(other, constants)})"
        for other in alternatives(setup, constants)
    ]
    if smaller := fewer_crops(setup, load, job.num_crops, constants):
        ways.append(f"num_crops {smaller[0]} in place of {job.num_crops} ({room(smaller[1], constants)})")
    if not setup.adapters and not own and (other_count := other_devices(setup, constants)):
        ways.append(other_count)
    ways.append(f"a device with {math.ceil(need.total_gb)} GB, or filled, {math.ceil(need.floor_gb)} GB")
    return (
        f"needs {need.floor_gb:.0f} GB a device, {setup.hardware.title} has {capacity:.0f} GB: "
        f"{need.floor_gb - capacity:.0f} GB too little; would fit: {', '.join(ways)}"
    )


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
        tensors = memory(setup, constants).total_gb * 1000 if cpu else 2 * weights
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
