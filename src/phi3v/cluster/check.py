"""Whether a run fits a cluster: what SLURM would refuse or keep waiting for ever, before any job is submitted."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phi3v.cluster.ask import ClusterError
from phi3v.cluster.facts import Facts, PartitionFacts, look
from phi3v.cluster.limits import JOBS, Limit
from phi3v.cluster.site import CPU, SITE_FILE, Partition, Site
from phi3v.planning.resources import resources
from phi3v.settings import CONVERSION_THREADS, ResolvedRun, number_of

# Seconds by which SLURM may signal early (sbatch(1), --signal), and as much to start.
SLURM_EARLY = 90
# Most that rules without a row's hardware ask for (workflow/rules/data.smk, report.smk): MB, minutes.
CPU_MEMORY, CPU_RUNTIME = 4000, 240
# The demo's base model (workflow/rules/demo.smk), MB.
DEMO_BASE_MEMORY = 6000
# Most seconds between two status queries of the executor.
LEAST_JOB_AGE = 180
# Seconds of grace in which a pre-empted job can save a checkpoint.
LEAST_GRACE = 30


Level = Literal["error", "warning", "note"]
"""An error stops the run; a note is about what makes it slower."""


@dataclass(frozen=True)
class Problem:
    """What a user should know before a run."""

    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


@dataclass(frozen=True)
class Request:
    """What a job requests on each of its nodes."""

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


def _error(text: str) -> Problem:
    return Problem("error", text)


def _field(name: str, got: object, reason: str) -> Problem:
    return _error(f"field `{name}`: got {got!r}: {reason}")


def requests(run: ResolvedRun, site: Site) -> list[Request]:
    """What the run's jobs request."""
    jobs = [*run.accuracy, *run.speed]
    found = [Request("work on CPUs", CPU, "", 1, 0, CONVERSION_THREADS, CPU_MEMORY, CPU_RUNTIME)]
    if run.demo:
        found.append(Request("the demo's base model", CPU, "", 1, 0, run.demo.base.processes, DEMO_BASE_MEMORY, 30))
    for job in jobs:
        device, partition = job.pool.device, job.pool.slurm_partition
        for kind, wanted in resources(run, job).items():
            fitted = site.of(device, partition).fit(wanted)
            what, gpus = f"row `{job.row.row}` ({kind})", job.processes_per_node if wanted.gres else 0
            found.append(Request(what, device, partition, job.nodes, gpus, fitted.cpus, fitted.mem_mb, wanted.runtime))
    return found


def cluster_problems(run: ResolvedRun, site: Site, if_silent: Level) -> list[Problem]:
    """All problems of a run on this cluster. if_silent: the level of the problem that SLURM does not answer."""
    wanted = requests(run, site)
    found = settings_problems(run, site, wanted)
    try:
        return found + problems(site, look(), wanted)
    except ClusterError as error:
        return [*found, Problem(if_silent, f"the cluster could not be checked: {error}")]


def settings_problems(run: ResolvedRun, site: Site, requests: Iterable[Request]) -> list[Problem]:
    """Contradictions between the site file and the run, found without querying the cluster."""
    found = []
    for device, entry in site.partitions.items():
        if device != CPU and device not in run.hardware:
            devices = ", ".join(sorted(run.hardware))
            found.append(_field("partitions", device, f"expected {CPU} or a device of the run: {devices}"))
        if entry.max_runtime and entry.max_runtime * 60 <= site.leave_seconds + SLURM_EARLY:
            limit = f"partition {entry.partition} ({device}) ends jobs after {entry.max_runtime} min"
            expected = f"expected over {SLURM_EARLY} s less than that, because SLURM may signal a minute early"
            found.append(_field("leave_seconds", site.leave_seconds, f"{limit}; {expected}"))
    for request in requests:
        entry = site.of(request.device, request.partition)
        if 0 < entry.gpus_per_node < request.gpus:
            found.append(
                _error(
                    f"{request.what}: asks for {request.gpus} GPUs per machine, partition {entry.partition} has "
                    f"{entry.gpus_per_node}; set per_node of the run's hardware to at most {entry.gpus_per_node}"
                )
            )
    return list(dict.fromkeys(found))


def problems(site: Site, facts: Facts, requests: Iterable[Request]) -> list[Problem]:
    """What the cluster would refuse or keep waiting for ever, and warnings."""
    found: list[Problem] = []
    # Reason to the jobs that it stops: a limit of one kind of node stops many rows at once.
    stopped: dict[tuple[str, str], list[str]] = {}
    for request in requests:
        entry = site.of(request.device, request.partition)
        partition = facts.partitions.get(entry.partition) if entry.partition else facts.default
        if partition is None:
            missing = (
                f"partition {entry.partition!r}: not on this cluster" if entry.partition else "no default partition"
            )
            found.append(_error(f"{request.device}: {missing}; expected one of {', '.join(facts.partitions)}"))
            continue
        found += _partition_problems(entry, partition, f"partitions.{request.device}")
        found += _rights_problems(site, entry, partition, facts)
        limits = facts.accounting.of(
            entry.account or site.account, entry.qos or site.qos, partition.name, partition.qos
        )
        found += _notes(limits)
        for asked, reason in [
            *_request_problems(entry, partition, request),
            *_limit_problems(entry, limits, request),
        ]:
            stopped.setdefault((partition.name, reason), []).append(f"{request.what}: asks for {asked}")
    for (_, reason), jobs in stopped.items():
        more = f" (and {number_of(len(jobs) - 1, 'more job')})" if len(jobs) > 1 else ""
        found.append(_error(f"{jobs[0]}, {reason}{more}"))
    if facts.min_job_age < LEAST_JOB_AGE:
        found.append(
            Problem(
                "warning",
                f"MinJobAge is {facts.min_job_age} s: less than the {LEAST_JOB_AGE} s between two status queries. Without "
                "accounting, only a job's outputs then show how it ended. Ask your administrators for MinJobAge=300",
            )
        )
    return list(dict.fromkeys(found))


def _partition_problems(entry: Partition, partition: PartitionFacts, field: str) -> Iterator[Problem]:
    name, limit = f"partition {partition.name}", partition.max_minutes
    if not partition.up:
        yield _error(f"{name}: is not UP; wait until it is, or set another partition in {SITE_FILE}")
    if limit is not None and entry.max_runtime is not None and entry.max_runtime > limit:
        reason = f"{name} ends jobs after {limit} min; expected at most that"
        yield _field(f"{field}.max_runtime", entry.max_runtime, reason)
    known = frozenset(feature for kind in partition.features for feature in kind)
    wanted = frozenset(re.findall(r"[\w.-]+", re.sub(r"\*\d+", "", entry.constraint)))
    if re.fullmatch(r"[\w.&,-]*", entry.constraint):
        fits = not wanted or any(wanted <= kind for kind in partition.features)
    else:
        # One of several, or numbers of nodes with each.
        fits = bool(wanted & known)
    if not fits:
        reason = f"no machine of {name} has it; features there: {_names(known)}"
        yield _field(f"{field}.constraint", entry.constraint, reason)
    if entry.gpu_type and entry.gpu_type not in partition.gpus:
        yield _field(f"{field}.gpu_type", entry.gpu_type, f"expected a GPU type of {name}: {_names(partition.gpus)}")
    if partition.preempt_mode == "CANCEL" and partition.grace_seconds < LEAST_GRACE:
        text = f"pre-empted jobs are cancelled after {partition.grace_seconds} s, which may be too short to save"
        yield Problem("warning", f"{name}: {text}; they lose the work since their last checkpoint")


def _rights_problems(site: Site, entry: Partition, partition: PartitionFacts, facts: Facts) -> Iterator[Problem]:
    account, qos = entry.account or site.account, entry.qos or site.qos
    if account and facts.accounts is not None and account not in facts.accounts:
        yield _field("account", account, f"you cannot use it on this cluster; expected one of {_names(facts.accounts)}")
    if account and partition.accounts is not None and account not in partition.accounts:
        yield _field("account", account, f"partition {partition.name} only accepts {_names(partition.accounts)}")
    if qos and facts.qos is not None and qos not in facts.qos:
        yield _field("qos", qos, f"you cannot use it on this cluster; expected one of {_names(facts.qos)}")


def _names(found: Iterable[str]) -> str:
    return ", ".join(sorted(found)) or "none"


def _request_problems(entry: Partition, partition: PartitionFacts, request: Request) -> Iterator[tuple[str, str]]:
    """(what is requested, why the partition cannot give it)"""
    name, field, limit = f"partition {partition.name}", f"partitions.{request.device}", partition.max_minutes
    if limit is not None and entry.max_runtime is None and request.runtime > limit:
        remedy = f"set `{field}.max_runtime: {limit}` in {SITE_FILE}: training then continues over several jobs"
        yield f"{request.runtime} min", f"{name} ends jobs after {limit} min; {remedy}"
    fewer_cpus = f"; set `{field}.cpus_per_gpu`" if request.gpus else ""
    for what, asked, there, remedy in (
        ("machines", request.nodes, partition.nodes, ""),
        ("GPUs per machine", request.gpus, partition.gpus_per_node, ""),
        ("CPUs per machine", request.cpus, partition.cpus, fewer_cpus),
        ("MB of memory per machine", request.mem_mb, partition.memory_mb, ""),
    ):
        if asked > there:
            yield f"{asked} {what}", f"{name} has {there}{remedy}"


def _notes(limits: Iterable[Limit]) -> Iterator[Problem]:
    for limit in limits:
        if limit.name in JOBS and limit.value:
            yield Problem("note", f"{limit.where} ({limit.name}): at most {limit.value} {JOBS[limit.name]} at a time")


def _limit_problems(entry: Partition, limits: Iterable[Limit], request: Request) -> Iterator[tuple[str, str]]:
    """(what is requested, why accounting would keep the job waiting for ever)"""
    each = {"cpu": request.cpus, "gres/gpu": request.gpus, "mem": 0 if entry.memory == "none" else request.mem_mb}
    each |= {"node": 1, f"gres/gpu:{entry.gpu_type}": request.gpus}
    runtime = min(request.runtime, entry.max_runtime or request.runtime)
    other = f"or another account or qos, in {SITE_FILE}"
    for limit in limits:
        asked = each.get(limit.tres, 0) * (1 if limit.name == "MaxTRESPerNode" else request.nodes)
        if limit.name == "GrpTRESMins":
            asked *= runtime
        if limit.name.endswith("Wall"):
            if runtime > limit.value:
                field = f"`partitions.{request.device}.max_runtime: {limit.value}`"
                yield f"{runtime} min", f"{limit}: such a job waits for ever; set {field}, {other}"
        elif limit.name in JOBS:
            if not limit.value:
                yield "a job", f"{limit}: no job may run; set another account or qos in {SITE_FILE}"
        elif limit.name == "MinTRESPerJob":
            if limit.tres in each and asked < limit.value:
                yield f"{limit.tres}={asked}", f"{limit}: a job needs at least that; set another qos in {SITE_FILE}"
        elif asked > limit.value:
            remedy = f"lower nodes or per_node of the run's hardware, or set another account or qos in {SITE_FILE}"
            yield f"{limit.tres}={asked}", f"{limit}: such a job waits for ever; {remedy}"


def login_problems(folder: Path) -> list[Problem]:
    """Problems of the machine that Snakemake runs on."""
    found = []
    if shutil.which("snakemake", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
        found.append(_error("snakemake was not found; expected it in this environment: make venv"))
    if (free := shutil.disk_usage(folder).free / 1e9) < 100:
        text = f"{free:.0f} GB free; the published run needs more (snakemake -c1 plan)"
        found.append(Problem("warning", f"{folder}: {text}"))
    return found
