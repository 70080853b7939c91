"""What jobs get besides where they go to SLURM: the site's partitions and limits, a look at the cluster, retries."""

from snakemake.jobs import Job as SnakemakeJob
from snakemake.logging import logger
from snakemake.resources import Resource

from phi3v.cluster.check import problems, requests, settings_problems
from phi3v.cluster.ask import ClusterError
from phi3v.cluster.executor import connect
from phi3v.cluster.facts import look
from phi3v.cluster.status import running_jobs
from phi3v.planning.resources import Resources as Wanted
from phi3v.training.checkpoints import checkpoint_folders


def belongs_to_row(known):
    """Whether a rule's jobs go where a row's machines are: they say which GPUs they want there, be it none."""
    return "gres" in known.resources


def on_cpus(known):
    """What jobs without a row's machines ask for, as the site's CPU partition takes it."""
    own = {
        name: resource.value
        for name, resource in known.resources.items()
        if not resource.is_evaluable()
    }
    wanted = Wanted(
        own.get("runtime", 60), own.get("mem_mb", 4000), own.get("_cores", 1), 1, "", ""
    )
    entry = SITE.of(CPU)
    return SITE.resources(entry, entry.fit(wanted), is_row=False)


def refuse_other_extra():
    """Flags of sbatch that would take the place of the site file's, or the other way around."""
    settings = workflow.resource_settings
    named = [("default-resources", settings.default_resources)] + [
        (f"set-resources {rule}", values)
        for rule, values in settings.overwrite_resources.items()
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
            f"{SITE_FILE} or the run's hardware does not fit this cluster, nothing was started\n"
            + "\n".join(errors)
        )


def refuse_second_writers():
    """Name the jobs of this folder that still run or wait, though no Snakemake watches them any more."""
    try:
        running = running_jobs(Path.cwd())
    except ClusterError as error:
        raise WorkflowError(
            f"the cluster could not be asked for jobs of an earlier Snakemake, nothing was started\n{error}"
        )
    if running:
        listed = "\n".join(f"  {job}" for job in running)
        ids = " ".join(job.id for job in running)
        raise WorkflowError(
            f"jobs of an earlier Snakemake are still there; a second one of a row would write the same files:\n{listed}\n"
            "They continue on their own and nothing is lost. Wait for them: python scripts/cluster.py wait; "
            f"or cancel them: scancel {ids}. Then start Snakemake again."
        )


# Newest checkpoint's step after each failed attempt of a row.
SAVED = {}


def retries_of(job):
    """How many retries a job has; Snakemake asks after each failed attempt.

    The profile's `retries` is the most that a training job may take. It must get on: an attempt that ends without a
    newer checkpoint than the one before is the last. Anything else is tried three times at most.
    """
    allowed = job.rule.restart_times
    # Another workflow that uses this one as a module may have put something before the name.
    if not job.rule.name.endswith("finetune"):
        return min(allowed, 2)
    row = job.wildcards.row
    folder = Path(f"{RESULTS}/train/{row}/checkpoints")
    saved = checkpoint_folders(folder) if folder.is_dir() else []
    steps = SAVED.setdefault(row, {0: -1})
    steps[job.attempt] = int(saved[0].name.removeprefix("checkpoint-")) if saved else 0
    if steps[job.attempt] > steps.get(job.attempt - 1, -1):
        return allowed
    logger.error(
        f"{row}: attempt {job.attempt} ended at step {steps[job.attempt]} like the one before: not tried again"
    )
    return 0


if ON_SLURM:
    ours = [
        known
        for known in workflow.rules
        if Path(str(known.snakefile)).is_relative_to(ROOT)
    ]
    for known in ours:
        if not belongs_to_row(known):
            for name, value in on_cpus(known).items():
                known.resources[name] = Resource(name, value)
    SnakemakeJob.restart_times = property(retries_of)
    if workflow.is_main_process:
        refuse_other_extra()
        look_at_cluster()
        connect(ROOT / "workflow/slurm", logger)


# Snakemake keeps the last onstart alone, so there is one for all.
onstart:
    check_disk()
    if ON_SLURM:
        refuse_second_writers()
