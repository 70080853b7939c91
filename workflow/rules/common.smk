"""The run's settings, and what the rules share: paths of results, launch lines, resources."""

import functools
import hashlib
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# This checkout, also where another workflow uses it as a module: its rules need the files beside them.
if not Path(str(workflow.current_basedir)).is_dir():
    raise WorkflowError(
        f"{workflow.current_basedir} is no folder: clone phi3v and name the clone's Snakefile in `module … snakefile:`"
    )
ROOT = Path(str(workflow.current_basedir)).parent.parent
SCRIPTS = "scripts" if ROOT == Path.cwd() else shlex.quote(f"{ROOT}/scripts")

SOURCE = str(ROOT / "src")
sys.path.insert(0, SOURCE)

from phi3v import settings
from phi3v.cluster.executor import WORK
from phi3v.cluster.site import CPU, SITE_FILE, Site, load_site
from phi3v.data.fetch import local_contents
from phi3v.planning.fits import runnable
from phi3v.planning.resources import check_room
from phi3v.planning.resources import resources as planned_resources
from phi3v.settings import jobs

# The SLURM profile's default resources name an account, be it none; jobs inherit them.
ON_SLURM = "slurm_account" in (workflow.resource_settings.default_resources or {})

try:
    RUN = runnable(settings.load_run(dict(config)))
    SITE = load_site() if ON_SLURM else Site()
    # Here and not in a rule's shell: Snakemake itself fills caches, and reads what Apptainer is told.
    os.environ.update(SITE.environment(workflow.remote_exec))
except settings.SettingsError as error:
    raise WorkflowError(f"wrong settings, nothing was started\n{error}")

# The scripts import phi3v from this checkout, whichever environment they run in. It is part of each command, since
# Snakemake takes PYTHONPATH from the environment where it activates conda.
prologue = SITE.prologue(f"{ROOT}/scripts") if ON_SLURM and workflow.remote_exec else ""
# Setting a shell prefix replaces Snakemake's `set -euo pipefail`, so repeat it.
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={shlex.quote(SOURCE)}; {prologue}".replace(
        "{", "{{"
    ).replace("}", "}}")
)

JOBS = [*RUN.accuracy, *RUN.speed]
RESULTS = RUN.results
# What all rows of the run share.
RUN_SETTINGS = RUN.settings.model_dump_json(
    exclude={"rows", "overrides", "predictions"}
)

# The smallest environments that serve: a run on CPUs alone needs no CUDA libraries.
KINDS = {RUN.hardware[pool.device].kind for pool in RUN.settings.hardware}
TRAIN_ENV = f"{ROOT}/envs/train-{'cpu' if KINDS == {'cpu'} else 'cuda'}.yaml"
DATA_ENV, REPORT_ENV = f"{ROOT}/envs/data.yaml", f"{ROOT}/envs/report.yaml"
TRAIN_IMAGE = REPORT_IMAGE = None
DEPLOYMENT = {str(method) for method in workflow.deployment_settings.deployment_method}
if (ON_SLURM or DEPLOYMENT) and not re.fullmatch(
    r"[\w./+,:=@%~-]+", f"{ROOT}{Path.cwd()}"
):
    raise WorkflowError(
        f"the path of this folder holds a space, a quote or another special character: got {Path.cwd()} (workflow in {ROOT}); "
        "SLURM, conda and containers do not take it, nothing was started. Move the folder to another path, or run "
        "without them"
    )
if "apptainer" in DEPLOYMENT:
    # One image serves data and training: what holds torch holds the readers of data too.
    TRAIN_IMAGE = f"{ROOT}/containers/train.sif"
    REPORT_IMAGE = f"{ROOT}/containers/report.sif"
    # An image holds what the environment would; with both asked for, conda is not needed inside it.
    TRAIN_ENV = DATA_ENV = REPORT_ENV = None
elif "conda" in DEPLOYMENT and "rocm" in KINDS:
    raise WorkflowError(
        "hardware with AMD GPUs: no environment is locked for them; got --sdm conda, expected none or apptainer; nothing was "
        "started. docs/reproducibility.md has the steps to make one"
    )

DATASET_KEYS = {
    settings.dataset_key(name, entry): name for name, entry in RUN.datasets.items()
}
MODEL_KEYS = {
    settings.model_key(name, entry): name for name, entry in RUN.models.items()
}
BASELINES = {job.baseline: job for job in reversed(RUN.accuracy)}

if not JOBS:
    reasons = "\n".join(
        f"{skipped.row.row}: not run: {skipped.reason}" for skipped in RUN.not_run
    )
    raise WorkflowError(
        f"wrong settings, nothing was started\nno selected row can run on this hardware:\n{reasons}"
    )


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


def local_source(url):
    """The path of a file: URL, which another rule may make; nothing for what comes from the network."""
    path = settings.local_source(url)
    return [] if path is None or "*" in url else [path]


def sources_of(wildcards):
    """Local sources of a dataset. A user's own are compared by content (contents_of), so their times do not matter."""
    entry = RUN.datasets[DATASET_KEYS[wildcards.key]]
    return [
        ancient(path) if url in entry.users_urls else path
        for url in entry.urls
        for path in local_source(url)
    ]


def contents_of(wildcards):
    """Digest of a user's files, so that an edited one repeats the download and what follows."""
    return [
        local_contents(url, Path("results/data/.digests.json"))
        for url in RUN.datasets[DATASET_KEYS[wildcards.key]].users_urls
    ]


def scored_dataset(wildcards):
    """The dataset of an evaluation: ROW, base/KEY or official/ROW."""
    kind, _, name = wildcards.evaluated.rpartition("/")
    job = BASELINES[name] if kind == "base" else RUN.job(name)
    return RUN.official(job) if kind == "official" else job.row.dataset


def row_results(job):
    """What a row ends with: its evaluations before and after, that on the authors' own split where its files are there, or its timing."""
    row = job.row.row
    if not isinstance(job.row, settings.AccuracyRow):
        return [f"{RESULTS}/speed/{row}/manifest.json"]
    done = {row: job.row.dataset, f"base/{job.baseline}": job.row.dataset}
    if RUN.official(job):
        done[f"official/{row}"] = RUN.official(job)
    return [
        f"{RESULTS}/{'score' if RUN.datasets[dataset].own_metrics else 'evaluate'}/{name}/manifest.json"
        for name, dataset in done.items()
    ]


def deliverables(job):
    """What is left of a row: weights, answers, scores, timings. As inputs of a target, so that one that is gone is made again."""
    row = job.row.row
    if not isinstance(job.row, settings.AccuracyRow):
        return expand(rules.speed_row.output, row=row)
    return [
        *expand([*rules.finetune.output, *rules.evaluate.output], row=row),
        *expand(rules.evaluate_base.output, baseline=job.baseline),
        *(expand(rules.evaluate_official.output, row=row) if RUN.official(job) else []),
        *row_results(job),
    ]


def model_on(dataset):
    """The model of the first row on a dataset."""
    return next(job.row.model for job in JOBS if job.row.dataset == dataset)


def launch(job, patience=()):
    """What a person types before the script's name to start it on the job's processes."""
    if job.nodes == 1:
        processes = f"--nproc_per_node={job.processes_per_node}"
        return " ".join(["torchrun --standalone", processes, *patience])
    machines = [f"{SCRIPTS}/torchrun_nodes.sh", job.nodes, job.processes_per_node]
    return " ".join([*map(str, machines), *patience])


def launch_training(job):
    """As launch; torchrun alone kills a job that saves 30 s after SIGTERM, and does not pass SIGUSR1 on."""
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    return launch(job, ["--shutdown-timeout=900", f"--signals-to-handle={signals}"])


@functools.cache
def planned(row, kind):
    """Minutes, memory and cores of a row's job (train, evaluate or speed), from the plan; cut to the site's limits."""
    job = RUN.job(row)
    return site_entry(job).fit(planned_resources(RUN, job, kind=kind))


def site_entry(job):
    """The site's partition for the row's machines."""
    return SITE.of(job.pool.device, job.pool.slurm_partition)


def job_of(wildcards):
    """The job that the wildcards name: a row's own, or the first of those that start from a baseline."""
    if "row" in wildcards.keys():
        return RUN.job(wildcards.row)
    if "prediction" in wildcards.keys():
        return RUN.job(RUN.settings.predictions[wildcards.prediction].row)
    return BASELINES[wildcards.baseline]


def on_job(function):
    """An input, params or resources function of the job that the wildcards name."""
    return lambda wildcards: function(job_of(wildcards))


def with_work(resources, *work):
    """A job's resources and a digest of what it works on: only for the same does a new start take a running job over."""
    if ON_SLURM:
        digest = hashlib.sha256("\n".join(work).encode()).hexdigest()[:16]
        flags = [resources["slurm_extra"], f"{WORK}{digest}"]
        resources["slurm_extra"] = " ".join(filter(None, flags))
    return resources


@functools.cache
def on_site(row, kind):
    """Resources of a row's job, by the executor's names."""
    job = RUN.job(row)
    resources = SITE.resources(site_entry(job), planned(row, kind), is_row=True)
    folders = [RUN.data_folder(job.row.dataset), RUN.model_folder(job.row.model)]
    return with_work(
        resources, RESULTS, RUN_SETTINGS, job.model_dump_json(), *map(str, folders)
    )


def machines(kind):
    """Resources of a row's job, of which `kind` is its part of the plan: train, evaluate, official or speed."""
    names = on_site(JOBS[0].row.row, "train" if RUN.accuracy else "speed")
    return {
        "accelerators": on_job(lambda job: job.processes_per_node),
        **{
            name: on_job(lambda job, name=name: on_site(job.row.row, kind)[name])
            for name in names
        },
    }


def cpus(kind):
    """Threads of a row's job, as `machines`."""
    return on_job(lambda job: planned(job.row.row, kind).cpus)


def job_command(job, script, settings_of, launch=launch, **more):
    """A job's command line without the pipe to the log."""
    flags = settings.flags(settings_of(RUN, job, **more))
    return f"{launch(job)} {SCRIPTS}/{script}.py {shlex.join(flags)}"


def command(script, settings_of, launch=launch, **more):
    """Params of a row's job: its command line."""
    return on_job(lambda job: job_command(job, script, settings_of, launch, **more))


def tables_digest():
    """Changes when anything that the report shows of the tables does."""
    return hashlib.sha256(RUN.model_dump_json().encode()).hexdigest()[:16]


def threads_each(job):
    """Threads of one process."""
    return planned(job.row.row, "train").cpus // job.processes_per_node


def check_disk():
    """Hours of downloads and training should not end at a full disk; a plan or a report alone needs no room."""
    waiting = list(workflow.dag.needrun_jobs())
    trains = {job.wildcards.row for job in waiting if job.rule.name == "finetune"}
    fetches = any(
        job.rule.name in ("download_data", "download_model", "convert")
        for job in waiting
    )
    if trains or fetches:
        rows = trains or {job.row.row for job in JOBS}
        try:
            check_room(RUN, rows, downloads_only=not trains)
        except settings.SettingsError as error:
            raise WorkflowError(f"not enough disk, nothing was started\n{error}")
