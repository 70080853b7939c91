"""Lock of a row's folder: a file with a heartbeat.

A restarted workflow may submit a job while the old one still runs. Both would write to the same folder. Whether the
owner of a lock is alive is decided by squeue if the owner is a SLURM job of the same user, by its process if it runs on
this machine, and otherwise by the age of its heartbeat, because process ids have no meaning on other hosts.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

NAME = ".lock.json"
REFUSED = ".lock.refused"
"""Marker file of a refused job. It exists until the folder has a new owner, or until `take_refusal`."""
BEAT_SECONDS = 10.0
STALE_BEATS = 6
"""Missed heartbeats after which a lock is stale: three, doubled for slow file servers."""
# Job states of squeue(1) in which no process of the job runs.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
FORGOTTEN = "unknown"
"""State of a job that SLURM has forgotten."""


class LockedError(RuntimeError):
    """Another job owns the folder."""

    exit_code = 73
    """EX_CANTCREAT of sysexits.h."""


class Liveness(Enum):
    """Whether the owner of a lock is alive."""

    ALIVE = "still alive"
    GONE = "no longer running"
    SILENT = "possibly still alive"
    """Only the heartbeat is available, and it is recent."""


def _identity() -> dict[str, object]:
    """Identity of this process: SLURM job, user, and the context of its process id."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
        "user": os.getuid(),
        "host": platform.node(),
        "boot": boot,
        "namespace": os.readlink("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: object) -> str | None:
    """Start time of a process in clock ticks since boot, or None if there is no such process or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # Fields 3 and 22 of proc(5), counted after the command name, which may contain spaces and brackets.
    fields = text.rpartition(")")[2].split()
    # Until its parent asks for the exit code, an ended process is a zombie: for ever below a container's first process.
    return None if fields[0] in "ZX" else fields[19]


def _slurm_state(job: object) -> str | None:
    """State of a SLURM job by squeue, or None if squeue does not answer."""
    try:
        asked = subprocess.run(
            ["squeue", "-h", "--states=all", "-j", str(job), "-o", "%T"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode:
        return FORGOTTEN if "Invalid job id" in asked.stderr else None
    return asked.stdout.strip() or None


class FolderLock:
    """Owns `folder` from `acquire` to `release`. A thread updates the heartbeat."""

    def __init__(self, folder: Path, say: Callable[[str], None], beat_seconds: float = BEAT_SECONDS) -> None:
        self.folder, self.path, self.say, self.beat_seconds = folder, folder / NAME, say, beat_seconds
        self.token = uuid.uuid4().hex
        self.lost = False
        """True after another job has taken over the lock. This job must then stop writing."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self, wait_seconds: float = 0.0) -> None:
        """Takes the lock. Raises LockedError that names the owner.

        Waits up to `wait_seconds` for a live owner. If only the heartbeat is available, waits until it is old enough
        for a decision.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        started, reported, contended = time.monotonic(), False, False
        while not (self._create() and self._kept(contended)):
            holder, contended = self._read(self.path), True
            if holder is None:
                continue  # released in the meantime
            liveness, reason = self._judge(holder)
            if liveness is Liveness.GONE:
                self._take_over(holder, reason)
                continue
            limit = wait_seconds
            if liveness is Liveness.SILENT:
                limit = max(limit, (STALE_BEATS + 1) * self.beat_seconds)
            left = started + limit - time.monotonic()
            owned = f"{self.folder}: owned by {describe(holder)}"
            if left <= 0:
                self.path.with_name(REFUSED).touch()
                raise LockedError(
                    f"{owned}, {liveness.value} ({reason}); two jobs would write the same files. Wait for that job, "
                    "cancel "
                    "it, or set --lock_wait_minutes"
                )
            if not reported:
                self.say(f"{owned}; waiting: {reason}")
                reported = True
            time.sleep(min(self.beat_seconds, max(0.05, left)))
        self.path.with_name(REFUSED).unlink(missing_ok=True)
        self._thread.start()

    def release(self) -> None:
        """Releases the folder. Does nothing if this job no longer owns the lock."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Writes the lock file unless one exists. A hard link is atomic on network file systems too."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {**_identity(), "since": since, "token": self.token}
        temporary = self.path.with_name(f"{NAME}.{self.token}")
        temporary.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return self._is_mine()
        finally:
            temporary.unlink()

    def _kept(self, contended: bool) -> bool:
        """Whether the new lock still exists after other waiting jobs could have moved it."""
        if contended:
            time.sleep(self.beat_seconds / 10)
        return self._is_mine()

    def _read(self, path: Path) -> dict[str, object] | None:
        """The owner of a lock, or None if there is no lock. A lock that is not JSON has an unknown owner, {}."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _is_mine(self) -> bool:
        return (self._read(self.path) or {}).get("token") == self.token

    def _judge(self, holder: dict[str, object]) -> tuple[Liveness, str]:
        """Whether the owner is alive, and the evidence."""
        mine = _identity()

        def same(*names: str) -> bool:
            return all(holder.get(name) == mine[name] for name in names)

        here, job, state = same("host", "boot", "namespace"), holder.get("job"), None
        if job and same("cluster", "job"):
            if not here:
                return Liveness.GONE, "it is from an earlier start of this job"
        elif job and same("cluster", "user"):
            # For other users' jobs, squeue may be configured to hide them.
            state = _slurm_state(job)
            if state in ENDED or state == FORGOTTEN:
                return Liveness.GONE, f"SLURM reports its job as {state.lower()}"
            if state not in (None, "COMPLETING"):
                return Liveness.ALIVE, f"SLURM reports its job as {state.lower()}"
        if here and state is None:
            alive = _started(holder.get("pid")) == holder.get("started")
            return (Liveness.ALIVE, "its process is running") if alive else (Liveness.GONE, "its process has ended")
        age = self._age()
        silent = age < STALE_BEATS * self.beat_seconds
        return Liveness.SILENT if silent else Liveness.GONE, f"last heartbeat {age:.0f} s ago"

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file server."""
        probe = self.path.with_name(f"{NAME}.clock.{self.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, holder: dict[str, object], reason: str) -> None:
        aside = self.path.with_name(f"{NAME}.stale.{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if self._read(aside) != holder:
            os.rename(aside, self.path)  # another waiting job was faster, and this is its lock
            return
        aside.unlink()
        self.say(f"{self.folder}: took over the lock of {describe(holder)}: {reason}")

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            if not self._is_mine():
                self.lost = True
                return
            os.utime(self.path)


def take_refusal(folder: Path) -> bool:
    """Whether a job was refused this folder since the last call."""
    # Listing the folder queries the file server. A lookup of one name may come from a cache.
    if not folder.is_dir() or REFUSED not in os.listdir(folder):
        return False
    (folder / REFUSED).unlink(missing_ok=True)
    return True


def describe(holder: dict[str, object]) -> str:
    """Description of the owner of a lock."""
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}pid {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
