"""One owner for a row's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3v.training.lock import NAME, FolderLock, LockedError


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_second_job_is_refused_with_the_holders_name(tmp_path: Path, said, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = FolderLock(tmp_path, said.append)
    first.acquire()
    with pytest.raises(LockedError, match=f"job 4711, pid {os.getpid()} on .*, since 20.*still alive"):
        FolderLock(tmp_path, said.append).acquire()
    first.release()
    second = FolderLock(tmp_path, said.append)
    second.acquire()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_second_job_can_wait(tmp_path: Path, said):
    first = FolderLock(tmp_path, said.append, beat_seconds=0.1)
    first.acquire()
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"""
from pathlib import Path
from phi3v.training.lock import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}), print, beat_seconds=0.1)
lock.acquire(wait_seconds=30)
print("mine")
lock.release()
"""], stdout=subprocess.PIPE, text=True)  # fmt: skip
    time.sleep(1.0)
    assert waiting.poll() is None
    first.release()
    output, _ = waiting.communicate(timeout=30)
    assert "waiting" in output
    assert output.endswith("mine\n")


def test_the_lock_of_a_killed_process_on_this_host_is_taken_at_once(tmp_path: Path, said):
    code = (
        f"from pathlib import Path; from phi3v.training.lock import FolderLock; import time\n"
        f"FolderLock(Path({str(tmp_path)!r}), print).acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError):
        FolderLock(tmp_path, said.append).acquire()
    holder.kill()
    holder.wait()
    lock = FolderLock(tmp_path, said.append)
    lock.acquire()
    assert "taken over: its process is gone" in said[0]
    lock.release()


def test_another_host_is_judged_by_its_heartbeat(tmp_path: Path, said):
    other = {"job": "", "host": "node7", "boot": "x", "namespace": "y", "pid": 1, "started": "1", "since": "then"}
    (tmp_path / NAME).write_text(json.dumps(other))
    with pytest.raises(LockedError, match="pid 1 on node7, since then"):
        FolderLock(tmp_path, said.append).acquire()
    old = time.time() - 3600
    os.utime(tmp_path / NAME, (old, old))
    lock = FolderLock(tmp_path, said.append)
    lock.acquire()
    assert "no heartbeat for 36" in said[0]
    lock.release()


def test_slurms_word_keeps_a_silent_job_alive(tmp_path: Path, said, monkeypatch):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho RUNNING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    folder = tmp_path / "row"
    folder.mkdir()
    other = {"job": "12", "host": "node7", "boot": "x", "namespace": "y", "pid": 1, "started": "1", "since": "then"}
    (folder / NAME).write_text(json.dumps(other))
    os.utime(folder / NAME, (1e9, 1e9))
    with pytest.raises(LockedError, match="job 12"):
        FolderLock(folder, said.append).acquire()
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    lock = FolderLock(folder, said.append)
    lock.acquire()
    assert "SLURM does not know its job any more" in said[0]
    lock.release()


def test_an_owner_notices_that_its_lock_was_taken(tmp_path: Path, said):
    lock = FolderLock(tmp_path, said.append, beat_seconds=0.05)
    lock.acquire()
    (tmp_path / NAME).write_text(json.dumps({"token": "another"}))
    deadline = time.monotonic() + 5
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.lost
    lock.release()
    assert (tmp_path / NAME).exists()
