"""The run and its site, and what rules share: environments, files, a row's jobs."""

import gc
import inspect
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Fewer searches for garbage, which otherwise take a sixth of a dry run of thousands of jobs.
gc.set_threshold(100_000, 20, 20)

# The rules need the files beside them, also if another workflow uses this one as a module.
if not Path(str(workflow.current_basedir)).is_dir():
    raise WorkflowError(
        f"{workflow.current_basedir} is not a folder: clone phi3v, and set `snakefile:` of your `module` to the clone's "
        "Snakefile"
    )
ROOT = Path(str(workflow.current_basedir)).parent.parent
SCRIPTS = "scripts" if ROOT == Path.cwd() else shlex.quote(f"{ROOT}/scripts")
sys.path.insert(0, str(ROOT / "src"))

from phi3v import settings
from phi3v.cluster.site import SITE_FILE, Site, load_site
from phi3v.planning.fits import runnable
from phi3v.settings import jobs

# The SLURM profile's default resources contain an account, possibly an empty one. Jobs inherit them.
ON_SLURM = "slurm_account" in (workflow.resource_settings.default_resources or {})
DEPLOYMENT = {str(method) for method in workflow.deployment_settings.deployment_method}
if (ON_SLURM or DEPLOYMENT) and not re.fullmatch(r"[\w./+,:=@%~-]+", f"{ROOT}{Path.cwd()}"):
    raise WorkflowError(
        f"the path of this folder holds a space, a quote or another special character: got {Path.cwd()} (workflow in "
        f"{ROOT}); SLURM, conda and containers do not accept it, so nothing was started. Move the folder to another "
        "path, or run without them"
    )
try:
    RUN = runnable(settings.load_run(dict(config)))
    SITE = load_site() if ON_SLURM else Site()
    # For this process too: Snakemake itself fills caches and reads Apptainer's variables.
    os.environ.update(SITE.environment(workflow.remote_exec))
except settings.SettingsError as error:
    raise WorkflowError(f"wrong settings, nothing was started\n{error}")
RESULTS = RUN.results
JOBS = [*RUN.accuracy, *RUN.speed]
# The settings that all rows of the run share.
RUN_SETTINGS = RUN.settings.model_dump_json(exclude={"rows", "overrides", "predictions"})
if not JOBS:
    reasons = "\n".join(f"{row.row.row}: not run: {row.reason}" for row in RUN.not_run)
    raise WorkflowError(f"wrong settings, nothing was started\nno selected row can run on this hardware:\n{reasons}")

# The scripts import phi3v from this checkout in every environment. Each command sets PYTHONPATH, because Snakemake
# clears it for conda. Setting a shell prefix replaces Snakemake's `set -euo pipefail`, so it is repeated.
prologue = SITE.prologue(f"{ROOT}/scripts") if ON_SLURM and workflow.remote_exec else ""
source = shlex.quote(f"{ROOT}/src")
prefix = f"set -euo pipefail; export PYTHONPATH={source}; {prologue}"
# A job's output is in its log; beside the lines of other jobs on the terminal it would be unreadable. The prefix holds
# for all rules, also for those of a workflow that uses this one as a module.
output_settings, is_main = workflow.output_settings, Path(workflow.main_snakefile).resolve() == ROOT / "Snakefile"
if is_main and not (workflow.remote_exec or output_settings.printshellcmds or output_settings.verbose):
    prefix += "exec >/dev/null; "
shell.prefix(prefix.replace("{", "{{").replace("}", "}}"))

# A run on CPUs alone needs no CUDA libraries. One image serves data and training.
KINDS = {RUN.hardware[pool.device].kind for pool in RUN.settings.hardware}
TRAIN_ENV = f"{ROOT}/envs/train-{'cpu' if KINDS == {'cpu'} else 'cuda'}.yaml"
DATA_ENV, REPORT_ENV = f"{ROOT}/envs/data.yaml", f"{ROOT}/envs/report.yaml"
TRAIN_IMAGE = REPORT_IMAGE = None
if "apptainer" in DEPLOYMENT:
    TRAIN_IMAGE, REPORT_IMAGE = (f"{ROOT}/containers/{name}.sif" for name in ("train", "report"))
    # An image contains the environment, so with both methods no conda environment is made in it.
    TRAIN_ENV = DATA_ENV = REPORT_ENV = None
elif "conda" in DEPLOYMENT and "rocm" in KINDS:
    raise WorkflowError(
        "hardware with AMD GPUs: no environment is locked for them; got --sdm conda, expected none or apptainer; "
        "nothing was started. docs/how-to/containers.md explains how to build an image for them"
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
    """A row's model and data."""
    return [model_file(job.row.model), dataset_file(job.row.dataset)]


def job_of(wildcards):
    """The job that the wildcards name: a row's own, or the first of those that start from a baseline."""
    if "row" in wildcards.keys():
        return RUN.job(wildcards.row)
    if "prediction" in wildcards.keys():
        return RUN.job(RUN.settings.predictions[wildcards.prediction].row)
    return RUN.baselines[wildcards.baseline]


def with_signature(function):
    """The function, with the signature for which Snakemake asks several times per job."""
    function.__signature__ = inspect.signature(function)
    return function


def on_job(function):
    """An input or params function of the job that the wildcards name."""
    return with_signature(lambda wildcards: function(job_of(wildcards)))
