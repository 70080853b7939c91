"""What sinfo, scontrol and sacctmgr say about a cluster."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass, field


class ClusterError(RuntimeError):
    """SLURM could not be asked; the message says what it answered."""


@dataclass(frozen=True)
class PartitionFacts:
    """A partition; figures of a node are those of its largest one."""

    name: str
    up: bool
    default: bool
    max_minutes: int | None
    """Longest job; None: no limit."""
    nodes: int
    cpus: int
    memory_mb: int
    gpus: dict[str, int] = field(default_factory=dict)
    """GRES type to GPUs of a node; "" where the cluster gives no type."""
    features: frozenset[str] = frozenset()
    preempt_mode: str = "OFF"
    grace_seconds: int = 0
    accounts: frozenset[str] | None = None
    """Accounts that may use it; None: all."""

    @property
    def gpus_per_node(self) -> int:
        return max(self.gpus.values(), default=0)


@dataclass(frozen=True)
class Facts:
    """A cluster as one user sees it."""

    partitions: dict[str, PartitionFacts]
    accounts: frozenset[str] | None
    """The user's accounts; None: the cluster keeps no accounts."""
    qos: frozenset[str] | None
    """Quality-of-service names that the user may ask for; None: the cluster keeps none."""
    min_job_age: int
    """Seconds that squeue still knows an ended job."""

    @property
    def default(self) -> PartitionFacts | None:
        return next((partition for partition in self.partitions.values() if partition.default), None)


def minutes(text: str) -> int | None:
    """SLURM's time (`30`, `30:00`, `4:00:00`, `1-00:00:00`) in minutes, rounded down; None for no limit."""
    if text.strip().lower() in ("infinite", "unlimited", "n/a", "none", "(null)", ""):
        return None
    days, _, rest = text.strip().rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:
        parts = [0, *parts, *([0] if len(parts) == 1 else [])]
    return (int(days or 0) * 24 + parts[0]) * 60 + parts[1]


def gpus(gres: str) -> dict[str, int]:
    """GPUs of a node by type from its GRES: `gpu:a100:8(S:0-1),gpu:t4:2` or `gpu:4`."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def ask(*command: str) -> str:
    """Output of a client command; raises ClusterError."""
    if shutil.which(command[0]) is None:
        raise ClusterError(f"{command[0]} was not found; expected SLURM's commands on PATH (are you on a login node?)")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(command)}: no answer within 60 s; is the controller up?") from None
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def look() -> Facts:
    """Ask the cluster; raises ClusterError."""
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", ask("scontrol", "show", "config"), re.M))
    described = [_fields(line) for line in ask("scontrol", "--oneliner", "show", "partition").splitlines() if line]
    shapes: dict[str, list[list[str]]] = {}
    for line in ask("sinfo", "--noheader", "-o", "%R|%D|%c|%m|%G|%f").splitlines():
        name, *shape = line.strip().split("|")
        shapes.setdefault(name, []).append(shape)
    partitions = {}
    for entry in described:
        name, groups = entry["PartitionName"], shapes.get(entry["PartitionName"], [])
        allowed = entry.get("AllowAccounts", "ALL")
        types: dict[str, int] = {}
        for group in groups:
            types = {kind: max(count, types.get(kind, 0)) for kind, count in {**types, **gpus(group[3])}.items()}
        partitions[name] = PartitionFacts(
            name=name,
            up=entry.get("State") == "UP",
            default=entry.get("Default") == "YES",
            max_minutes=minutes(entry.get("MaxTime", "")),
            nodes=sum(int(group[0]) for group in groups),
            cpus=max((int(group[1].rstrip("+")) for group in groups), default=0),
            memory_mb=max((int(group[2].rstrip("+")) for group in groups), default=0),
            gpus=types,
            features=frozenset(name for group in groups for name in group[4].split(",") if name != "(null)"),
            preempt_mode=entry.get("PreemptMode", "OFF"),
            grace_seconds=int(entry.get("GraceTime", "0")),
            accounts=None if allowed == "ALL" else frozenset(allowed.split(",")),
        )
    accounts, qos = _rights(config)
    return Facts(partitions, accounts, qos, min_job_age=int(config.get("MinJobAge", "300").split()[0]))


def _rights(config: dict[str, str]) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """(accounts, qos) of this user; None each where the cluster does not enforce them."""
    enforced = config.get("AccountingStorageEnforce", "none")
    if "associations" not in enforced:
        return None, None
    lines = ask("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos").splitlines()
    rows = [line.split("|") for line in lines if line.strip()]
    allowed = frozenset(name for row in rows for name in row[1].split(",") if name)
    return frozenset(row[0] for row in rows), allowed if "qos" in enforced else None
