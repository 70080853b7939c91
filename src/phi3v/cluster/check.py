"""Whether a run fits a cluster: what would be refused, or wait for ever, is said before a job is submitted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from phi3v.cluster.facts import Facts, PartitionFacts
from phi3v.planning import Resources, resources
from phi3v.settings import CPU, SITE_FILE, AccuracyRow, Partition, ResolvedRun, Site


@dataclass(frozen=True)
class Problem:
    """Something wrong, or worth knowing."""

    level: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


@dataclass(frozen=True)
class Request:
    """What a job asks for, on each of its nodes."""

    what: str
    """Row, or a name for work on CPUs."""
    device: str
    partition: str
    """Named by the run's pool; "": the site file's."""
    nodes: int
    gpus: int
    cpus: int
    mem_mb: int
    runtime: int
    """Minutes, before the site's max_runtime cuts it."""


# Seconds that SLURM may signal before it was asked to (sbatch(1), --signal), and as much to start.
SLURM_EARLY = 90
# What rules without a row's machines ask for at most (workflow/rules/data.smk, report.smk): MB, minutes.
CPU_MEMORY, CPU_RUNTIME = 4000, 240
# The demo's base model (workflow/rules/demo.smk), MB.
DEMO_BASE_MEMORY = 6000


def fit(wanted: Resources, entry: Partition) -> Resources:
    """What a job asks for on this site: runtime cut to the partition's, GPUs by their type, CPUs by GPU."""
    runtime = min(wanted.runtime, entry.max_runtime or wanted.runtime)
    if not wanted.gres:
        return replace(wanted, runtime=runtime)
    gpus = int(wanted.gres.rpartition(":")[2])
    gres = f"gpu:{entry.gpu_type}:{gpus}" if entry.gpu_type else wanted.gres
    return replace(wanted, runtime=runtime, gres=gres, cpus=gpus * entry.cpus_per_gpu)


def requests(run: ResolvedRun, site: Site) -> list[Request]:
    """What the run's jobs ask for."""
    used = {job.row.dataset for job in (*run.accuracy, *run.speed)}
    cpus = max([1, *(run.datasets[name].conversion_threads for name in used)])
    found = [Request("work on CPUs", CPU, "", 1, 0, cpus, CPU_MEMORY, CPU_RUNTIME)]
    if run.demo:
        found.append(Request("the demo's base model", CPU, "", 1, 0, run.demo.base.processes, DEMO_BASE_MEMORY, 30))
    for job in (*run.accuracy, *run.speed):
        official = ["official"] if run.official(job) else []
        for kind in ("train", "evaluate", *official) if isinstance(job.row, AccuracyRow) else ("speed",):
            wanted = resources(run, job, kind=kind)
            fitted = fit(wanted, site.of(job.pool.device, job.pool.slurm_partition))
            found.append(Request(
                f"row `{job.row.row}` ({kind})", job.pool.device, job.pool.slurm_partition, job.nodes,
                job.processes_per_node if wanted.gres else 0, fitted.cpus, fitted.mem_mb, wanted.runtime,
            ))  # fmt: skip
    return found


def settings_problems(run: ResolvedRun, site: Site, requests: Iterable[Request]) -> list[Problem]:
    """What the site file and the run say about each other, without asking the cluster."""
    found = []
    for device in site.partitions:
        if device != CPU and device not in run.hardware:
            known = ", ".join(sorted(run.hardware))
            found.append(_error(f"field `partitions`: got {device!r}: expected {CPU} or a device of the run: {known}"))
    for device, entry in site.partitions.items():
        if entry.max_runtime and entry.max_runtime * 60 <= site.leave_seconds + SLURM_EARLY:
            found.append(_error(
                f"field `leave_seconds`: got {site.leave_seconds}: partition {entry.partition} ({device}) gives a job "
                f"{entry.max_runtime} min; expected less, by the minute that SLURM may be early"
            ))  # fmt: skip
    for request in requests:
        entry = site.of(request.device, request.partition)
        if 0 < entry.gpus_per_node < request.gpus:
            found.append(_error(
                f"{request.what}: asks for {request.gpus} GPUs of a machine, partition {entry.partition} has "
                f"{entry.gpus_per_node}; expected per_node of the run's hardware at most that"
            ))  # fmt: skip
    return _unique(found)


def problems(site: Site, facts: Facts, requests: Iterable[Request]) -> list[Problem]:
    """Everything that the cluster would refuse or keep waiting for ever, and what is worth knowing."""
    found = []
    # Reason to the jobs that it stops: what is wrong with a kind of machine is wrong with many rows at once.
    stopped: dict[tuple[str, str], list[str]] = {}
    for request in requests:
        entry = site.of(request.device, request.partition)
        partition = facts.partitions.get(entry.partition) if entry.partition else facts.default
        if partition is None:
            names = ", ".join(facts.partitions)
            wanted = (
                f"partition {entry.partition!r}: not on this cluster" if entry.partition else "no default partition"
            )
            found.append(_error(f"{request.device}: {wanted}; expected one of {names}"))
            continue
        found += _partition_problems(entry, partition, request.device)
        found += _rights_problems(site, entry, partition, facts)
        for asked, reason in _request_problems(entry, partition, request):
            stopped.setdefault((partition.name, reason), []).append(f"{request.what}: asks for {asked}")
    for (_, reason), jobs in stopped.items():
        more = f" (and {len(jobs) - 1} more jobs)" if len(jobs) > 1 else ""
        found.append(_error(f"{jobs[0]}, {reason}{more}"))
    if facts.min_job_age < 15:
        found.append(Problem("warning", (
            f"MinJobAge is {facts.min_job_age} s: squeue may forget a job before its end was seen; the executor then "
            "asks sacct, which does not tell cancelled jobs. Ask for MinJobAge of 300"
        )))  # fmt: skip
    return _unique(found)


def _partition_problems(entry: Partition, partition: PartitionFacts, device: str) -> list[Problem]:
    found = []
    if not partition.up:
        found.append(_error(f"partition {partition.name}: is not UP"))
    limit = partition.max_minutes
    if limit is not None and entry.max_runtime is not None and entry.max_runtime > limit:
        found.append(_error(
            f"field `partitions.{device}.max_runtime`: got {entry.max_runtime}: partition {partition.name} ends jobs after "
            f"{limit} min; expected at most that"
        ))  # fmt: skip
    if entry.constraint and entry.constraint.isidentifier() and entry.constraint not in partition.features:
        known = ", ".join(sorted(partition.features)) or "none"
        found.append(_error(
            f"field `partitions.{device}.constraint`: got {entry.constraint!r}: no machine of partition {partition.name} "
            f"has it; features there: {known}"
        ))  # fmt: skip
    if entry.gpu_type and entry.gpu_type not in partition.gpus:
        known = ", ".join(sorted(partition.gpus)) or "none"
        found.append(_error(
            f"field `partitions.{device}.gpu_type`: got {entry.gpu_type!r}: GPU types of partition {partition.name}: {known}"
        ))  # fmt: skip
    if partition.preempt_mode == "CANCEL" and partition.grace_seconds < 30:
        found.append(Problem("warning", (
            f"partition {partition.name}: pre-empted jobs are cancelled after {partition.grace_seconds} s, which is short for "
            "saving; they lose what came after the last checkpoint"
        )))  # fmt: skip
    return found


def _rights_problems(site: Site, entry: Partition, partition: PartitionFacts, facts: Facts) -> list[Problem]:
    found = []
    account, qos = entry.account or site.account, entry.qos or site.qos
    if account and facts.accounts is not None and account not in facts.accounts:
        known = ", ".join(sorted(facts.accounts)) or "none"
        found.append(_error(f"field `account`: got {account!r}: not yours on this cluster; expected one of {known}"))
    if account and partition.accounts is not None and account not in partition.accounts:
        known = ", ".join(sorted(partition.accounts))
        found.append(_error(f"field `account`: got {account!r}: partition {partition.name} takes {known} only"))
    if qos and facts.qos is not None and qos not in facts.qos:
        known = ", ".join(sorted(facts.qos)) or "none"
        found.append(_error(f"field `qos`: got {qos!r}: not yours on this cluster; expected one of {known}"))
    return found


def _request_problems(entry: Partition, partition: PartitionFacts, request: Request) -> list[tuple[str, str]]:
    """(what is asked for, why the partition cannot give it)"""
    found = []
    limit = partition.max_minutes
    if limit is not None and entry.max_runtime is None and request.runtime > limit:
        found.append((
            f"{request.runtime} min",
            f"partition {partition.name} ends jobs after {limit} min; set `partitions.{request.device}.max_runtime: {limit}` "
            f"in {SITE_FILE}: training then goes on over several jobs",
        ))  # fmt: skip
    for name, asked, there in (
        ("machines", request.nodes, partition.nodes),
        ("GPUs of a machine", request.gpus, partition.gpus_per_node),
        ("CPUs of a machine", request.cpus, partition.cpus),
        ("MB memory of a machine", request.mem_mb, partition.memory_mb),
    ):
        if asked > there:
            hint = (
                f"; set `partitions.{request.device}.cpus_per_gpu`" if name.startswith("CPUs") and request.gpus else ""
            )
            found.append((f"{asked} {name}", f"partition {partition.name} has {there}{hint}"))
    return found


def _error(text: str) -> Problem:
    return Problem("error", text)


def _unique(found: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(found))
