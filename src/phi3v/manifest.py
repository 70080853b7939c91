"""What a result came from: each result folder holds a manifest.json, written last.

A manifest states settings, command, commit, package versions, device, seed, inputs with their digests and wall time.
The report shows only what a manifest backs.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "flash-attn", "datasets", "tokenizers",
    "safetensors", "pillow", "av", "numpy", "snakemake",
)  # fmt: skip
_SECRET = re.compile(r"(hf_[A-Za-z0-9]{8,}|(?<=token=)\S+|(?<=://)[^/@\s]+:[^/@\s]+(?=@))")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path | None = None) -> dict[str, Any]:
    """{"commit", "dirty"} of the source tree, `dirty` the digest of what differs from it; None outside a checkout."""
    here = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        changed = git("diff", "HEAD", "--no-ext-diff")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": hashlib.sha256(changed.encode()).hexdigest()[:16] if changed else None}


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or none: temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically; NaN and infinity are errors."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def write_manifest(
    folder: str | Path,
    *,
    kind: str,
    settings: BaseModel | dict[str, Any],
    inputs: dict[str, str],
    seed: int | None,
    seconds: float,
    device: str,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write FOLDER/manifest.json; call it when everything else in the folder is complete.

    kind: train, evaluate, speed, data, report. inputs: name to digest (or to a folder, whose own manifest, dataset.json
    or lock is then digested). seconds: wall time of the work. device: what it ran on, in words.
    """
    values = settings.model_dump() if isinstance(settings, BaseModel) else settings
    manifest = {
        "kind": kind,
        "settings": values,
        "command": _SECRET.sub("***", shlex.join(sys.argv)),
        **commit(),
        "versions": versions(),
        "device": device,
        "seed": seed,
        "inputs": {name: _digest_of(value) for name, value in inputs.items()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "user": _user(),
        "host": platform.node(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        **(extra or {}),
    }
    path = Path(folder) / "manifest.json"
    write_json(path, manifest)
    return path


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _digest_of(value: str) -> dict[str, str]:
    path = Path(value)
    for name in ("manifest.json", "dataset.json", "sources.lock.json"):
        if (path / name).is_file():
            return {"path": value, "of": name, "sha256": digest_file(path / name)}
    return {"path": value, "sha256": digest_file(path)} if path.is_file() else {"value": value}
