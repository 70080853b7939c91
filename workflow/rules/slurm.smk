"""What a run on SLURM does before its first job: a look at the cluster, and the commands that the executor calls."""

from snakemake.logging import logger

from phi3v.cluster.check import problems, requests, settings_problems
from phi3v.cluster.ask import ClusterError
from phi3v.cluster.executor import connect
from phi3v.cluster.facts import look


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


include: "retries.smk"


if ON_SLURM and workflow.is_main_process:
    refuse_other_extra()
    look_at_cluster()
    connect(ROOT / "workflow/slurm", logger)
