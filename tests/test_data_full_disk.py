"""A disk that is really full midway: a clear error, nothing half-written, and the same command ends well once there is
room."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import SCENARIOS

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("full_disk.py")


@functools.cache
def namespace() -> tuple[str, ...] | None:
    """What starts a program where it may mount: as root, or as a user who is root in a namespace of its own."""
    probe = ("sh", "-c", "mount -t tmpfs tmpfs /mnt")
    for start in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            if subprocess.run([*start, *probe], capture_output=True).returncode == 0:
                return start
        except OSError:
            break
    return None


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_disk_that_is_full(scenario: str, tmp_path: Path) -> None:
    start = namespace()
    if start is None:
        pytest.skip(
            "neither root nor user namespaces: no small disk can be mounted (sysctl kernel.unprivileged_userns_clone=1)"
        )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*start, sys.executable, str(SCRIPT), scenario, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
