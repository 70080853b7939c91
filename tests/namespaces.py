"""A mount namespace for tests that need a disk of their own."""

from __future__ import annotations

import functools
import subprocess

import pytest


@functools.cache
def _start() -> tuple[str, ...] | None:
    probe = ("sh", "-c", "mount -t tmpfs tmpfs /mnt")
    for start in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            if subprocess.run([*start, *probe], capture_output=True).returncode == 0:
                return start
        except OSError:
            break
    return None


def namespace() -> tuple[str, ...]:
    """What starts a program where it may mount: as root, or as a user who is root in a namespace of its own."""
    start = _start()
    if start is None:
        pytest.skip(
            "neither root nor user namespaces: no small disk can be mounted (sysctl kernel.unprivileged_userns_clone=1)"
        )
    return start
