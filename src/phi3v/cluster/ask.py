"""One question to a client command of SLURM, and its times."""

from __future__ import annotations

import os
import shutil
import subprocess


class ClusterError(RuntimeError):
    """A SLURM command failed; the message holds its answer."""


def ask(*command: str) -> str:
    """Output of a client command; raises ClusterError."""
    if shutil.which(command[0]) is None:
        raise ClusterError(f"{command[0]} was not found; expected SLURM's commands on PATH (are you on a login node?)")
    # What a user, or this workflow for the executor, set for these commands would hide partitions and jobs.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SINFO_", "SQUEUE_"))}
    try:
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(command)}: no answer within 60 s; is the controller up?") from None
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def minutes(text: str) -> int | None:
    """SLURM's time (`30`, `30:00`, `4:00:00`, `1-00:00:00`) in minutes, rounded down; None for no limit."""
    text = text.strip().lower()
    if text in ("infinite", "unlimited", "n/a", "none", "(null)", ""):
        return None
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # Hours lead if there are days, or three parts.
    hours, mins = [*parts, 0][:2] if days or len(parts) == 3 else (0, parts[0])
    return (int(days or 0) * 24 + hours) * 60 + mins
