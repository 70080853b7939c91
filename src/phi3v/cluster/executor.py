"""SLURM's commands as Snakemake's executor sees them: failed submissions are repeated, and no job is submitted twice.

The executor calls `sbatch` from its PATH, and one failure ends the job's attempt. `connect` puts workflow/slurm first
on that PATH; the command there runs this file, which calls the real one. Jobs get the PATH without that folder. The
commands run often, so this file imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

FIRST_WAIT, LONGEST_WAIT, GIVE_UP = 10.0, 300.0, 3600.0
"""Seconds between submissions, doubled each time, and in total."""
SUBMIT_SECONDS, QUERY_SECONDS = 300, 25
"""Longest that sbatch, which repeats by itself, and others may take; the executor waits a minute for a status."""
PREFIX = "PHI3V_EXECUTOR_"
"""Of the environment variables by which Snakemake and the commands know each other."""
PYTHON, PATH, CHANNEL = f"{PREFIX}PYTHON", f"{PREFIX}PATH", f"{PREFIX}CHANNEL"
WORK = "--phi3v-work="
# The strings of slurm_strerror(3) and of munge that name a state of the cluster, not a fault of the request.
TEMPORARY = re.compile(
    r"timed? ?out|try again|temporarily|controller|standby mode|(message|communication) \w+ failure|zero bytes|"
    r"connection (refused|reset)|not connected|no route to host|inactive or drain|required node not available|"
    r"unable to create job record|i/o error writing|authentication error|munge|connect to database|"
    r"cannot allocate memory|submitjob",
    re.IGNORECASE,
)
# AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, QOSGrpSubmitJobsLimit …: until another job ends.
SUBMIT_LIMIT = re.compile(r"(Assoc|QOS)\w*SubmitJob\w*")
# States after which squeue forgets a job; the executor waits for SLURM to restart one that was in the last three.
LEFT_TO_SLURM = ("NODE_FAIL", "PREEMPTED", "REVOKED")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
# squeue's reasons that end by themselves.
ORDINARY = ("None", "Resources", "Priority", "Dependency", "BeginTime", "Cleaning", "Prolog", "Licenses", "Reservation")
ADVICE = {
    r"TimeLimit|WallDuration|MinutesPerJob": "lower `max_runtime` of its partition or change `qos` (config/site.yaml)",
    r"Minutes": "the hours of the account are used up; change `account` in config/site.yaml",
    r"Jobs": "it starts when other jobs have ended; `jobs` in profiles/slurm/profile.yaml limits the number submitted",
    r"Hel|Hold|held|NeverSatisfied": "run scontrol release JOB, or scancel JOB to submit it again",
    r"InvalidQOS|QOSNotAllowed": "change `qos` in config/site.yaml",
    r"AccountNot|InvalidAccount": "change `account` in config/site.yaml",
    r"^(QOS|Assoc|Max)": "change `hardware` of the run, or `cpus_per_gpu` or `qos` in config/site.yaml",
    r"BadConstraints": "change `constraint`, `gpu_type` or `partition` in config/site.yaml",
    r"Partition": "change `partition` in config/site.yaml, or `nodes` in `hardware` of the run",
    r"NotAvail|DOWN|Reserv": "nodes are down or reserved (sinfo -R); before maintenance, lower `max_runtime` in "
    "config/site.yaml",
    r"": "see squeue(1), job reason codes, and the fields of config/site.yaml",
}

Answer = subprocess.CompletedProcess[str]


def connect(folder: Path, logger: logging.Logger) -> None:
    """In Snakemake's process: call the commands of `folder` instead of SLURM's, and log what they report.

    After Ctrl-C or SIGTERM they submit nothing any more: the executor would still submit what waits in its queue.
    """
    read, write = os.pipe()
    signals, woken = os.pipe()
    handle = f"/proc/{os.getpid()}/fd/{write}"
    os.environ |= {PYTHON: sys.executable, PATH: os.environ["PATH"], CHANNEL: f"{handle} {os.readlink(handle)}"}
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"

    def relay() -> None:
        with open(read, encoding="utf-8") as lines:
            for line in lines:
                logger.warning(line.rstrip("\n"))

    def watch() -> None:
        while os.read(signals, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), write)

    for task in (relay, watch):
        threading.Thread(target=task, daemon=True).start()
    # Beside the handlers that Snakemake sets later.
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)


def stopped() -> bool:
    """Whether the Snakemake that called this command was interrupted or is gone."""
    handle, _, pipe = os.environ[CHANNEL].partition(" ")
    try:
        return os.readlink(handle) != pipe
    except OSError:
        return True


def report(text: str) -> None:
    """Show a line in Snakemake's log."""
    with contextlib.suppress(OSError):
        if not stopped():
            handle = os.open(os.environ[CHANNEL].partition(" ")[0], os.O_WRONLY | os.O_NONBLOCK)
            os.write(handle, f"{' '.join(text.split())[:2000]}\n".encode())
            os.close(handle)


def slurm(*command: str, script: str = "") -> Answer:
    """Run a command of SLURM, without a trace of this file in the environment that sbatch gives to the job."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment["PATH"] = path = os.environ[PATH]
    program = shutil.which(command[0], path=path)
    if program is None:
        return Answer(command, 127, "", f"{command[0]}: not found; expected SLURM's on PATH\n")
    line, seconds = [program, *command[1:]], SUBMIT_SECONDS if command[0] == "sbatch" else QUERY_SECONDS
    try:
        return subprocess.run(line, input=script, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(command, 1, "", f"{command[0]}: timed out after {seconds} s\n")


def option(arguments: list[str], name: str) -> str:
    """Value of an option that the executor gives as a word of its own; "" without."""
    return arguments[arguments.index(name) + 1] if name in arguments else ""


def answered(what: str, ask: Callable[[bool], Answer]) -> Answer:
    """The answer of ask(repeated) once it is not one that waiting can cure; the last one after an hour."""
    waited, wait = 0.0, FIRST_WAIT
    while not stopped():
        answer = ask(wait > FIRST_WAIT)
        reason = "; ".join(line.split("error: ")[-1].strip() for line in answer.stderr.splitlines())
        if answer.returncode == 0 or waited >= GIVE_UP or not TEMPORARY.search(reason):
            return answer
        report(f"{what}: no success yet ({reason}); trying again in {wait:.0f} s")
        pause(wait)
        # While jobs of this user are there, their ends make room.
        endless = SUBMIT_LIMIT.search(reason) and slurm("squeue", "--me", "--noheader").stdout.strip()
        waited, wait = 0.0 if endless else waited + wait, min(2 * wait, LONGEST_WAIT)
    return Answer([], 1, "", "Snakemake was stopped, so nothing is submitted\n")


def pause(seconds: float) -> None:
    """Sleep, but not longer than Snakemake lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped():
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))


def submit(arguments: list[str], script: str) -> Answer:
    """sbatch; a job of an earlier Snakemake for the same work that still runs or waits is taken over.

    The rules name the settings of a row's job by the flag WORK in `slurm_extra`, which sbatch does not get.
    """
    name, comment = option(arguments, "--job-name"), option(arguments, "--comment")
    folder = os.path.realpath(option(arguments, "-D"))
    work = "".join(flag.removeprefix(WORK) for flag in arguments if flag.startswith(WORK))
    flags = [flag for flag in arguments if not flag.startswith(WORK)]

    def ask(repeated: bool) -> Answer:
        queue = slurm("squeue", "--me", "--noheader", "--format=%i|%j|%k|%Z")
        for line in queue.stdout.splitlines():
            job, other, text, where = line.split("|", 3)
            # Under this Snakemake's own name: a submission that timed out, but reached the controller.
            if text == comment and os.path.realpath(where) == folder and (repeated or other != name) and job.isdigit():
                return take_over(
                    job, comment, work, Journal(other).read("work").get(job, work if other == name else "")
                )
        return queue if queue.returncode else slurm("sbatch", *flags, script=script)

    answer = answered(comment, ask)
    if answer.returncode == 0:
        job = answer.stdout.strip().partition(";")[0]
        Journal(name).write("submitted", job, comment)
        Journal(name).write("work", job, work)
        if stopped():
            slurm("scancel", job)
    return answer


def take_over(job: str, comment: str, work: str, submitted_for: str) -> Answer:
    """The job's number instead of a second job, unless it was submitted for other settings."""
    if work != submitted_for:
        text = (
            f"job {job} still runs or waits for the same output, with other settings; nothing was submitted beside it"
        )
        return Answer([], 1, "", f"{comment}: {text}. Wait for it or scancel {job}, then start Snakemake again.\n")
    report(f"{comment}: job {job} still runs or waits and is taken over; to submit it again: scancel {job}")
    return Answer([], 0, f"{job}\n", "")


class Journal:
    """Of one Snakemake's jobs: lines of (kind, job, text), beside the executor's logs, which live ten days."""

    def __init__(self, name: str) -> None:
        self.path = Path(".snakemake/slurm_logs", f"{name}.log")

    def write(self, *line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write("\t".join(line) + "\n")

    def read(self, kind: str) -> dict[str, str]:
        """Text by job."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return {job: text for found, job, text in (line.split("\t", 2) for line in lines) if found == kind}


def states(name: str) -> Answer:
    """`JOB|STATE` of every job that was submitted under this name; nothing while SLURM does not answer."""
    journal = Journal(name)
    # Read before squeue is asked: a job that is submitted later may be missing in its answer.
    submitted = journal.read("submitted")
    queue = slurm("squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%r")
    if queue.returncode:
        # To the executor an answer without a job means that it has not ended; after failed queries it forgets its jobs.
        report(f"SLURM does not answer ({queue.stderr}); submitted jobs continue, and Snakemake asks again")
        return Answer([], 0, "", "")
    listed = [line.split("|", 2) for line in queue.stdout.splitlines()]
    found = {job: state for job, state, _ in listed}
    ended = journal.read("ended")
    for job, state in (how_they_ended(submitted, found.keys() | ended.keys()) | found).items():
        if job in submitted and state in ENDED and ended.get(job) != state:
            journal.write("ended", job, state)
            ended[job] = state
    report_reasons(journal, submitted, {job: reason for job, state, reason in listed if state == "PENDING"})
    return Answer([], 0, "".join(f"{job}|{state}\n" for job, state in (ended | found).items()), "")


def how_they_ended(submitted: dict[str, str], known: Iterable[str]) -> dict[str, str]:
    """State of each job that squeue does not list any more (MinJobAge), from accounting.

    Without accounting it is COMPLETED: Snakemake then looks for the outputs, and a job without them has failed.
    """
    tasks = {job.partition("_")[0] for job in known}
    gone = [job for job in submitted if job not in tasks]
    if not gone:
        return {}
    answer = slurm("sacct", "-X", "--noheader", "--parsable2", "--format=JobIDRaw,State", f"--jobs={','.join(gone)}")
    # `CANCELLED by 1000` is more than the executor knows.
    accounted = dict(re.findall(r"^(\d+)\|(\w+)", answer.stdout, re.MULTILINE))
    for job in gone:
        if accounted.get(job) in LEFT_TO_SLURM:
            accounted[job] = "FAILED"
        elif accounted.get(job) not in ENDED:
            report(f"{submitted[job]}: SLURM no longer knows how job {job} ended, so its outputs decide")
            accounted[job] = "COMPLETED"
    return accounted


def report_reasons(journal: Journal, submitted: dict[str, str], pending: dict[str, str]) -> None:
    """Once per job, why it waits, if that does not end by itself."""
    reported = journal.read("waits")
    groups: dict[str, list[str]] = {}
    for job, reason in pending.items():
        # What follows changes: `ReqNodeNotAvail, UnavailableNodes:node[1-2]`.
        name = re.split(r"\W", reason)[0]
        if job in submitted and name not in ORDINARY and reported.get(job) != name:
            journal.write("waits", job, name)
            groups.setdefault(reason, []).append(job)
    for reason, jobs in groups.items():
        more = f" (and {len(jobs) - 1} more)" if len(jobs) > 1 else ""
        advice = next(advice for pattern, advice in ADVICE.items() if re.search(pattern, reason))
        report(f"{submitted[jobs[0]]}: job {jobs[0]}{more} waits because of {reason}: {advice}")


def main(command: str, arguments: list[str]) -> int:
    """Do what the executor calls `command` for."""
    if command == "sbatch":
        answer = submit(arguments, "" if sys.stdin.isatty() else sys.stdin.read())
    elif command in ("squeue", "sacct"):
        # A name is what the executor gives when it asks for the states of its jobs.
        name = option(arguments, "--name")
        answer = states(name) if name else slurm(command, *arguments)
    else:
        answer = answered(command, lambda repeated: slurm(command, *arguments))
    sys.stdout.write(answer.stdout)
    sys.stderr.write(answer.stderr)
    return answer.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
