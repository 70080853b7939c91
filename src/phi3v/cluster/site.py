"""A cluster's own values, the same for every run there: config/site.yaml. Read only where jobs go to SLURM."""

from __future__ import annotations

import getpass
import math
import os
import re
import shlex
import socket
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from phi3v.planning.resources import Resources
from phi3v.settings import SettingsError, Strict, read_yaml, validate

SITE_FILE = "config/site.yaml"
CPU = "cpu"
"""Entry of `partitions` for work without GPUs, also where a run trains on CPUs."""
# These land on command lines of sbatch, and in the shell of each job where $NAME is expanded.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@:/&|*,\[\]-]*$")]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+:/@-]+$")]
Constraint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@:/&|*,()\[\]-]*$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r\x00]+$")]
Folder = Annotated[str, StringConstraints(pattern=r"^([/$][A-Za-z0-9_./${}-]*)?$")]

MANAGED = {
    "--account": "set `account`", "--partition": "set `partition`", "--qos": "set `qos`",
    "--constraint": "set `constraint`", "--time": "the plan sets the time, and `max_runtime` limits it",
    "--mem --mem-per-cpu --mem-per-gpu": "the plan sets the memory, and `memory` how it is requested",
    "--cpus-per-task --cpus-per-gpu": "set `cpus_per_gpu`",
    "--gres --gpus --gpus-per-node --gpus-per-task --gpus-per-socket": "set `gpu_type` and `gpu_flag`",
    "--nodes --ntasks --ntasks-per-node --ntasks-per-gpu": "set `nodes` and `per_node` of the run's hardware",
    "--signal": "set `leave_seconds`", "--requeue --no-requeue": "set slurm-requeue in profiles/slurm",
    "--exclude": "set slurm-exclude-failed-nodes in profiles/slurm",
    "--array --chdir --clusters --comment --error --export --job-name --output --parsable --wait --wrap":
        "Snakemake sets it",
}  # fmt: skip
"""Options of sbatch that have another place, and which."""
CACHES = {
    "XDG_CACHE_HOME": "", "HF_HOME": "/huggingface", "TORCH_HOME": "/torch", "TRITON_CACHE_DIR": "/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/inductor", "TORCH_EXTENSIONS_DIR": "/extensions", "PIP_CACHE_DIR": "/pip",
    "APPTAINER_CACHEDIR": "/apptainer",
}  # fmt: skip
"""Variable to its folder below `cache`."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}


def _is_flag(value: str) -> str:
    """Raises ValueError for what is no long option of sbatch, or one that this workflow or the executor sets."""
    if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", value):
        raise ValueError("expected a long option with its value, such as --exclusive or --licenses=scratch:1")
    name = value.partition("=")[0]
    for managed, instead in MANAGED.items():
        # sbatch takes an abbreviation that is not ambiguous.
        if any(option.startswith(name) for option in managed.split()):
            raise ValueError(f"expected no {name} here: {instead}")
    return value


class Partition(Strict):
    """The partition for jobs of one device."""

    partition: Word = ""
    """SLURM's name of the partition. Empty: jobs name no partition, and the cluster chooses."""
    max_runtime: int | None = Field(None, ge=1)
    """Longest time of a job there, in minutes. Work that takes longer resumes in the next job. Empty: no limit."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs per machine. 0: not set."""
    gpu_type: Word = ""
    """Type in the machine's GRES (`a100` in `gpu:a100:8`), if jobs must name it."""
    gpu_flag: Literal["gres", "gpus-per-node"] = "gres"
    """Option of sbatch that requests GPUs: `--gres=gpu:8` or `--gpus-per-node=8`."""
    cpus_per_gpu: int = Field(8, ge=1)
    """CPUs that a job gets with each GPU: its process, and the threads that load pictures."""
    memory: Literal["node", "cpu", "none"] = "node"
    """How jobs request memory: `--mem`, `--mem-per-cpu`, or not at all (whole machines, or memory by CPUs)."""
    account: Word = ""
    """Account of these jobs. Empty: the site's account."""
    qos: Word = ""
    """Quality of service of these jobs. Empty: the site's."""
    constraint: Constraint = ""
    """Features that a machine must have, in sbatch's syntax: `a100&nvlink`."""
    extra: list[Annotated[str, AfterValidator(_is_flag)]] = []
    """More options of sbatch, such as `--exclusive`, `--licenses=scratch:1`, `--hint=nomultithread`."""

    def fit(self, wanted: Resources) -> Resources:
        """What a job requests here: runtime cut to the limit, GPUs by their type, CPUs per GPU."""
        runtime = min(wanted.runtime, self.max_runtime or wanted.runtime)
        if not wanted.gres:
            return replace(wanted, runtime=runtime)
        gpus = int(wanted.gres.rpartition(":")[2])
        gres = f"gpu:{self.gpu_type}:{gpus}" if self.gpu_type else wanted.gres
        return replace(wanted, runtime=runtime, gres=gres, cpus=gpus * self.cpus_per_gpu)


class Site(Strict):
    """config/site.yaml: the cluster's own values."""

    account: Word = ""
    """Account that jobs are charged to. Empty: your default account in SLURM."""
    qos: Word = ""
    """Quality of service. Empty: the account's default."""
    partitions: dict[str, Partition] = {}
    """Device of the hardware file to the partition of its machines. `cpu`: conversion, validation, report. Without an
    entry, a device uses the slurm_partition of its pool, else the cluster's default partition."""
    setup: list[Line] = []
    """Shell lines that each job runs first, such as `module use /apps/modules`."""
    modules: list[Module] = []
    """Environment modules that each job loads."""
    env: dict[Variable, Line] = {}
    """Environment variables of each job, such as NCCL_SOCKET_IFNAME. $USER and other variables are expanded."""
    rendezvous: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.{}-]*$")] = ""
    """Where the nodes of a row meet: a pattern for the first node's name, such as `{host}i`, or a network interface,
    such as `ib0`. Empty: the first node's address in SLURM."""
    numa_binding: Literal["", "node", "socket", "exclusive", "core-complex"] = ""
    """torchrun's --numa-binding: CPUs that each GPU's process may use. Empty: all CPUs of the job."""
    cache: Folder = ""
    """Folder for caches outside the home quota, for jobs and for downloads on the login node. $USER and other variables
    are expanded."""
    scratch: Folder = ""
    """Folder on the machine's own disk. Pictures are copied there before training. Empty: pictures are read in place."""
    offline: bool = False
    """Compute nodes have no network, so libraries must not use it. Downloads run where Snakemake runs."""
    leave_seconds: int = Field(300, ge=10)
    """Seconds before its time limit at which a training job gets the signal to save and exit."""

    def of(self, device: str, partition: str = "") -> Partition:
        """The entry of a device; `partition`: the pool's own, which goes before it."""
        entry = self.partitions.get(device)
        if partition and (entry is None or entry.partition != partition):
            named = [other for other in self.partitions.values() if other.partition == partition]
            return named[0] if named else Partition(partition=partition)
        return entry or Partition()

    def resources(self, entry: Partition, wanted: Resources, is_row: bool) -> dict[str, str | int | None]:
        """Snakemake's resources of a job on `entry`, by the names that the executor knows; None: left out.

        wanted: as `entry.fit` gives it, per node. is_row: the job starts its processes on its nodes by itself, and
        saves when SLURM signals that its time is nearly over.
        """
        extra = [shlex.quote(flag) for flag in entry.extra]
        by_gres = entry.gpu_flag == "gres"
        if wanted.gres and not by_gres:
            extra.append(f"--gpus-per-node={wanted.gres.removeprefix('gpu:')}")
        if is_row:
            # To the job's steps, not to the shell that started them (see scripts/torchrun_nodes.sh).
            extra.append(f"--signal=USR1@{self.leave_seconds}")
        found: dict[str, str | int | None] = {
            "slurm_partition": entry.partition or None,
            "slurm_account": entry.account or self.account or None,
            "qos": entry.qos or self.qos or None,
            "constraint": entry.constraint or None,
            "slurm_extra": " ".join(extra) or None,
            "runtime": wanted.runtime,
            # Snakemake wants a number; the executor takes the one per CPU first, and nothing for 0.
            "mem_mb": 0 if entry.memory == "none" else wanted.mem_mb,
            "mem_mb_per_cpu": math.ceil(wanted.mem_mb / wanted.cpus) if entry.memory == "cpu" else None,
        }
        if is_row:
            # An empty `mpi` leaves launching to the rule's command, on one node or many.
            found |= {"mpi": "", "nodes": wanted.nodes, "tasks": wanted.nodes, "tasks_per_gpu": 0}
            found["gres"] = wanted.gres if by_gres else ""
        return found

    def environment(self, in_job: bool) -> dict[str, str]:
        """Variables for every process of the workflow: caches, and in a job the rest. Raises SettingsError.

        in_job: this process runs a job on a node. $NAME is expanded here, so on that node.
        """
        found = {name: ("cache", f"{self.cache}{below}") for name, below in CACHES.items() if self.cache}
        if in_job:
            if self.scratch:
                found["PHI3V_SCRATCH"] = ("scratch", self.scratch)
            if self.offline:
                found |= {name: ("offline", value) for name, value in OFFLINE.items()}
            found |= {name: (f"env.{name}", value) for name, value in self.env.items()}
            if self.rendezvous:
                found["PHI3V_RENDEZVOUS"] = ("rendezvous", self.rendezvous)
            if self.numa_binding:
                found["PHI3V_NUMA_BINDING"] = ("numa_binding", self.numa_binding)
        else:
            # The executor names the cluster's default partition for a job without one, but finds none in an empty list.
            found["SINFO_PARTITION"] = ("partition", "phi3v-none")
        # Some systems do not set these.
        known = {"USER": getpass.getuser(), "TMPDIR": "/tmp", **os.environ}  # noqa: S108 (where mktemp goes without it)
        if self.cache:
            # The token of `hf auth login` stays where it is.
            home = known.get("HF_HOME") or f"{known.get('XDG_CACHE_HOME') or Path.home() / '.cache'}/huggingface"
            found["HF_TOKEN_PATH"] = ("cache", known.get("HF_TOKEN_PATH", f"{home}/token"))
        return {name: _expand(field, value, known) for name, (field, value) in found.items()}

    def prologue(self, scripts: str) -> str:
        """Shell text in front of each command of a job: setup lines, modules, `env`, and torchrun as a step of the job.

        scripts: folder of slurm/torchrun.
        """
        lines = [*self.setup, *([f"module load {' '.join(self.modules)} || exit 1"] if self.modules else [])]
        if lines:
            # Module commands use variables that may not be set. A container has neither them nor the modules.
            inside = '"${APPTAINER_CONTAINER:-}${SINGULARITY_CONTAINER:-}"'
            lines = [f"if [ -z {inside} ]; then set +u", *lines, "set -u", "fi"]
        # A module may have set the same variables.
        lines += [f"export {name}={shlex.quote(os.environ.get(name, value))}" for name, value in self.env.items()]
        lines.append(f'export PATH={shlex.quote(scripts + "/slurm")}:"$PATH"')
        return "; ".join(lines) + "; "


def _expand(field: str, value: str, known: dict[str, str]) -> str:
    """The value with its $NAME and ${NAME} replaced; raises SettingsError for one that is not set."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            raise SettingsError(
                f"{SITE_FILE}: field `{field}`: got {value!r}: expected variables that are set, but {name} is not set "
                f"on {socket.gethostname()}"
            )
        return known[name]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", replaced, value)


def load_site(path: str | Path = SITE_FILE) -> Site:
    """The site file, or the defaults where there is none. Raises SettingsError."""
    return validate(Site, read_yaml(path), str(path)) if Path(path).is_file() else Site()
