"""Layout of checkpoints: how they are sealed, found and removed. Only complete checkpoints count. No torch.

checkpoints/checkpoint-120/   checkpoint.json   the seal: layout version, step, settings, size and digest of every file
                              training.pt       TrainingState, scheduler, and without ZeRO the trained weights, AdamW's
                                                state and the loss scale; written by the first process
                              random_0.pt …     random generators of each process
                              global_step120/ … with ZeRO: DeepSpeed's shards, beside its `latest` and zero_to_fp32.py
checkpoints/.writing/         an unfinished checkpoint, which the next one removes
checkpoints/unused-…/         a checkpoint that cannot be resumed; the log gives the reason

Checkpoints do not contain frozen weights. These are in the base model, whose digest is in the seal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from phi3v.provenance.manifest import digest_file, digest_files, digest_weights, write_json
from phi3v.settings import FinetuneSettings, Role, fields_with

VERSION = 2
"""Version of the layout. Version 1 was written by transformers' Trainer."""
SEAL = "checkpoint.json"
WRITING = ".writing"
TRAINING = "training.pt"
RESUMES = "Earlier checkpoints are intact: run the same command again to resume from the newest one"


class FileFacts(TypedDict):
    """Entry of a file in the seal."""

    bytes: int
    sha256: str


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


def decisive(settings: FinetuneSettings) -> dict[str, object]:
    """The settings that determine the data, the updates or their order."""
    return settings.model_dump(include={*fields_with(FinetuneSettings, Role.RECIPE, Role.NUMERICS, Role.EQUIVALENT)})


def fingerprint(settings: FinetuneSettings, data_dir: Path) -> dict[str, object]:
    """What must match to resume from a checkpoint: settings, and the contents of data and base weights."""
    # Imported here, because it imports Pillow, which the environment that starts Snakemake does not have.
    from phi3v.data.folder import splits_of

    data = [data_dir / "dataset.json", *splits_of(data_dir).values(), *data_dir.glob("*.sha256")]
    return decisive(settings) | {
        "data": digest_files(path for path in data if path.is_file()),
        "model": digest_weights(Path(settings.model_name_or_path)),
    }


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint except the seal, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def share_of(listings: Iterable[Iterable[str]], process: int, processes: int) -> list[str]:
    """The files that one process digests, from the listings of all processes.

    On a network file system, a new file may appear late on another machine. If each process only used its own listing,
    a file could be left without a digest.
    """
    return sorted({name for names in listings for name in names})[process::processes]


def digest_and_sync(folder: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Syncs the given files to disk. Returns their sizes and sha256."""
    result: dict[str, FileFacts] = {}
    for name in names:
        path = folder / name
        force_to_disk(path)
        result[name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    return result


def seal(
    folder: Path, target: Path, files: dict[str, FileFacts], step: int, processes: int, settings: dict[str, object]
) -> None:
    """Writes the seal and renames the folder to its final name, which makes the checkpoint valid."""
    write_json(
        folder / SEAL,
        {
            "version": VERSION,
            "step": step,
            "processes": processes,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "files": dict(sorted(files.items())),
        },
    )
    force_to_disk(folder)
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    force_to_disk(target.parent)


def force_to_disk(path: Path) -> None:
    """Calls fsync on a file, or on the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints by step, newest first. Ignores other names. Raises CheckpointError if the folder is unreadable."""
    try:
        paths = [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({error.strerror}); expected the folder of this row's checkpoints. Nothing was "
            "changed: repair the file system, or choose another --output_dir to start over"
        ) from error
    named = [path for path in paths if path.name.startswith("checkpoint-")]
    found = [path for path in named if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def find(
    folder: Path, settings: dict[str, object], processes: int, sharded: bool
) -> tuple[Path | None, dict[Path, str]]:
    """(newest complete checkpoint with these settings, reason for each newer one that cannot be used).

    sharded: with ZeRO, checkpoints only fit their number of processes. Raises CheckpointError for a checkpoint of
    another release, because ignoring it would lose its training time.
    """
    skipped: dict[Path, str] = {}
    for path in checkpoint_folders(folder):
        reason = why_not(path, settings, processes, sharded)
        if not reason:
            return path, skipped
        skipped[path] = reason
    return None, skipped


def why_not(path: Path, settings: dict[str, object], processes: int, sharded: bool) -> str:
    """Why a checkpoint cannot be resumed, or "". Raises CheckpointError if another release wrote it."""
    try:
        sealed = json.loads((path / SEAL).read_text(encoding="utf-8"))
        version, other = sealed.get("version", 1), sealed["processes"]
        files, written = sealed["files"], sealed["settings"]
    except FileNotFoundError:
        return f"{SEAL} is missing, so the checkpoint is incomplete"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be read ({error})"
    if version != VERSION:
        raise CheckpointError(
            f"{path}: got layout version {version}; expected version {VERSION} for this release. Nothing was changed: "
            "finish that run with the release that started it, choose another --output_dir, or delete the folder to start over"
        )
    # A release without a setting used what is now its default.
    fields = FinetuneSettings.model_fields
    written = {name: fields[name].default for name in settings if name in fields} | written
    changed = [name for name in settings if written.get(name) != settings[name]]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"written with other settings: {name} was {written.get(name)!r}, is now {settings[name]!r}{more}"
    if sharded and other != processes:
        return f"written by {other} processes, but now there are {processes}; ZeRO's shards require the same number"
    return next((reason for name, facts in files.items() if (reason := _damage(path / name, name, facts))), "")


def _damage(file: Path, name: str, expected: FileFacts) -> str:
    """The problem of a checkpoint's file, or ""."""
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, expected {expected['bytes']}"
    try:
        digest = digest_file(file)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    same = digest == expected["sha256"]
    return "" if same else f"{name} has changed (sha256 {digest[:12]}, expected {expected['sha256'][:12]})"


def set_aside(path: Path) -> None:
    """Renames an unusable checkpoint, so that it does not count as newer than future ones."""
    target = path.with_name(f"unused-{path.name}")
    if target.exists():
        shutil.rmtree(target)
    os.rename(path, target)


def rotate(folder: Path, keep: int, best: Path | None = None) -> None:
    """Deletes all checkpoints except the newest `keep` and the best one."""
    for path in checkpoint_folders(folder)[keep:]:
        if path != best:
            shutil.rmtree(path)


def check_space(folder: Path, needed: float, count: int) -> None:
    """Raises CheckpointError if there is too little free space for `count` checkpoints of `needed` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(file.stat().st_size for path in checkpoint_folders(folder) for file in files_of(path))
    free = shutil.disk_usage(folder).free + held
    if free < needed * count:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.1f} GB free, but {count} checkpoints of {needed / 1e9:.1f} GB each are needed; "
            f"free {(needed * count - free) / 1e9:.1f} GB, choose another --output_dir, or lower --keep_checkpoints"
        )
