"""The lock of a row's folder between jobs of a real SLURM: who is gone is taken over at once, who lives is not."""

from __future__ import annotations

import sys

import pytest

# A job that holds the folder's lock until it is killed, and one that takes it once.
HOLD = """
import sys, time
from pathlib import Path
from phi3v.training.lock import FolderLock
folder = Path(sys.argv[1])
lock = FolderLock(folder, lambda text: print(text, flush=True))
started = time.monotonic()
lock.acquire()
print(f"mine after {time.monotonic() - started:.0f} s", flush=True)
if sys.argv[2] == "hold":
    time.sleep(3600)
lock.release()
"""


@pytest.fixture
def submit(cluster, root, tmp_path, until):
    """submit(node, what, *options) → the job's id, once it has said something; what: hold or once."""
    script = tmp_path / "lock.py"
    script.write_text(HOLD)

    def start(node: str, what: str, *options: str) -> str:
        command = f"PYTHONPATH={root}/src exec {sys.executable} {script} {tmp_path}/row {what}"
        output = f"--output={tmp_path}/%j.out"
        job = cluster.out(
            "sbatch", "--parsable", "--mem=100", f"--nodelist={node}", output, "--open-mode=append", *options,
            "--wrap", command,
        ).strip()  # fmt: skip
        until(f"job {job} says something", lambda: said(job) != "", seconds=60)
        return job

    def said(job: str) -> str:
        log = tmp_path / f"{job}.out"
        return log.read_text() if log.exists() else ""

    start.said = said
    yield start
    cluster.out("scancel", "--user=root", "--signal=KILL", "--full")
    until("no job is left", lambda: cluster.out("squeue", "-h") == "", seconds=60)


def test_the_lock_of_a_killed_job_is_free_on_another_node_at_once(cluster, submit, until):
    holder = submit("node1", "hold")
    refused = submit("node2", "once")
    until("the second job ends", lambda: cluster.jobs()[refused] == "FAILED")
    assert f"owned by job {holder}, pid" in submit.said(refused)
    assert "on node1, " in submit.said(refused)
    assert "still alive (to SLURM its job is running)" in submit.said(refused)
    cluster.out("scancel", "--signal=KILL", "--full", holder)
    until("the holder ends", lambda: cluster.jobs()[holder] not in ("RUNNING", "COMPLETING"))
    once = submit("node3", "once")
    until("the third job ends", lambda: cluster.jobs()[once] == "COMPLETED")
    assert "taken over: to SLURM its job is" in submit.said(once)
    assert "mine after 1 s" in submit.said(once)


def test_a_job_that_slurm_requeues_after_its_node_died_takes_its_own_lock_over(cluster, submit, until):
    job = submit("node1", "hold", "--requeue")
    cluster.kill("node1")
    cluster.out("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    until("the job waits", lambda: cluster.jobs()[job] == "PENDING")
    cluster.out("scontrol", "update", f"JobId={job}", "ReqNodeList=node2", "StartTime=now")
    until("it runs on node2", lambda: submit.said(job).count("mine after") == 2, seconds=60)
    assert "on node1, since" in submit.said(job)
    assert "taken over: it is an earlier start of this job" in submit.said(job)
    cluster.start_node("node1")
