"""Disk that a run needs: downloads, converted data, final weights, checkpoints; and whether it is there. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from phi3v.planning.geometry import model_geometry, parameters, trainable_parameters
from phi3v.planning.memory import GB
from phi3v.planning.setup import Setup
from phi3v.planning.workload import workload
from phi3v.settings import AccuracyRow, Job, ResolvedRun, SettingsError, Training, dataset_key, model_key
from phi3v.settings.commands import own_settings

DOWNLOADS = ("models", "datasets")


def final_gb(setup: Setup, merged: bool = False) -> float:
    """What a row leaves behind: whole weights in 2 bytes, or adapters in 4; `merged`: both."""
    whole = 2 * sum(parameters(setup.geometry).values()) / GB
    if not setup.adapters:
        return whole
    adapters = 4 * sum(trainable_parameters(setup.geometry, setup.trains_by, setup.rank).values()) / GB
    return adapters + (whole if merged else 0.0)


def most_checkpoints(keep: int, keep_best: bool) -> int:
    """Checkpoints on the disk while the next is written: the newest `keep`, the best one, and that one."""
    return keep + keep_best + 1


def checkpoints_gb(setup: Setup, count: int) -> float:
    """`count` checkpoints: weights in 2 bytes, float32 copies and two moments."""
    trained = sum(trainable_parameters(setup.geometry, setup.trains_by, setup.rank).values())
    one = 12 * trained + (0 if setup.adapters else 2 * sum(parameters(setup.geometry).values()))
    return count * one / GB


def row_gb(setup: Setup, row: Training, save_minutes: float) -> tuple[float, float]:
    """(what an accuracy row leaves behind, the most that its checkpoints take beside it while it trains)

    save_minutes: the run's, where the row says nothing of its own.
    """
    own = own_settings(row, f"row `{row.row}`")
    if not {"save_minutes", "save_steps"} & row.finetune.keys():
        own = own.model_copy(update={"save_minutes": save_minutes})
    # Without any of these only a job that is told to leave saves, once.
    saves = own.save_minutes or own.save_steps or own.keep_best
    count = most_checkpoints(own.keep_checkpoints, own.keep_best) if saves else 1
    return final_gb(setup, own.merge), checkpoints_gb(setup, count)


def disk(
    run: ResolvedRun, jobs: Iterable[tuple[Job, Setup]], root: Path = Path(), missing_only: bool = False
) -> dict[str, float]:
    """GB by kind: models, datasets (downloads and pictures), final weights, checkpoints of the largest row.

    jobs: those that count. missing_only: without what lies under ROOT/results already. One row trains at a time on a
    machine; a cluster that trains several at once needs their checkpoints too.
    """
    found = {"models": 0.0, "datasets": 0.0, "final weights": 0.0, "checkpoints of one row": 0.0}
    results, seen = root / "results", set()
    for job, setup in jobs:
        model, dataset = job.row.model, job.row.dataset
        lock = results / "models" / model_key(model, run.models[model]) / "sources.lock.json"
        if lock not in seen and not (missing_only and lock.is_file()):
            found["models"] += 2 * sum(parameters(model_geometry(model, run.models[model], root)).values()) / GB
        done = results / "data" / dataset_key(dataset, run.datasets[dataset]) / "dataset.json"
        if done not in seen and not (missing_only and done.is_file()):
            load = workload(dataset, run.datasets[dataset], root)
            # The downloaded source and the pictures taken out of it.
            found["datasets"] += 2 * (load.train + load.evaluation) * load.pictures * load.picture_bytes / GB
        seen |= {lock, done}
        trained = results / run.settings.name / "train" / job.row.row
        if isinstance(job.row, AccuracyRow) and not (missing_only and (trained / "manifest.json").is_file()):
            final, checkpoints = row_gb(setup, job.row, run.settings.save_minutes)
            found["final weights"] += final
            # A row that goes on has some of its checkpoints already; the next ones take their place.
            held = _size_gb(trained / "checkpoints") if missing_only else 0.0
            found["checkpoints of one row"] = max(found["checkpoints of one row"], checkpoints - held)
    return found


def _size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GB


def check_disk(needed: dict[str, float], folder: Path) -> None:
    """Raises SettingsError where the file system of `folder` (or its nearest parent) has less free than needed, GB."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    need, free = sum(needed.values()), shutil.disk_usage(there).free / GB
    if need > free:
        raise SettingsError(
            f"{folder}: {free:.0f} GB free, this run still writes about {need:.0f} GB "
            f"({', '.join(f'{name} {size:.0f}' for name, size in needed.items())}): {need - free:.0f} GB too "
            "little; select fewer rows (`rows` in the configuration), or put results/ on a larger file system"
        )
