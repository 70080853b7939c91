"""What sinfo, scontrol and sacctmgr report about a cluster, and a first site file from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from phi3v.cluster.ask import ask, minutes
from phi3v.cluster.limits import Accounting, read
from phi3v.cluster.site import CPU
from phi3v.settings import Hardware


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
    """GRES type to GPUs of a node; "" if the cluster gives no type."""
    features: tuple[frozenset[str], ...] = ()
    """Of each kind of node."""
    preempt_mode: str = "OFF"
    grace_seconds: int = 0
    accounts: frozenset[str] | None = None
    """Accounts that may use it; None: all."""
    qos: str = ""
    """Quality of service whose limits hold for all its jobs."""

    @property
    def gpus_per_node(self) -> int:
        return max(self.gpus.values(), default=0)


@dataclass(frozen=True)
class Facts:
    """A cluster as one user sees it."""

    partitions: dict[str, PartitionFacts]
    accounts: frozenset[str] | None
    """The user's accounts; None: the cluster keeps no accounts, or users may not read them."""
    qos: frozenset[str] | None
    """Quality-of-service names that the user may request; None: the cluster keeps none, or users may not read them."""
    min_job_age: int
    """Seconds for which squeue still lists an ended job."""
    accounting: Accounting = field(default_factory=Accounting)

    @property
    def default(self) -> PartitionFacts | None:
        return next((partition for partition in self.partitions.values() if partition.default), None)


def gpus(gres: str) -> dict[str, int]:
    """GPUs of a node by type from its GRES: `gpu:a100:8(S:0-1),gpu:t4:2` or `gpu:4`."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def look() -> Facts:
    """Query the cluster; raises ClusterError."""
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", ask("scontrol", "show", "config"), re.M))
    shapes: dict[str, list[list[str]]] = {}
    for line in ask("sinfo", "--noheader", "-o", "%R|%D|%c|%m|%G|%f").splitlines():
        name, *shape = line.strip().split("|")
        shapes.setdefault(name, []).append(shape)
    partitions = {}
    for line in ask("scontrol", "--oneliner", "show", "partition").splitlines():
        entry = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if entry:
            partitions[entry["PartitionName"]] = _partition(entry, shapes.get(entry["PartitionName"], []))
    enforced, age = config.get("AccountingStorageEnforce", "none"), int(config.get("MinJobAge", "300").split()[0])
    accounting = read(enforced)
    qos = frozenset(name for names in accounting.allowed_qos.values() for name in names) if "qos" in enforced else None
    accounts = frozenset(account for account, _ in accounting.users)
    return Facts(partitions, accounts or None, qos or None, age, accounting)


def _partition(entry: dict[str, str], shapes: list[list[str]]) -> PartitionFacts:
    """entry: fields of `scontrol show partition`. shapes: nodes, CPUs, MB, GRES and features of each kind of node."""
    counts = [gpus(gres) for *_, gres, _ in shapes]
    allowed = entry.get("AllowAccounts", "ALL")
    return PartitionFacts(
        name=entry["PartitionName"],
        up=entry.get("State") == "UP",
        default=entry.get("Default") == "YES",
        max_minutes=minutes(entry.get("MaxTime", "")),
        nodes=sum(int(shape[0]) for shape in shapes),
        cpus=max((int(shape[1].rstrip("+")) for shape in shapes), default=0),
        memory_mb=max((int(shape[2].rstrip("+")) for shape in shapes), default=0),
        gpus={kind: max(found.get(kind, 0) for found in counts) for found in counts for kind in found},
        features=tuple(frozenset(shape[4].split(",")) - {"(null)"} for shape in shapes),
        preempt_mode=entry.get("PreemptMode", "OFF"),
        grace_seconds=int(entry.get("GraceTime", "0")),
        accounts=None if allowed == "ALL" else frozenset(allowed.split(",")),
        qos=entry.get("QoS", "N/A").replace("N/A", ""),
    )


def devices_of(gres_type: str, hardware: dict[str, Hardware]) -> list[str]:
    """Entries of the hardware file that a GRES type may be: `a100` is a100-80gb or a100-40gb, `l40` is not l40s."""
    plain = re.sub(r"[^a-z0-9]", "", gres_type.lower().replace("nvidia", "").replace("tesla", ""))
    names = [name for name, entry in hardware.items() if plain and entry.kind != "cpu"]
    if same := [name for name in names if name.split("-")[0] == plain]:
        return same
    return [name for name in names if re.sub(r"[^a-z0-9]", "", name.lower()).startswith(plain)]


def site_text(facts: Facts, hardware: dict[str, Hardware]) -> str:
    """config/site.yaml for this cluster; every choice that is left to the reader is a comment."""
    lines = [
        "# Written by scripts/cluster.py from what this cluster reports.",
        "# Fields: docs/reference/configuration.md, section `A cluster`.",
    ]
    if facts.accounts:
        first, *others = sorted(facts.accounts, key=lambda name: (name != facts.accounting.default_account, name))
        lines.append(f"account: {first}" + (f"  # or {', '.join(others)}" if others else ""))
    lines.append("partitions:")
    # The longest jobs first.
    up = sorted(
        (found for found in facts.partitions.values() if found.up), key=lambda found: -(found.max_minutes or 10**9)
    )
    if for_cpu := [partition for partition in up if not partition.gpus] or up:
        chosen = facts.default if facts.default in for_cpu else for_cpu[0]
        lines.append(_entry(CPU, chosen, "", for_cpu))
    written: set[str] = set()
    for partition in up:
        for kind in partition.gpus:
            names = devices_of(kind, hardware)
            if not names:
                kind = kind or "(none given)"
                lines.append(f"  # partition {partition.name}: the hardware file has no entry for GPU type {kind}")
            elif names[0] not in written:
                written.add(names[0])
                entry = _entry(names[0], partition, kind, [other for other in up if kind in other.gpus])
                lines.append(entry + (f"  # {kind}: or {', '.join(names[1:])}" if names[1:] else ""))
    lines += [
        "# modules: [apptainer]           # environment modules that each job loads; PyTorch brings its own CUDA",
        "# cache: /scratch/$USER/phi3v    # caches outside the home quota",
        "# scratch: /tmp                  # on the node's own disk: pictures are copied there before training",
        "# offline: true                  # nodes have no network",
    ]
    return "\n".join(lines) + "\n"


def _entry(device: str, partition: PartitionFacts, kind: str, alike: list[PartitionFacts]) -> str:
    """A line of `partitions`; alike: partitions that could stand there."""
    fields = [f"partition: {partition.name}"]
    if device != CPU:
        count = partition.gpus[kind]
        fields += [f"gpus_per_node: {count}", *([f"gpu_type: {kind}"] if kind else [])]
        fields += [f"cpus_per_gpu: {max(1, min(8, partition.cpus // count))}"]
    fields += [f"max_runtime: {partition.max_minutes}"] if partition.max_minutes else []
    others = ", ".join(other.name for other in alike if other != partition)
    return f"  {device}: {{{', '.join(fields)}}}" + (f"  # also: {others}" if others else "")
