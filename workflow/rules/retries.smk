"""How often a failed job on SLURM is tried again, and where: this depends on what its attempts have saved.

Snakemake's `retries` is a number per rule, which jobs inside SLURM would repeat, and takes no function. So this file
replaces Job.restart_times, which Snakemake reads after each failed attempt. tests/workflow/test_retries.py fails when
`retries` takes a function.
"""

from collections import defaultdict
from dataclasses import dataclass

from snakemake.jobs import Job as SnakemakeJob
from snakemake.logging import logger

from phi3v.cluster.ask import ClusterError
from phi3v.cluster.status import nodes_to_avoid
from phi3v.training.checkpoints import checkpoint_folders
from phi3v.training.lock import take_refusal


@dataclass
class Attempts:
    """What a job's failed attempts have shown."""

    saved: int = -1
    refused: int = 0
    flags: str = ""
    """sbatch options of the next attempt."""


# By rule and wildcards.
ATTEMPTS = defaultdict(Attempts)


def saved_by(folder):
    """Progress of a job's work: the newest checkpoint's step, or the size of the answers so far."""
    checkpoints = folder / "checkpoints"
    saved = checkpoint_folders(checkpoints) if checkpoints.is_dir() else []
    step = int(saved[0].name.removeprefix("checkpoint-")) if saved else 0
    return step + sum(path.stat().st_size for path in folder.glob("**/partial/*.jsonl"))


def retries_of(job):
    """How many retries a job has; Snakemake asks after each failed attempt.

    The profile's `retries` is the most that a job may take. Training and evaluation must get on: an attempt that saved
    nothing more than the one before is the last. Anything else is tried three times at most. After an attempt that was
    not told to leave, the next one avoids its nodes. An attempt that found the row's folder owned by another job does
    not count.
    """
    allowed, folder = job.rule.restart_times, Path(job.output[0]).parent
    attempts = ATTEMPTS[job.name, *job.wildcards]
    attempts.flags = ""
    if take_refusal(folder):
        attempts.refused += 1
        attempts.flags = "--begin=now+300"
        logger.warning(f"{folder}: another job owns it: tried again in 5 minutes")
        return allowed + attempts.refused
    # Another workflow that uses this one as a module gives them other names.
    working = (rules.finetune, rules.evaluate, rules.evaluate_base, rules.evaluate_official, rules.predict)
    if job.name in {each.rule.name for each in working}:
        before, attempts.saved = attempts.saved, saved_by(folder)
        if attempts.saved <= before:
            logger.error(f"{folder}: attempt {job.attempt} saved nothing after the one before: not tried again")
            return 0
    else:
        allowed = min(allowed, 2)
    if job.attempt > allowed + attempts.refused:
        return 0
    if not (folder / "checkpoints/stopped.json").exists():
        attempts.flags = avoid_nodes(job)
    keep_logs(job)
    return allowed + attempts.refused


def avoid_nodes(job):
    """An sbatch option that keeps a job's next attempt away from the nodes of the last."""
    try:
        nodes = nodes_to_avoid(Path.cwd(), job.name, list(job.wildcards), job.resources.get("slurm_partition", ""))
    except ClusterError as error:
        logger.warning(f"the failed node stays in use: {error}")
        return ""
    return f"--exclude={nodes}" if nodes else ""


def keep_logs(job):
    """Give a failed attempt's log a name of its own, ROW.1.log: the next attempt writes ROW.log anew."""
    for log in map(Path, job.log):
        number = 1
        while log.with_suffix(f".{number}{log.suffix}").exists():
            number += 1
        if log.exists():
            log.rename(log.with_suffix(f".{number}{log.suffix}"))


if ON_SLURM and workflow.is_main_process:
    SnakemakeJob.restart_times = property(retries_of)
