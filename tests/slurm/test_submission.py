"""What happens between Snakemake and SLURM; the jobs are another workflow's that uses this one as a module, so they are short."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from cluster_run import SITE, Snakemake, environment_of
from conftest import started

SNAKEFILE = """\
configfile: "run.yaml"
module phi3v:
    snakefile: "{root}/Snakefile"
    config: config
use rule * from phi3v as phi3v_*
rule sleeps:
    default_target: True
    input: expand("done/{{n}}", n=range({count}))
rule sleep:
    output: "done/{{n}}"
    resources: mem_mb=100, runtime=5
    shell: "echo $SLURM_JOB_ID >> jobs.{{wildcards.n}}; sleep {seconds}; touch {{output}}"
"""


class Sleeps:
    """A workflow of `count` jobs that each sleep, with this repository's rules and profile."""

    def __init__(self, root: Path, folder: Path, count: int = 1, seconds: float | str = 1) -> None:
        self.root, self.folder = root, folder
        folder.mkdir(parents=True, exist_ok=True)
        values = yaml.safe_load((root / "config/demo.yaml").read_text())
        values["files"] = {kind: [f"{root}/{path}" for path in paths] for kind, paths in values["files"].items()}
        values |= {"demo": f"{root}/{values['demo']}"}
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        (folder / "Snakefile").write_text(SNAKEFILE.format(root=root, count=count, seconds=seconds))
        self.site(SITE)

    def site(self, values) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config/site.yaml").write_text(yaml.safe_dump(values))

    def options(self, *arguments: str) -> list[str]:
        profile = ["--profile", f"{self.root}/profiles/slurm", "--slurm-init-seconds-before-status-checks", "2"]
        return [*profile, "--latency-wait", "2", *arguments]

    def start(self, *arguments: str) -> Snakemake:
        return Snakemake(self.folder, self.options(*arguments), self.folder / f"{time.monotonic_ns()}.out")

    def jobs(self, number: int = 0) -> list[str]:
        """Ids of the SLURM jobs that worked on an output."""
        path = self.folder / f"jobs.{number}"
        return path.read_text().split() if path.exists() else []

    def done(self) -> int:
        return len(list(self.folder.glob("done/*")))


def finish(snakemake: Snakemake, seconds: float = 300) -> str:
    assert snakemake.finish(seconds) == 0, snakemake.output[-6000:]
    return snakemake.output


@pytest.mark.verify
def test_the_controller_is_away_at_submission(root, cluster, until, tmp_path):
    sleeps = Sleeps(root, tmp_path)
    cluster.kill("slurmctld")
    snakemake = sleeps.start()
    until("a wait", lambda: "no success yet" in snakemake.output or snakemake.process.poll() is not None)
    time.sleep(18)
    cluster.start_controller()
    output = finish(snakemake)
    assert re.search(r"sinfo: no success yet \(.*controller.*\); trying again in 10 s", output)
    assert len(sleeps.jobs()) == 1
    assert "Trying to restart" not in output


@pytest.mark.verify
def test_a_limit_of_submitted_jobs(root, cluster, until, tmp_path):
    """Two at a time are allowed; the others wait for their turn, and no attempt is lost."""
    cluster.out("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=2")
    try:
        sleeps = Sleeps(root, tmp_path, count=3)
        output = finish(sleeps.start())
    finally:
        cluster.out("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")
    assert sleeps.done() == 3
    assert re.search(
        r"rule_sleep_wildcards_\d: no success yet \(QOSMaxSubmitJobPerUserLimit; .*trying again in 10 s", output
    )
    assert "Trying to restart" not in output


@pytest.mark.verify
def test_what_waiting_cannot_cure_is_said_at_once(root, cluster, tmp_path):
    sleeps = Sleeps(root, tmp_path)
    started = time.monotonic()
    snakemake = sleeps.start("--retries", "0", "--set-resources", "sleep:slurm_partition=none")
    assert snakemake.finish(60) != 0
    assert "invalid partition specified: none" in snakemake.output
    assert time.monotonic() - started < 30


def test_a_reason_that_does_not_end_by_itself_is_reported_once(root, cluster, until, tmp_path):
    """The other workflow's rule asks for 5 minutes, of which this one's check knows nothing."""
    cluster.out("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxWall=00:02:00")
    try:
        sleeps = Sleeps(root, tmp_path)
        partitions = {**SITE["partitions"], "cpu": {"partition": "cpu", "max_runtime": 2}}
        sleeps.site({**SITE, "partitions": partitions, "leave_seconds": 10})
        snakemake = sleeps.start()
        until("the reason", lambda: "QOSMaxWall" in snakemake.output or snakemake.process.poll() is not None)
        time.sleep(5)
    finally:
        cluster.out("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxWall=-1")
    output = finish(snakemake)
    reason = "rule_sleep_wildcards_0: job \\d+ waits because of QOSMaxWallDurationPerJobLimit: lower `max_runtime`"
    assert len(re.findall(reason, output)) == 1, output


@pytest.mark.verify
@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_slurm_forgets_between_two_looks(root, until, tmp_path, accounting):
    """Snakemake is suspended; one job ends well, one is cancelled, and the controller forgets both."""
    sleeps = Sleeps(root, tmp_path / "work", count=2, seconds=15)
    with started(tmp_path / "cluster", accounting=accounting, min_job_age=30) as cluster:
        sleeps.site({**SITE, "account": SITE["account"] if accounting else ""})
        snakemake = sleeps.start()
        until("both run", lambda: (sleeps.jobs(0) and sleeps.jobs(1)) or snakemake.process.poll() is not None)
        snakemake.process.send_signal(signal.SIGSTOP)
        jobs = {*sleeps.jobs(0), *sleeps.jobs(1)}
        cluster.out("scancel", *sleeps.jobs(1))
        until("SLURM forgets them", lambda: not jobs & cluster.jobs().keys())
        snakemake.process.send_signal(signal.SIGCONT)
        output = finish(snakemake)
    assert (len(sleeps.jobs(0)), len(sleeps.jobs(1))) == (1, 2)
    assert ("its outputs decide" in output) == (not accounting)
    assert ("SLURM status is: 'CANCELLED'" in output) == accounting


def test_a_restart_beside_running_jobs(root, cluster, until, tmp_path):
    """A job of the killed Snakemake is taken over, the others are submitted, and nothing runs twice."""
    sleeps = Sleeps(root, tmp_path, count=2, seconds="0; while [ ! -e go ]; do sleep 0.2; done")
    first = sleeps.start("--jobs", "1")
    until("a job", lambda: sleeps.jobs(0) or sleeps.jobs(1) or first.process.poll() is not None)
    first.kill()
    finish(sleeps.start("--unlock"))
    second = sleeps.start()
    until("the job is taken over", lambda: "taken over" in second.output or second.process.poll() is not None)
    (tmp_path / "go").touch()
    output = finish(second)
    assert len(re.findall(r"rule_sleep_wildcards_\d: job \d+ still runs or waits and is taken over", output)) == 1
    assert [len(sleeps.jobs(number)) for number in (0, 1)] == [1, 1]
    assert sleeps.done() == 2


class Terminal:
    """The command of docs/tutorials/slurm.md in a terminal of its own, as in tmux."""

    def __init__(self, sleeps: Sleeps, *arguments: str) -> None:
        page = (sleeps.root / "docs/tutorials/slurm.md").read_text()
        (line,) = re.findall(r'^tmux new -d "PATH=\$PATH (snakemake .*)"$', page, re.MULTILINE)
        line = line.replace("--configfile config/mine.yaml", shlex.join(sleeps.options(*arguments)))
        line = line.replace("snakemake --profile slurm", f"exec {sys.executable} -m snakemake")
        self.log = sleeps.folder / "mine.log"
        self.shell, self.keyboard = pty.fork()
        if self.shell == 0:
            os.chdir(sleeps.folder)
            os.execve("/bin/bash", ["bash", "-c", line], environment_of(sleeps.root))
        # A terminal that nobody reads from fills up.
        threading.Thread(target=self._show, daemon=True).start()

    def _show(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(self.keyboard, 4096):
                pass

    def snakemake(self) -> psutil.Process:
        (found,) = [child for child in psutil.Process(self.shell).children() if "snakemake" in child.cmdline()]
        return found

    def wait(self, until, seconds: float) -> None:
        until("an end", lambda: os.waitpid(self.shell, os.WNOHANG) != (0, 0), seconds=seconds)


@pytest.mark.verify
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_cancels_the_jobs(root, cluster, until, tmp_path, times):
    sleeps = Sleeps(root, tmp_path, count=4, seconds=300)
    terminal = Terminal(sleeps, "--jobs", "2")
    until("two jobs", lambda: len(list(tmp_path.glob("jobs.*"))) == 2)
    jobs = [job for number in range(4) for job in sleeps.jobs(number)]
    for _ in range(times):
        os.write(terminal.keyboard, b"\x03")
        time.sleep(1)
    terminal.wait(until, 60)
    assert "Terminating processes on user request" in terminal.log.read_text()
    until("they end", lambda: {cluster.jobs()[job] for job in jobs} == {"CANCELLED"}, seconds=60)
    assert len(list(tmp_path.glob("jobs.*"))) == 2


@pytest.mark.verify
def test_sigterm_waits_for_what_was_submitted(root, cluster, until, tmp_path):
    sleeps = Sleeps(root, tmp_path, count=3, seconds=15)
    terminal = Terminal(sleeps, "--jobs", "1")
    until("a job", lambda: list(tmp_path.glob("jobs.*")))
    terminal.snakemake().terminate()
    terminal.wait(until, 90)
    assert "Will exit after finishing currently running jobs" in terminal.log.read_text()
    assert sleeps.done() == len(list(tmp_path.glob("jobs.*"))) == 1
