"""One owner for a row's folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phi3v.training.lock import NAME, FolderLock, LockedError, take_refusal

OTHER = {
    "cluster": "alpha",
    "user": os.getuid(),
    "host": "node7",
    "boot": "x",
    "namespace": "y",
    "pid": 1,
    "started": "1",
}
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
QUICK = 0.05
"""Seconds of a beat: a lock is stale after six."""


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def held(tmp_path: Path):
    """held(age=0, **holder) → a folder whose lock another host's job wrote `age` seconds ago."""

    def make(age: float = 0, **holder: object) -> Path:
        folder = tmp_path / "row"
        folder.mkdir()
        (folder / NAME).write_text(json.dumps({**OTHER, "since": "then", **holder}))
        written = time.time() - age
        os.utime(folder / NAME, (written, written))
        return folder

    return make


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch):
    """slurm(script, job="13") → this process is the job of a cluster whose squeue is a shell script."""

    def make(script: str, job: str = "13") -> None:
        squeue = tmp_path / "bin" / "squeue"
        squeue.parent.mkdir()
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "alpha")

    return make


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
    # Its parent, this test, does not take the exit code yet, so it is a zombie.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock = FolderLock(tmp_path, said.append)
    lock.acquire()
    assert ": its process has ended" in said[0]
    lock.release()
    holder.wait()


def test_without_slurm_a_silent_holder_is_waited_out(held, said):
    """A retry on another machine right after a crash: the heartbeat is recent, and nothing else can be asked."""
    folder, started = held(job=""), time.monotonic()
    lock = FolderLock(folder, said.append, QUICK)
    lock.acquire()
    assert 5 * QUICK < time.monotonic() - started < 5
    assert "waiting: last heartbeat 0 s ago" in said[0]
    assert ": last heartbeat" in said[1]
    lock.release()
    assert not list(folder.iterdir())


def test_a_heartbeat_elsewhere_is_another_owner(held, said):
    folder = held(job="")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(QUICK):
            os.utime(folder / NAME)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LockedError, match="pid 1 on node7, since then, possibly still alive"):
            FolderLock(folder, said.append, QUICK).acquire()
    finally:
        stop.set()
        beating.join()
    assert take_refusal(folder)
    assert not take_refusal(folder)


@pytest.mark.parametrize("answer", ["echo FAILED", "echo PENDING", FORGOTTEN])
def test_a_job_that_slurm_has_ended_is_gone_at_once(held, slurm, said, answer):
    slurm(answer)
    lock = FolderLock(held(job="12"), said.append)
    lock.acquire()
    assert re.search("took over the lock of job 12, .*: SLURM reports its job as (failed|pending|unknown)", said[0])
    lock.release()


def test_slurms_word_keeps_a_silent_job_alive(held, slurm, said):
    slurm("echo RUNNING")
    folder = held(3600, job="12")
    with pytest.raises(LockedError, match=r"job 12, .*still alive \(SLURM reports its job as running") as refused:
        FolderLock(folder, said.append).acquire()
    assert refused.value.exit_code == 73
    assert take_refusal(folder)


@pytest.mark.parametrize("answer", [AWAY, "true", "echo COMPLETING"])
def test_where_slurm_cannot_tell_the_heartbeat_does(held, slurm, said, answer):
    slurm(answer)
    lock = FolderLock(held(job="12"), said.append, QUICK)
    lock.acquire()
    assert ": last heartbeat" in said[-1]
    lock.release()


@pytest.mark.parametrize("other", [{"user": -1}, {"cluster": "beta"}])
def test_a_job_that_squeue_may_not_show_is_not_taken_for_ended(held, slurm, said, other):
    """Another user's jobs may be hidden, and another cluster has other jobs under the same numbers."""
    slurm(FORGOTTEN)
    lock = FolderLock(held(job="12", **other), said.append, QUICK)
    lock.acquire()
    assert ": last heartbeat" in said[-1]
    lock.release()


def test_an_earlier_start_of_the_same_job_is_gone_at_once(held, slurm, said):
    """SLURM put the job back into the queue and started it on another node; to squeue the holder's job runs: this one."""
    slurm("echo RUNNING", job="12")
    lock = FolderLock(held(job="12"), said.append)
    lock.acquire()
    assert "it is from an earlier start of this job" in said[0]
    lock.release()


def test_a_second_process_of_the_same_start_is_refused(tmp_path: Path, slurm, said):
    slurm("echo RUNNING", job="12")
    first = FolderLock(tmp_path / "row", said.append)
    first.acquire()
    with pytest.raises(LockedError, match="its process is running"):
        FolderLock(tmp_path / "row", said.append).acquire()
    first.release()


def test_of_many_that_find_a_lock_free_one_gets_it(held):
    """Eight processes take a forgotten lock over at once; none holds it while another does."""
    folder = held(3600, job="")
    code = f"""
import os, time
from pathlib import Path
from phi3v.training.lock import FolderLock
lock = FolderLock(Path({str(folder)!r}), lambda text: None, beat_seconds=0.5)
lock.acquire(wait_seconds=60)
alone = os.open({str(folder / "alone")!r}, os.O_CREAT | os.O_EXCL)
time.sleep(0.1)
os.unlink({str(folder / "alone")!r})
lock.release()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(8)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 8
    assert not list(folder.iterdir())


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
