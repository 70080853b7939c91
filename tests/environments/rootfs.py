"""A Debian root file system in a folder: a fresh machine to install on, and the base of images.

Needs root (debootstrap, chroot). Every command has a mount namespace of its own, so nothing stays mounted behind it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUITE = "bookworm"
# The base image's Python is Debian bookworm's minor version.
PACKAGES = "python3,python3-venv,ca-certificates"
MIRROR = "http://deb.debian.org/debian"


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """pip's configuration here as environment variables, and the folders and files that it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    variables: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        option = name.removeprefix(":env:.").removeprefix("global.").removeprefix("install.")
        variables["PIP_" + option.upper().replace("-", "_")] = value.strip("'\"")
    named = [Path(word.removeprefix("file://")) for value in variables.values() for word in value.split()]
    # A `simple` index links to the files beside it.
    paths = {path.parent if path.name == "simple" else path for path in named if path.is_absolute() and path.exists()}
    return variables, sorted(paths)


def bootstrap(folder: Path, packages: str = PACKAGES) -> None:
    """Fresh Debian in `folder`, with pip's configuration of this machine within reach."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, str(folder), MIRROR],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        if Path(name).exists():
            shutil.copy(name, folder / name[1:])
    for path in pip_settings()[1]:
        if path.is_file():
            (folder / str(path)[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / str(path)[1:])


def enter(
    folder: Path,
    script: str,
    *,
    binds: tuple[Path, ...] = (),
    working: str = "/",
    check: bool = False,
    capture: bool = True,
    path: str = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a shell script in the root file system. binds: folders of this machine seen there, writable; pip's folders are seen read-only."""
    variables, paths = pip_settings()
    variables |= {"PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", **environment}
    mounts = [f"mount -t proc proc {folder}/proc", f"mount --rbind /dev {folder}/dev"]
    for source in [*(path for path in paths if path.is_dir()), *binds]:
        target = shlex.quote(f"{folder}{source}")
        mounts.append(f"mkdir -p {target}; mount --bind {shlex.quote(str(source))} {target}")
        if source not in binds:
            mounts.append(f"mount -o remount,bind,ro {target}")
    inside = shlex.join(
        ["chroot", str(folder), "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in variables.items()),
         "/bin/sh", "-c", f"cd {shlex.quote(working)}\n{script}"]
    )  # fmt: skip
    outer = "\n".join(["set -e", *mounts, f"exec {inside}"])
    return subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", outer],
        capture_output=capture,
        text=True,
        check=check,
    )


class Stopwatch:
    """`with stopwatch("step", folder):` prints the step's seconds and the folder's size, past pytest's capture."""

    def __init__(self, capsys) -> None:
        self.capsys = capsys

    @contextmanager
    def __call__(self, step: str, folder: Path | None = None) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        size = ""
        if folder is not None and folder.exists():
            listed = subprocess.run(["du", "-sxm", str(folder)], capture_output=True, text=True, check=True).stdout
            size = f", {listed.split()[0]} MB"
        with self.capsys.disabled():
            print(f"\n{step}: {seconds:.0f} s{size}", end="")


def is_possible() -> str:
    """Why no root file system can be made here; empty where one can."""
    missing = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    return "" if os.geteuid() == 0 else "needs root, for chroot"
