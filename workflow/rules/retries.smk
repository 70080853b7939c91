"""How often a failed job on SLURM is tried again, and on which nodes. What its attempts have saved decides.

Snakemake's `retries` takes no function, so this file replaces Job.restart_times, which Snakemake reads after each
failed attempt. tests/workflow/test_retries.py fails when `retries` takes a function.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace

from snakemake.jobs import Job as SnakemakeJob
from snakemake.logging import logger

from phi3v.cluster.ask import ClusterError
from phi3v.cluster.status import nodes_to_avoid
from phi3v.training.checkpoints import checkpoint_folders
from phi3v.training.lock import take_refusal

# Of each rule and its wildcards, what the last failed attempt had saved, how many attempts found the folder in use,
# and sbatch flags of the next attempt.
ATTEMPTS = defaultdict(lambda: SimpleNamespace(saved=-1, refused=0, flags=""))


def saved_by(folder):
    """Progress of a job's work: the newest checkpoint's step plus the size of the answers so far."""
    checkpoints = folder / "checkpoints"
    saved = checkpoint_folders(checkpoints) if checkpoints.is_dir() else []
    step = int(saved[0].name.removeprefix("checkpoint-")) if saved else 0
    return step + sum(path.stat().st_size for path in folder.glob("**/partial/*.jsonl"))


def retries_of(job):
    """Number of retries of a job.

    An attempt that found its folder in use does not count. Training and evaluation continue while each attempt saves
    more than the one before, up to the profile's `retries`; other jobs have two retries. The next attempt avoids the
    nodes of one that failed by itself.
    """
    allowed, folder = job.rule.restart_times, Path(job.output[0]).parent
    attempts = ATTEMPTS[job.name, *job.wildcards]
    attempts.flags = ""
    if take_refusal(folder):
        attempts.refused += 1
        attempts.flags = "--begin=now+300"
        logger.warning(f"{folder}: another job owns it, so this one is tried again in 5 minutes")
        return allowed + attempts.refused
    # Another workflow that uses this one as a module gives them other names.
    working = (rules.finetune, rules.evaluate, rules.evaluate_base, rules.evaluate_official, rules.predict)
    if job.name in {each.rule.name for each in working}:
        before, attempts.saved = attempts.saved, saved_by(folder)
        if attempts.saved <= before:
            logger.error(f"{folder}: attempt {job.attempt} saved no more than the one before, so it is not tried again")
            return 0
    else:
        allowed = min(allowed, 2)
    if job.attempt > allowed + attempts.refused:
        return 0
    if not (folder / "checkpoints/stopped.json").exists():
        try:
            nodes = nodes_to_avoid(Path.cwd(), job.name, job.wildcards, job.resources.get("slurm_partition", ""))
            attempts.flags = f"--exclude={nodes}" if nodes else ""
        except ClusterError as error:
            logger.warning(f"{job.name}: the next attempt may use the failed node again: {error}")
    # The next attempt overwrites ROW.log.
    for log in map(Path, job.log):
        names = (log.with_suffix(f".{number}{log.suffix}") for number in itertools.count(1))
        if log.exists():
            log.rename(next(name for name in names if not name.exists()))
    return allowed + attempts.refused


if ON_SLURM and workflow.is_main_process:
    SnakemakeJob.restart_times = property(retries_of)
