"""One owner for a row's folder: a lock file with a heartbeat.

A workflow that was killed and started again may submit a job while the old one still runs; both would write. A process
id identifies nothing on another host, so liveness is the age of the heartbeat, and squeue's answer if there is SLURM.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

NAME = ".lock.json"
BEAT_SECONDS = 10.0
STALE_BEATS = 6
"""Three missed beats and as much again for a slow file server."""


class LockedError(RuntimeError):
    """Another job owns the folder."""


def _place() -> dict[str, object]:
    """What a process id refers to: host, boot and pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": platform.node(), "boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}


def _started(pid: object) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # Field 22, counted after the command name, which may hold spaces and brackets (proc(5)).
    return text.rpartition(")")[2].split()[19]


def _slurm_state(job: object) -> str | None:
    """State of a SLURM job by squeue: "" if it is gone, None if squeue cannot tell."""
    if not job or shutil.which("squeue") is None:
        return None
    asked = subprocess.run(["squeue", "-h", "-j", str(job), "-o", "%T"], capture_output=True, text=True, timeout=30)
    if asked.returncode:
        return "" if "Invalid job id" in asked.stderr else None
    return asked.stdout.strip()


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
        """Take the lock, waiting up to `wait_seconds`; raises LockedError that names the holder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        reported = False
        while not self._create():
            holder = self._read(self.path)
            if holder is None:
                continue  # released between the two looks
            if reason := self._stale(holder):
                self._take_over(holder, reason)
                continue
            owned = f"{self.folder}: owned by {describe(holder)}"
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"{owned}, still alive; both would write the same files. Wait for it, cancel it, or give "
                    "--lock_wait_minutes"
                )
            if not reported:
                self.say(f"{owned}; waiting")
                reported = True
            time.sleep(min(self.beat_seconds, max(0.05, deadline - time.monotonic())))
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; nothing happens if the lock is not held any more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the lock file unless there is one; a hard link is atomic on network file systems too."""
        holder = {
            "job": os.environ.get("SLURM_JOB_ID", ""),
            **_place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": self.token,
        }
        temporary = self.path.with_name(f"{NAME}.{self.token}")
        temporary.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            temporary.unlink()

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

    def _stale(self, holder: dict[str, object]) -> str:
        """Why the holder is gone, or "" if it must be taken for alive."""
        if all(holder.get(key) == value for key, value in _place().items()):
            return "" if _started(holder.get("pid")) == holder.get("started") else "its process is gone"
        age = self._age()
        if age < STALE_BEATS * self.beat_seconds or (state := _slurm_state(holder.get("job"))):
            return ""
        return f"no heartbeat for {age:.0f} s" + (" and SLURM does not know its job any more" if state == "" else "")

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


def describe(holder: dict[str, object]) -> str:
    """The holder in words."""
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}pid {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
