"""Resources of jobs: time, memory and cores of a cluster job, and the disk space of a run. No torch.

resources(run, job)["train"]                # for a rule's `resources`
check_free_space(run, rows)                 # raises if the file system of results/ has too little free space
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.planning.fits import setup_of, workload
from phi3v.planning.flops import Setup
from phi3v.planning.geometry import model_geometry, parameters
from phi3v.planning.memory import GB, MOMENT_BYTES, memory
from phi3v.planning.step_time import CONSTANTS, step_time
from phi3v.settings import (
    AccuracyRow,
    Job,
    ResolvedRun,
    SettingsError,
    SpeedRow,
    Training,
    Workload,
    dataset_key,
    model_key,
)
from phi3v.settings.commands import own_settings

# Passes of an accuracy row: before (shared by rows), after, control.
EVALUATION_PASSES = 3
# Time limit of a job divided by its predicted time, and minutes for start, loading and saving.
MARGIN, START_MINUTES = 1.5, 30
# Margin on CPUs, because the peak in the hardware file is from one machine.
CPU_MARGIN = 4.0
DOWNLOADS = ("models", "datasets")


# Jobs of a cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Resources of a cluster job, per machine if it has several."""

    runtime: int
    """Time limit in minutes."""
    mem_mb: int
    cpus: int
    nodes: int
    gres: str
    """Generic resources per node in SLURM's notation. Empty on a CPU."""
    partition: str


def evaluation_seconds(setup: Setup, load: Workload, passes: int = EVALUATION_PASSES) -> float:
    """Seconds of the passes: prompts are forward passes, then each answer token reads the weights once."""
    forward = replace(setup, method="frozen_forward_only", recompute=0.0, batch_size=setup.devices, micro_batch=1)
    time = step_time(forward)
    prompt = time.matmul + time.attention + time.elementwise
    weights = 2 * sum(parameters(setup.geometry).values())
    bandwidth = float(setup.hardware.bandwidth_gb_s or 0) * GB * CONSTANTS.bandwidth_efficiency
    return passes * load.evaluation / setup.devices * (prompt + load.labels * weights / bandwidth)


def training_steps(row: AccuracyRow | SpeedRow, load: Workload, run: ResolvedRun) -> int:
    """Optimizer steps of the job: from the row's max_steps, from its epochs over the data, or from the timing
    settings."""
    if isinstance(row, SpeedRow):
        timing = run.settings.speed
        return timing.warmup_steps + timing.timed_steps * timing.repeats
    limit = own_settings(row, f"row `{row.row}`").max_steps if "max_steps" in row.finetune else 0
    return limit if limit > 0 else math.ceil(load.train / row.batch_size) * math.ceil(row.epochs)


def resources(run: ResolvedRun, job: Job, root: Path = Path()) -> dict[str, Resources]:
    """Default resources for the jobs of a row by kind: `train`, `evaluate` and, if there is one, `official` (evaluation
    on the authors' own split) of an accuracy row, `speed` of a speed row.

    The time is the plan's, times 1.5 (CPU: times 4, at least an hour), plus half an hour for start and saving, rounded
    up to ten minutes. If the row cannot be planned yet (no geometry, or data not converted), it is one day.
    """
    official = ["official"] if run.official(job, root) else []
    kinds = ["speed"] if isinstance(job.row, SpeedRow) else ["train", "evaluate", *official]
    planned = functools.cache(lambda: setup_of(run, job, root))
    return {kind: _request(run, job, kind, planned, root) for kind in kinds}


def _request(
    run: ResolvedRun, job: Job, kind: str, planned: Callable[[], tuple[Setup, Workload]], root: Path
) -> Resources:
    cpu = run.hardware[job.pool.device].kind == "cpu"
    processes = job.processes_per_node
    cores, gres = processes * (1 if cpu else 8), "" if cpu else f"gpu:{processes}"
    try:
        setup, load = planned()
        if kind == "evaluate":
            seconds = evaluation_seconds(setup, load)
        elif kind == "official":
            name = run.datasets[job.row.dataset].official
            seconds = evaluation_seconds(setup, workload(name, run.datasets[name], root), passes=1)
        else:
            seconds = training_steps(job.row, load, run) * step_time(setup).seconds
        minutes = seconds / 60 * (CPU_MARGIN if cpu else MARGIN) + START_MINUTES
        # A process needs memory for libraries, the weights that it reads, and those that it gathers to save. A CPU
        # process also keeps all tensors there.
        weights = 2 * sum(parameters(setup.geometry).values()) / 1e6
        # Without ZeRO, each process reads the whole checkpoint to resume, and the first process copies its state to
        # save it.
        trains = kind == "train" and setup.replicated
        state = checkpoint_bytes(setup.trained, 0, setup.optimizer, is_sharded=False) / 1e6 if trains else 0
        need = memory(setup)
        tensors = need.allocated_gb * 1000 + state if cpu else max(2 * weights, state) + need.host_gb * 1000
        mem_mb = processes * (3_000 + tensors if cpu else 12_000 + tensors)
    except SettingsError:
        minutes, mem_mb = 24 * 60.0, processes * (3_000.0 if cpu else 48_000.0)
    minutes = max(minutes, 60.0) if cpu else minutes
    return Resources(10 * math.ceil(minutes / 10), math.ceil(mem_mb), cores, job.nodes, gres, job.pool.slurm_partition)


# Disk -------------------------------------------------------------------------------------------------------------------


def most_checkpoints(keep: int, keep_best: bool) -> int:
    """Checkpoints on the disk while a new one is written: the newest `keep`, the best one, and the new one."""
    return keep + keep_best + 1


def checkpoint_bytes(trained: float, weights: float, optimizer: str, is_sharded: bool) -> float:
    """Size of a checkpoint: trained weights in float32 and their moments. With ZeRO (is_sharded), also all weights.

    trained: number of parameters. weights: size of all weights in the model, in bytes.
    """
    moments = MOMENT_BYTES["adamw_8bit" if "8bit" in optimizer else "adamw"]
    return trained * (4 + moments) + (weights if is_sharded else 0)


def row_gb(setup: Setup, row: Training, save_minutes: float) -> tuple[float, float]:
    """(GB of an accuracy row's results, most GB of its checkpoints during training)

    The results are the final weights in 2 bytes each, or adapters in 4; a merged row has both. save_minutes: the run's
    setting, for rows without their own.
    """
    own = own_settings(row, f"row `{row.row}`")
    if not {"save_minutes", "save_steps"} & row.finetune.keys():
        own = own.model_copy(update={"save_minutes": save_minutes})
    # If all of these are off, only a job that receives a stop signal saves, and only once.
    saves = own.save_minutes or own.save_steps or own.keep_best
    count = most_checkpoints(own.keep_checkpoints, own.keep_best) if saves else 1
    whole, trained = 2 * sum(parameters(setup.geometry).values()), setup.trained
    checkpoints = count * checkpoint_bytes(trained, whole, setup.optimizer, not setup.replicated) / GB
    if not setup.adapters:
        return whole / GB, checkpoints
    return 4 * trained / GB + (whole / GB if own.merge else 0.0), checkpoints


def disk_needed(
    run: ResolvedRun, rows: Collection[str], root: Path = Path(), missing_only: bool = False
) -> dict[str, float]:
    """GB by kind for the given rows: models, datasets (downloads and pictures), final weights, and checkpoints of the
    largest row. Rows that cannot be planned yet count as 0.

    missing_only: subtract files that already exist under ROOT/results. Assumes that one row trains at a time. A cluster
    that trains several rows at once needs the space of their checkpoints too.
    """
    found = {"models": 0.0, "datasets": 0.0, "final weights": 0.0, "checkpoints of one row": 0.0}
    results, seen = root / "results", set()
    for job in (*run.accuracy, *run.speed):
        if job.row.row not in rows:
            continue
        try:
            setup, load = setup_of(run, job, root)
        except SettingsError:
            continue
        model, dataset = job.row.model, job.row.dataset
        lock = results / "models" / model_key(model, run.models[model]) / "sources.lock.json"
        if lock not in seen and not (missing_only and lock.is_file()):
            found["models"] += 2 * sum(parameters(model_geometry(model, run.models[model], root)).values()) / GB
        done = results / "data" / dataset_key(dataset, run.datasets[dataset]) / "dataset.json"
        if done not in seen and not (missing_only and done.is_file()):
            # The downloaded source, and the pictures extracted from it.
            found["datasets"] += 2 * (load.train + load.evaluation) * load.pictures * load.picture_bytes / GB
        seen |= {lock, done}
        trained = results / run.settings.name / "train" / job.row.row
        if isinstance(job.row, AccuracyRow) and not (missing_only and (trained / "manifest.json").is_file()):
            final, checkpoints = row_gb(setup, job.row, run.settings.save_minutes)
            found["final weights"] += final
            # A row that resumes already has some checkpoints, which the next ones replace.
            held = _size_gb(trained / "checkpoints") if missing_only else 0.0
            found["checkpoints of one row"] = max(found["checkpoints of one row"], checkpoints - held)
    return found


def _size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GB


def check_disk(needed: dict[str, float], folder: Path) -> None:
    """Raises SettingsError if the file system of `folder` (or its nearest parent) has less free space than needed, in
    GB."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    need, free = sum(needed.values()), shutil.disk_usage(there).free / GB
    if need > free:
        raise SettingsError(
            f"{folder}: {free:.0f} GB free, but this run will write about {need:.0f} GB "
            f"({', '.join(f'{name} {size:.0f}' for name, size in needed.items())}), {need - free:.0f} GB more than is "
            "free; select fewer rows (`rows` in the configuration), or put results/ on a larger file system"
        )


def check_free_space(
    run: ResolvedRun, rows: Collection[str], root: Path = Path(), downloads_only: bool = False
) -> None:
    """Raises SettingsError if there is too little free space for the files that the rows will write to ROOT/results."""
    needed = disk_needed(run, rows, root, missing_only=True)
    check_disk({kind: needed[kind] for kind in DOWNLOADS} if downloads_only else needed, root / "results")
