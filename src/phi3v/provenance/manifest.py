"""The origin of results: each result folder contains a manifest.json, written last.

The report only contains results with a manifest; docs/reference/file-formats.md lists the fields. This module imports
no other module of the project, so that every writer of results can use it. It also contains the project's digest
functions and atomic writer.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from pydantic import BaseModel

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "flash-attn", "datasets", "tokenizers",
    "safetensors", "pillow", "av", "numpy", "snakemake",
)  # fmt: skip
PARENT_FILES = ("manifest.json", "dataset.json", "sources.lock.json")
# Folders of a checkout with the code that creates results.
CODE = ("src", "scripts", "workflow")
LOCKS = ("requirements.txt", "envs/*.txt")
_SECRET = re.compile(r"(hf_[A-Za-z0-9]{8,}|(?<=token=)\S+|(?<=://)[^/@\s]+:[^/@\s]+(?=@))")
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL")
SOURCE = Path(__file__).resolve().parents[3]
"""The checkout that this module is part of."""


class ResultError(ValueError):
    """An unusable result file. The message names file, field, value and what was expected."""


class Commit(TypedDict):
    """State of a source tree. Both fields are None outside a checkout."""

    commit: str | None
    dirty: str | None
    """Digest of the differences from the commit, or None."""


class Manifest(TypedDict, total=False):
    """The fields of manifest.json that readers use. A manifest of an older version may lack some."""

    kind: str
    settings: dict[str, Any]
    command: str
    commit: str | None
    dirty: str | None
    versions: dict[str, str]
    device: str
    inputs: dict[str, dict[str, str]]
    finished: str
    seconds: float
    user: str


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, object]:
    """The environment: digests of the checkout's lock files, the installed packages, conda, container.

    `packages` is one digest over sorted `name==version` lines: equal on two machines that have the same versions
    installed.
    """
    locks = sorted(path for pattern in LOCKS for path in SOURCE.glob(pattern))
    # Each access to `metadata` or `version` parses the file again.
    described = [found.metadata for found in metadata.distributions()]
    installed = sorted({f"{found['Name'].lower()}=={found['Version']}" for found in described})
    return {
        "locks": {str(path.relative_to(SOURCE)): digest_file(path) for path in locks},
        "packages": hashlib.sha256("\n".join(installed).encode()).hexdigest(),
        "packages_installed": len(installed),
        "conda": os.environ.get("CONDA_PREFIX"),
        "container": container(),
    }


def container() -> dict[str, str | None] | None:
    """{"image", "sha256"} of the Apptainer image that this process runs in, else None.

    The digest is read from a file that `make containers` writes, because an image has gigabytes: IMAGE.sha256, or the
    file of that name in this checkout's containers/, because the container may not see the folder that a linked image
    lies in. Without such a file, the digest is None.
    """
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if not image:
        return None
    files = (Path(image + ".sha256"), SOURCE / "containers" / f"{Path(image).name}.sha256")
    digest = next((file.read_text().split()[0] for file in files if file.is_file()), None)
    return {"image": image, "sha256": digest}


def scrub(text: str) -> str:
    """The text without tokens: what looks like one, passwords in URLs, and the values of secret environment
    variables."""
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def commit(folder: Path | None = None) -> Commit:
    """The state of the source tree around `folder` (default: this module's).

    Untracked files count only in the folders of code, because the manifest already contains the settings of a user's
    configuration.
    """
    here = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        changed = git("diff", "HEAD", "--no-ext-diff")
        unknown = git("ls-files", "-z", "--others", "--exclude-standard", "--", *(f":/{name}" for name in CODE))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    for name in filter(None, unknown.split("\0")):
        with contextlib.suppress(OSError):  # a temporary file of an editor
            changed += f"{name} {digest_file(here / name)}\n"
    return {"commit": head, "dirty": hashlib.sha256(changed.encode()).hexdigest()[:16] if changed else None}


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path], cache: Path | None = None) -> str:
    """One digest of the names and bytes of files. Their folder, times and order do not matter, so a copy has the same.

    cache: see digests_of.
    """
    listed = list(paths)
    lines = (f"{path.name} {digest}\n" for path, digest in zip(listed, digests_of(listed, cache), strict=True))
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def digests_of(paths: Sequence[Path], cache: Path | None = None) -> list[str]:
    """sha256 of each file.

    cache: a JSON file of earlier digests. A file is not read again if its size, times and inode are unchanged. Every
    write updates the change time (ctime), which programs cannot set.
    """
    known = json.loads(cache.read_text(encoding="utf-8")) if cache and cache.is_file() else {}

    def digest(path: Path) -> tuple[str, list[Any]]:
        seen, name = path.stat(), os.path.realpath(path)
        facts = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]
        old = known.get(name, [])
        return name, old if old[:-1] == facts else [*facts, digest_file(path)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(digest, paths))
    if cache and (new := {**known, **dict(found)}) != known:
        with contextlib.suppress(OSError):  # on a full or read-only disk, skip the file, which only saves time
            write_json(cache, new)
    return [facts[-1] for _, facts in found]


def digest_weights(folder: Path) -> str:
    """Digest of the files in a model's folder; a row's manifest is left out, because it holds times.

    The digests of a downloaded model are kept beside its lock.
    """
    files = (path for path in folder.glob("[!.]*") if path.is_file() and path.name != "manifest.json")
    return digest_files(files, folder / ".digests.json" if (folder / PARENT_FILES[-1]).is_file() else None)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def honour_umask(folder: Path) -> None:
    """Give the safetensors files of a folder the permissions of any new file; their library makes them private
    (0600)."""
    os.umask(mask := os.umask(0o077))
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Writes `value` as JSON, atomically. Raises ValueError for NaN and infinity."""
    write_atomically(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ResultError for a missing file, invalid JSON, NaN or infinity, or another type."""

    def refuse(name: str) -> NoReturn:
        raise ResultError(f"{path}: {name}; expected finite numbers")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ResultError(f"{path}: got {type(value).__name__}; expected an object")
    return value


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

    kind: train, evaluate, speed, report. inputs: name to digest (or to a folder, whose manifest, dataset.json or lock
    is then digested: its parent result). seconds: wall time of the work. device: what it ran on, in words.
    """
    values = settings.model_dump() if isinstance(settings, BaseModel) else settings
    manifest = {
        "kind": kind,
        "settings": values,
        "command": shlex.join(sys.argv),
        **commit(),
        "versions": versions(),
        "environment": environment(),
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
    write_json(path, _scrubbed(manifest))
    return path


def _scrubbed(value: object) -> object:
    if isinstance(value, dict):
        return {key: _scrubbed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(item) for item in value]
    return scrub(value) if isinstance(value, str) else value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def parent_file(folder: Path, names: Sequence[str] = PARENT_FILES) -> Path | None:
    """The file that describes the origin of a folder's content, or None.

    Returns the first of `names` in the folder, else the manifest in the parent folder, because final/ and the passes
    have no manifest of their own.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    beside = folder.resolve().parent / "manifest.json"
    return beside if folder.is_dir() and beside.is_file() else None


def _digest_of(value: str) -> dict[str, str]:
    path = Path(value)
    parent = parent_file(path)
    if parent is not None:
        return {"path": value, "of": os.path.relpath(parent, path), "sha256": digest_file(parent)}
    return {"path": value, "sha256": digest_file(path)} if path.is_file() else {"value": value}
