"""What jobs get besides where they go to SLURM: the site's partitions and limits, a look at the cluster, retries."""

from collections import defaultdict
from dataclasses import dataclass

from snakemake.jobs import Job as SnakemakeJob
from snakemake.logging import logger
from snakemake.resources import Resource

from phi3v.cluster.check import problems, requests, settings_problems
from phi3v.cluster.ask import ClusterError
from phi3v.cluster.executor import connect
from phi3v.cluster.facts import look
from phi3v.cluster.status import nodes_to_avoid
from phi3v.training.checkpoints import checkpoint_folders
from phi3v.training.lock import take_refusal


def refuse_other_extra():
    """Flags of sbatch that would take the place of the site file's, or the other way around."""
    settings = workflow.resource_settings
    named = [("default-resources", settings.default_resources)] + [
        (f"set-resources {rule}", values) for rule, values in settings.overwrite_resources.items()
    ]
    for where, values in named:
        if "slurm_extra" in (values or {}):
            raise WorkflowError(
                f"--{where}: field `slurm_extra`: expected these flags as `extra` of the partition in {SITE_FILE}, "
                "beside which the workflow puts its own; nothing was started"
            )


def look_at_cluster():
    """Stop before the first job if the cluster would refuse one or never start it."""
    asked = requests(RUN, SITE)
    found = settings_problems(RUN, SITE, asked)
    try:
        found += problems(SITE, look(), asked)
    except ClusterError as error:
        logger.warning(f"the cluster could not be looked at: {error}")
    for problem in found:
        if problem.level == "warning":
            logger.warning(str(problem))
    errors = [str(problem) for problem in found if problem.level == "error"]
    if errors:
        raise WorkflowError(
            f"{SITE_FILE} or the run's hardware does not fit this cluster, nothing was started\n" + "\n".join(errors)
        )


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
    # Another workflow that uses this one as a module may have put something before the name.
    if job.name.endswith(("finetune", "evaluate", "evaluate_base", "evaluate_official", "predict")):
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
        nodes = nodes_to_avoid(Path.cwd(), job.name, list(job.wildcards))
    except ClusterError as error:
        logger.warning(f"the failed node stays in use: {error}")
        return ""
    return f"--exclude={nodes}" if nodes else ""


def sbatch_options(known):
    """A resources function: what a rule gives sbatch, and what the failed attempts of its job have added."""
    own = known.resources["slurm_extra"]

    def value(wildcards):
        given = own.evaluate(wildcards) if own.is_evaluable() else own
        # A job that SLURM puts back into the queue continues its log.
        flags = ["--open-mode=append", given.value]
        if (known.name, *wildcards) in ATTEMPTS:
            flags.append(ATTEMPTS[known.name, *wildcards].flags)
        return " ".join(filter(None, flags))

    return value


def keep_logs(job):
    """Give a failed attempt's log a name of its own, ROW.1.log: the next attempt writes ROW.log anew."""
    for log in map(Path, job.log):
        number = 1
        while log.with_suffix(f".{number}{log.suffix}").exists():
            number += 1
        if log.exists():
            log.rename(log.with_suffix(f".{number}{log.suffix}"))


if ON_SLURM:
    ours = [known for known in workflow.rules if Path(str(known.snakefile)).is_relative_to(ROOT)]
    for known in ours:
        if "slurm_extra" in known.resources:
            known.resources["slurm_extra"] = Resource("slurm_extra", sbatch_options(known))
    if workflow.is_main_process:
        SnakemakeJob.restart_times = property(retries_of)
        refuse_other_extra()
        look_at_cluster()
        connect(ROOT / "workflow/slurm", logger)
