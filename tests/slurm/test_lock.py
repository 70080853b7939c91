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


class Jobs:
    """Jobs on a test cluster that take the lock of one folder."""

    def __init__(self, cluster, root, folder, until) -> None:
        self.cluster, self.folder, self.until = cluster, folder, until
        (folder / "lock.py").write_text(HOLD)
        self.command = f"PYTHONPATH={root}/src exec {sys.executable} {folder}/lock.py {folder}/row"

    def submit(self, node: str, what: str, *options: str) -> str:
        """The job's id, once it has reported something; what: hold or once."""
        output = f"--output={self.folder}/%j.out"
        job = self.cluster.out(
            "sbatch", "--parsable", "--mem=100", f"--nodelist={node}", output, "--open-mode=append", *options,
            "--wrap", f"{self.command} {what}",
        ).strip()  # fmt: skip
        self.until(f"job {job} reports something", lambda: self.said(job) != "", seconds=60)
        return job

    def said(self, job: str) -> str:
        log = self.folder / f"{job}.out"
        return log.read_text() if log.exists() else ""

    def kill(self, job: str) -> None:
        self.cluster.out("scancel", "--signal=KILL", "--full", job)
        self.until("it ends", lambda: self.cluster.jobs().get(job) not in ("RUNNING", "COMPLETING"))


@pytest.fixture
def jobs(cluster, root, tmp_path, until):
    yield Jobs(cluster, root, tmp_path, until)
    cluster.out("scancel", "--user=root", "--signal=KILL", "--full")
    until("no job is left", lambda: cluster.out("squeue", "-h") == "", seconds=60)


def test_the_lock_of_a_killed_job_is_free_on_another_node_at_once(cluster, jobs, until):
    holder = jobs.submit("node1", "hold")
    refused = jobs.submit("node2", "once")
    until("the second job ends", lambda: cluster.jobs()[refused] == "FAILED")
    assert f"owned by job {holder}, pid" in jobs.said(refused)
    assert "on node1, " in jobs.said(refused)
    assert "still alive (SLURM reports its job as running)" in jobs.said(refused)
    jobs.kill(holder)
    once = jobs.submit("node3", "once")
    until("the third job ends", lambda: cluster.jobs()[once] == "COMPLETED")
    assert "SLURM reports its job as" in jobs.said(once)
    assert "mine after 1 s" in jobs.said(once)


@pytest.mark.verify
def test_a_job_that_slurm_requeues_after_its_node_died_takes_its_own_lock_over(cluster, jobs, until):
    job = jobs.submit("node1", "hold", "--requeue")
    cluster.lose("node1")
    until("the job waits", lambda: cluster.jobs()[job] == "PENDING")
    cluster.out("scontrol", "update", f"JobId={job}", "ReqNodeList=node2", "StartTime=now")
    until("it runs on node2", lambda: jobs.said(job).count("mine after") == 2, seconds=60)
    assert "on node1, since" in jobs.said(job)
    assert "it is from an earlier start of this job" in jobs.said(job)
    cluster.start_node("node1")


@pytest.mark.verify
def test_the_lock_of_a_job_that_slurm_has_forgotten_is_free_at_once(bare_cluster, root, tmp_path, until):
    """No accounting, and half a minute after its end squeue does not know the job either."""
    jobs = Jobs(bare_cluster, root, tmp_path, until)
    holder = jobs.submit("node1", "hold")
    jobs.kill(holder)
    until("SLURM forgets it", lambda: holder not in bare_cluster.jobs())
    once = jobs.submit("node2", "once")
    until("the second job ends", lambda: bare_cluster.jobs().get(once) == "COMPLETED")
    assert "SLURM reports its job as unknown" in jobs.said(once)
