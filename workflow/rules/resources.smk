"""Threads, resources and command lines of jobs. Resources have the names that Snakemake's executors know."""

import functools
import hashlib

from phi3v.cluster.executor import WORK
from phi3v.cluster.site import CPU
from phi3v.planning.resources import Resources as Wanted
from phi3v.planning.resources import resources


def with_work(resources, *work):
    """A job's resources and a digest of its work: a restarted Snakemake takes over a running job of the same digest."""
    digest = hashlib.sha256("\n".join(work).encode()).hexdigest()[:16]
    # A job that SLURM puts back into the queue continues its log.
    flags = ["--open-mode=append", resources["slurm_extra"], f"{WORK}{digest}"]
    return resources | {"slurm_extra": " ".join(filter(None, flags))}


def with_attempts(flags):
    """A resources function: the job's own sbatch flags, and those that follow from its failed attempts."""

    @with_signature
    def value(wildcards, rulename):
        key = rulename, *wildcards
        return f"{flags(wildcards)} {ATTEMPTS[key].flags if key in ATTEMPTS else ''}".rstrip()

    return value


@functools.cache
def planned(row):
    """(threads, resources) of a row's jobs by their kind: train, evaluate and official, or speed."""
    job = RUN.job(row)
    entry = SITE.of(job.pool.device, job.pool.slurm_partition)
    fitted = {kind: entry.fit(wanted) for kind, wanted in resources(RUN, job).items()}
    if not ON_SLURM:
        return {kind: (each.cpus, {"mem_mb": each.mem_mb, "runtime": each.runtime}) for kind, each in fitted.items()}
    work = [RESULTS, RUN_SETTINGS, job.model_dump_json()]
    work += [RUN.data_folder(job.row.dataset), RUN.model_folder(job.row.model)]
    return {
        kind: (each.cpus, with_work(SITE.resources(entry, each, is_row=True), *work)) for kind, each in fitted.items()
    }


def threads_of(kind):
    """Threads of a row's job."""
    return on_job(lambda job: planned(job.row.row)[kind][0])


def resources_of(kind):
    """Resources of a row's job."""
    _, some = next(iter(planned(JOBS[0].row.row).values()))
    named = {name: on_job(lambda job, name=name: planned(job.row.row)[kind][1][name]) for name in some}
    if ON_SLURM:
        named["slurm_extra"] = with_attempts(named["slurm_extra"])
    # One number for all rows costs less than a function.
    accelerators = {job.processes_per_node for job in JOBS}
    each = on_job(lambda job: job.processes_per_node)
    return {"accelerators": accelerators.pop() if len(accelerators) == 1 else each, **named}


def start_of(job):
    """What stands before a row's command: a process's threads, and on SLURM the job's step if torchrun starts none."""
    cpus, _ = next(iter(planned(job.row.row).values()))
    threads = f"OMP_NUM_THREADS={cpus // job.processes_per_node}"
    alone = ON_SLURM and jobs.is_alone(RUN, job)
    return f"{threads} {SCRIPTS}/torchrun_nodes.sh 1 1" if alone else threads


def run_script(name, arguments):
    """Shell command that runs one of our scripts, with its output in the rule's log."""
    folder = SCRIPTS.replace("{", "{{").replace("}", "}}")
    return f"python {folder}/{name}.py {arguments} 2>&1 | tee {{log}}"


def command(script, settings_of):
    """Params of a row's job: its command line, and the flags on which its result depends.

    Snakemake does not record a parameter that takes `input`. So a finished row stays finished if its command changes in
    what does not matter, such as the number of GPUs or workers. settings_of: of (job, wildcards).
    """

    @with_signature
    def line(wildcards, input):
        job = job_of(wildcards)
        return f"{start_of(job)} {jobs.command(RUN, job, script, settings_of(job, wildcards), SCRIPTS)}"

    @with_signature
    def result(wildcards):
        job = job_of(wildcards)
        return jobs.result_flags(job, settings_of(job, wildcards))

    return {"command": line, "result": result}


def on_cpus(mem_mb, runtime, threads=1, results=""):
    """Resources of a job that needs no row's machines. results: the run's folder, if the job is of this run alone."""
    if not ON_SLURM:
        return {"mem_mb": mem_mb, "runtime": runtime}
    entry = SITE.of(CPU)
    wanted = entry.fit(Wanted(runtime, mem_mb, threads, 1, "", ""))
    found = with_work(SITE.resources(entry, wanted, is_row=False), results)
    found["slurm_extra"] = with_attempts(lambda wildcards, flags=found["slurm_extra"]: flags)
    return {name: value for name, value in found.items() if value is not None}
