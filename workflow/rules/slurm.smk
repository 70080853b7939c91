"""What a run on SLURM does before its first job: it checks the cluster, and puts its own sbatch and squeue on PATH."""

from snakemake.logging import logger

from phi3v.cluster.check import cluster_problems
from phi3v.cluster.executor import connect


def refuse_slurm_extra():
    """Stop if `slurm_extra` is set outside the site file, because it would replace the flags that the rules set."""
    given = workflow.resource_settings
    for option, values in [("default-resources", given.default_resources), *given.overwrite_resources.items()]:
        if "slurm_extra" in (values or {}):
            where = option if option == "default-resources" else f"set-resources {option}"
            raise WorkflowError(
                f"--{where}: field `slurm_extra`: expected these flags as `extra` of the partition in {SITE_FILE}, "
                "because the workflow adds flags of its own; nothing was started"
            )


def check_cluster():
    """Stop if the cluster would refuse a job or never start it."""
    found = cluster_problems(RUN, SITE, if_silent="warning")
    for problem in found:
        if problem.level == "warning":
            logger.warning(str(problem))
    if errors := [str(problem) for problem in found if problem.level == "error"]:
        raise WorkflowError(
            f"{SITE_FILE} or the run's hardware does not fit this cluster, nothing was started\n" + "\n".join(errors)
        )


include: "retries.smk"


if ON_SLURM and workflow.is_main_process:
    refuse_slurm_extra()
    check_cluster()
    connect(ROOT / "workflow/slurm", logger)
