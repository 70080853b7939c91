"""One owner for a row's folder: a lock file with a heartbeat.

A workflow that was killed and started again may submit a job while the old one still runs; both would write. Who holds
the lock is judged by the best witness there is: squeue if the holder is a SLURM job, its process if that ran on this
machine, and the age of its heartbeat in every other case, since a process id means nothing on another host.
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
"""There from a refused job until the folder has an owner again or `take_refusal`."""
BEAT_SECONDS = 10.0
STALE_BEATS = 6
"""Three missed beats and as much again for a slow file server."""
# Job states of squeue(1) in which no process of the job runs.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
FORGOTTEN = "unknown"
"""State of a job that SLURM does not know any more."""


class LockedError(RuntimeError):
    """Another job owns the folder."""

    exit_code = 73
    """EX_CANTCREAT of sysexits.h."""


class Liveness(Enum):
    """What is known of a holder."""

    ALIVE = "still alive"
    GONE = "gone"
    SILENT = "perhaps still alive"
    """No witness but the heartbeat, and that is recent."""


def _identity() -> dict[str, object]:
    """Who this process is: its SLURM job and user, and what its process id refers to."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "user": os.getuid(),
        "host": platform.node(),
        "boot": boot,
        "namespace": os.readlink("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: object) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # Field 22, counted after the command name, which may hold spaces and brackets (proc(5)).
    return text.rpartition(")")[2].split()[19]


def _slurm_state(job: object) -> str | None:
    """State of a SLURM job by squeue; None if squeue cannot tell."""
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
    """Own `folder` from `acquire` to `release`; a thread keeps the heartbeat."""

    def __init__(self, folder: Path, say: Callable[[str], None], beat_seconds: float = BEAT_SECONDS) -> None:
        self.folder, self.path, self.say, self.beat_seconds = folder, folder / NAME, say, beat_seconds
        self.token = uuid.uuid4().hex
        self.lost = False
        """True when another job has taken the lock over: this one must stop writing."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self, wait_seconds: float = 0.0) -> None:
        """Take the lock; raises LockedError that names the holder.

        Waits up to `wait_seconds` for a holder that is alive, and for one that may be gone until its heartbeat is old
        enough to tell.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        started, reported, contended = time.monotonic(), False, False
        while not (self._create() and self._kept(contended)):
            holder, contended = self._read(self.path), True
            if holder is None:
                continue  # released between the two looks
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
                    f"{owned}, {liveness.value} ({reason}); both would write the same files. Wait for it, cancel it, or "
                    "give --lock_wait_minutes"
                )
            if not reported:
                self.say(f"{owned}; waiting: {reason}")
                reported = True
            time.sleep(min(self.beat_seconds, max(0.05, left)))
        self.path.with_name(REFUSED).unlink(missing_ok=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; nothing happens if the lock is not held any more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the lock file unless there is another's; a hard link is atomic on network file systems too."""
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
        """Whether the new lock is still there after others that judged the same old one could have moved it."""
        if contended:
            time.sleep(self.beat_seconds / 10)
        return self._is_mine()

    def _read(self, path: Path) -> dict[str, object] | None:
        """The holder; None if there is no lock. A lock that is not JSON has an unknown holder."""
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
        """Whether the holder is gone, and by which witness."""
        mine = _identity()

        def same(*names: str) -> bool:
            return all(holder.get(name) == mine[name] for name in names)

        here, job, state = same("host", "boot", "namespace"), holder.get("job"), None
        if job and same("cluster", "job"):
            if not (here and same("restart")):
                return Liveness.GONE, "it is an earlier start of this job"
        elif job and same("cluster", "user"):
            # Of another user's jobs, squeue may be told to show nothing.
            state = _slurm_state(job)
            if state in ENDED or state == FORGOTTEN:
                return Liveness.GONE, f"to SLURM its job is {state.lower()}"
            if state not in (None, "COMPLETING"):
                return Liveness.ALIVE, f"to SLURM its job is {state.lower()}"
        if here and state is None:
            alive = _started(holder.get("pid")) == holder.get("started")
            return (Liveness.ALIVE, "its process runs") if alive else (Liveness.GONE, "its process is gone")
        age = self._age()
        silent = age < STALE_BEATS * self.beat_seconds
        return Liveness.SILENT if silent else Liveness.GONE, f"no heartbeat for {age:.0f} s"

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the file server's own clock."""
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
            os.rename(aside, self.path)  # the new lock of another waiting job, which was quicker
            return
        aside.unlink()
        self.say(f"{self.folder}: lock of {describe(holder)} taken over: {reason}")

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            if not self._is_mine():
                self.lost = True
                return
            os.utime(self.path)


def take_refusal(folder: Path) -> bool:
    """Whether a job was refused the folder since this was last asked."""
    # A listing asks the file server; a lone look at a name may be answered from a cache.
    if not folder.is_dir() or REFUSED not in os.listdir(folder):
        return False
    (folder / REFUSED).unlink(missing_ok=True)
    return True


def describe(holder: dict[str, object]) -> str:
    """The holder in words."""
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}pid {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
