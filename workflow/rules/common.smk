"""The run and its site, and what rules share: environments, files, a row's jobs."""

import gc
import inspect
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# A DAG of many thousands of jobs is not garbage: to look through it again and again takes a sixth of a dry run.
gc.set_threshold(100_000, 20, 20)

# This checkout, also where another workflow uses it as a module: its rules need the files beside them.
if not Path(str(workflow.current_basedir)).is_dir():
    raise WorkflowError(
        f"{workflow.current_basedir} is no folder: clone phi3v and name the clone's Snakefile in `module … snakefile:`"
    )
ROOT = Path(str(workflow.current_basedir)).parent.parent
SCRIPTS = "scripts" if ROOT == Path.cwd() else shlex.quote(f"{ROOT}/scripts")
sys.path.insert(0, str(ROOT / "src"))

from phi3v import settings
from phi3v.cluster.site import SITE_FILE, Site, load_site
from phi3v.planning.fits import runnable
from phi3v.settings import jobs

# The SLURM profile's default resources name an account, be it none; jobs inherit them.
ON_SLURM = "slurm_account" in (workflow.resource_settings.default_resources or {})
DEPLOYMENT = {str(method) for method in workflow.deployment_settings.deployment_method}
if (ON_SLURM or DEPLOYMENT) and not re.fullmatch(r"[\w./+,:=@%~-]+", f"{ROOT}{Path.cwd()}"):
    raise WorkflowError(
        f"the path of this folder holds a space, a quote or another special character: got {Path.cwd()} (workflow in {ROOT}); "
        "SLURM, conda and containers do not take it, nothing was started. Move the folder to another path, or run "
        "without them"
    )
try:
    RUN = runnable(settings.load_run(dict(config)))
    SITE = load_site() if ON_SLURM else Site()
    # Here and not in a rule's shell: Snakemake itself fills caches, and reads what Apptainer is told.
    os.environ.update(SITE.environment(workflow.remote_exec))
except settings.SettingsError as error:
    raise WorkflowError(f"wrong settings, nothing was started\n{error}")
RESULTS = RUN.results
JOBS = [*RUN.accuracy, *RUN.speed]
# What all rows of the run share.
RUN_SETTINGS = RUN.settings.model_dump_json(exclude={"rows", "overrides", "predictions"})
if not JOBS:
    reasons = "\n".join(f"{row.row.row}: not run: {row.reason}" for row in RUN.not_run)
    raise WorkflowError(f"wrong settings, nothing was started\nno selected row can run on this hardware:\n{reasons}")

# The scripts import phi3v from this checkout, whichever environment they run in. It is part of each command, since
# Snakemake takes PYTHONPATH from the environment where it activates conda. A shell prefix replaces Snakemake's own.
prologue = SITE.prologue(f"{ROOT}/scripts") if ON_SLURM and workflow.remote_exec else ""
source = shlex.quote(f"{ROOT}/src")
prefix = f"set -euo pipefail; export PYTHONPATH={source}; {prologue}"
# A job's output is in its log; beside the lines of other jobs on the terminal it would be unreadable.
output_settings = workflow.output_settings
if not (workflow.remote_exec or output_settings.printshellcmds or output_settings.verbose):
    prefix += "exec >/dev/null; "
shell.prefix(prefix.replace("{", "{{").replace("}", "}}"))

# The smallest environments that serve: a run on CPUs alone needs no CUDA libraries. One image serves data and training.
KINDS = {RUN.hardware[pool.device].kind for pool in RUN.settings.hardware}
TRAIN_ENV = f"{ROOT}/envs/train-{'cpu' if KINDS == {'cpu'} else 'cuda'}.yaml"
DATA_ENV, REPORT_ENV = f"{ROOT}/envs/data.yaml", f"{ROOT}/envs/report.yaml"
TRAIN_IMAGE = REPORT_IMAGE = None
if "apptainer" in DEPLOYMENT:
    TRAIN_IMAGE, REPORT_IMAGE = (f"{ROOT}/containers/{name}.sif" for name in ("train", "report"))
    # An image holds what the environment would; with both asked for, conda is not needed inside it.
    TRAIN_ENV = DATA_ENV = REPORT_ENV = None
elif "conda" in DEPLOYMENT and "rocm" in KINDS:
    raise WorkflowError(
        "hardware with AMD GPUs: no environment is locked for them; got --sdm conda, expected none or apptainer; nothing was "
        "started. docs/how-to/conda.md has the steps to make one"
    )


# Rules without an image of their own run in this one.
container: TRAIN_IMAGE


wildcard_constraints:
    row="[A-Za-z0-9_.@=+-]+",
    key="[A-Za-z0-9_.-]+",
    baseline="[A-Za-z0-9_.-]+",
    prediction="[A-Za-z0-9_.-]+",
    evaluated="((base|official)/)?[A-Za-z0-9_.-]+",


def dataset_file(dataset):
    """Written last by the converter: the dataset is complete."""
    return f"{RUN.data_folder(dataset)}/dataset.json"


def model_file(model):
    """Written last by the download: the weights are complete."""
    return f"{RUN.model_folder(model)}/sources.lock.json"


def sources_of(job):
    """What a row starts from."""
    return [model_file(job.row.model), dataset_file(job.row.dataset)]


def shown(file, caption, category):
    """A file of the run's results as `snakemake --report` shows it."""
    return report(f"{RESULTS}/{file}", caption=f"../report/{caption}.rst", category=category, labels={"what": caption})


def job_of(wildcards):
    """The job that the wildcards name: a row's own, or the first of those that start from a baseline."""
    if "row" in wildcards.keys():
        return RUN.job(wildcards.row)
    if "prediction" in wildcards.keys():
        return RUN.job(RUN.settings.predictions[wildcards.prediction].row)
    return RUN.baselines[wildcards.baseline]


def on_job(function):
    """An input or params function of the job that the wildcards name."""

    def value(wildcards):
        return function(job_of(wildcards))

    # Snakemake asks for it three times per job.
    value.__signature__ = inspect.signature(value)
    return value


def command(script, settings_of):
    """Params of a row's job: its command line, and the flags on which its result depends.

    Snakemake does not record a parameter that takes `input`. So a finished row stays finished if its command changes in
    what does not matter, such as the number of GPUs or workers. settings_of: of (job, wildcards).
    """

    def line(wildcards, input):
        job = job_of(wildcards)
        return f"{start_of(job)} {jobs.command(RUN, job, script, settings_of(job, wildcards), SCRIPTS)}"

    def result(wildcards):
        return jobs.result_flags(settings_of(job_of(wildcards), wildcards))

    return {"command": line, "result": result}
