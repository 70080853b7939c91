"""Limits of SLURM's accounting: what a user's association and the quality of service allow a job, and all jobs together."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from phi3v.cluster.ask import ClusterError, ask, minutes

# sacctmgr's name of a field for its format option, and the name by which users know it. Those of both first.
_BOTH = {
    "maxwall": "MaxWall", "maxtres": "MaxTRESPerJob", "maxtrespernode": "MaxTRESPerNode", "grptres": "GrpTRES",
    "grpjobs": "GrpJobs", "grpsubmit": "GrpSubmitJobs",
}  # fmt: skip
ASSOCIATION = {**_BOTH, "maxjobs": "MaxJobs", "maxsubmit": "MaxSubmitJobs"}
QOS = {
    **_BOTH, "maxjobspu": "MaxJobsPerUser", "maxsubmitpu": "MaxSubmitJobsPerUser", "maxtrespu": "MaxTRESPerUser",
    "maxtrespa": "MaxTRESPerAccount", "mintres": "MinTRESPerJob",
}  # fmt: skip
JOBS = {
    "MaxJobs": "of yours run", "MaxJobsPerUser": "of yours run", "GrpJobs": "of all its users run",
    "MaxSubmitJobs": "of yours wait or run", "MaxSubmitJobsPerUser": "of yours wait or run",
    "GrpSubmitJobs": "of all its users wait or run",
}  # fmt: skip
"""Limits on the number of jobs, and of which jobs."""


class Limit(NamedTuple):
    """One limit: `QOS long (MaxTRESPerUser): gres/gpu=16`."""

    where: str
    name: str
    tres: str
    """What is counted: cpu, mem (MB), node, gres/gpu …; "" for time (minutes) and jobs."""
    value: int

    def __str__(self) -> str:
        return f"{self.where} ({self.name}: {f'{self.tres}=' if self.tres else ''}{self.value})"


@dataclass(frozen=True)
class Accounting:
    """What one user may read of it; empty where that is nothing."""

    users: dict[tuple[str, str], list[Limit]] = field(default_factory=dict)
    """By account and partition ("": all) of the user's associations."""
    accounts: dict[str, list[Limit]] = field(default_factory=dict)
    """Limits of all users of an account together."""
    qos: dict[str, list[Limit]] = field(default_factory=dict)
    allowed_qos: dict[str, list[str]] = field(default_factory=dict)
    """Quality-of-service names by account, the one of a job that names none first."""
    over_partition: frozenset[str] = frozenset()
    """Quality-of-service names whose limits go before those of a partition's own."""
    default_account: str = ""
    """What SLURM charges if a job names no account."""

    def of(self, account: str, qos: str, partition: str, partition_qos: str) -> list[Limit]:
        """What holds for a job: of each limit, that of the first level that sets it (SLURM's resource_limits page)."""
        account = account or self.default_account
        qos = qos or next(iter(self.allowed_qos.get(account, [])), "")
        own = self.users.get((account, partition)) or self.users.get((account, ""), [])
        levels = [self.qos.get(partition_qos, []), self.qos.get(qos, [])]
        if qos in self.over_partition:
            levels.reverse()
        found: dict[tuple[str, str], Limit] = {}
        for limit in [limit for level in [*levels, own] for limit in level]:
            # Of one meaning: MaxJobs of an association, MaxJobsPerUser of a quality of service.
            found.setdefault((limit.name.removesuffix("PerUser"), limit.tres), limit)
        return [*found.values(), *self.accounts.get(account, [])]


def read(enforced: str) -> Accounting:
    """Query the accounting; enforced: AccountingStorageEnforce."""
    if "associations" not in enforced:
        return Accounting()
    limited, mine = "limits" in enforced, f"user={getpass.getuser()}"
    users, accounts, allowed = {}, {}, {}
    for row in _show("assoc", ["account", "partition", "qos", "defaultqos"], ASSOCIATION, mine):
        users[row["account"], row["partition"]] = list(_limits(f"account {row['account']}", row)) if limited else []
        names = [name for name in row["qos"].split(",") if name]
        default = row["defaultqos"] or (names[0] if len(names) == 1 else "normal")
        allowed[row["account"]] = sorted(names, key=lambda name: (name != default, name))
    names = sorted({account for account, _ in users})
    if names and limited:
        for row in _show("assoc", ["account", "user"], ASSOCIATION, f"account={','.join(names)}"):
            if not row["user"]:
                shared = [limit for limit in _limits(f"account {row['account']}", row) if limit.name.startswith("Grp")]
                accounts[row["account"]] = shared
    rows = _show("qos", ["name", "flags"], QOS) if limited else []
    return Accounting(
        users, accounts, {row["name"]: list(_limits(f"QOS {row['name']}", row)) for row in rows}, allowed,
        frozenset(row["name"] for row in rows if "OverPartQOS" in row["flags"]),
        next((row["defaultaccount"] for row in _show("user", ["defaultaccount"], {}, mine)), ""),
    )  # fmt: skip


def _show(what: str, names: list[str], limits: dict[str, str], *where: str) -> Iterator[dict[str, str]]:
    """Lines of `sacctmgr show`, limits under their full names; none where users may not read them."""
    command = ["sacctmgr", "-nP", "show", what, *where, f"format={','.join([*names, *limits])}"]
    try:
        lines = ask(*command).splitlines()
    except ClusterError:
        return
    for line in lines:
        if line.strip():
            yield dict(zip([*names, *limits.values()], line.strip().split("|"), strict=False))


def _limits(where: str, row: dict[str, str]) -> Iterator[Limit]:
    for name, text in row.items():
        if not text or name[0].islower():
            continue
        if name == "MaxWall":
            allowed = minutes(text)
            yield from [] if allowed is None else [Limit(where, name, "", allowed)]
        elif name in JOBS:
            yield Limit(where, name, "", int(text))
        else:
            yield from (Limit(where, name, tres, amount(value)) for tres, value in _pairs(text))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """`cpu=4,mem=500G` in parts."""
    for part in text.split(","):
        tres, _, value = part.partition("=")
        yield tres, value


def amount(text: str) -> int:
    """A number as SLURM prints it, memory in MB: `2`, `500G`, `1.5T`, `512M`."""
    scale = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}
    return int(float(text[:-1]) * scale[text[-1]]) if text[-1:] in scale else int(float(text))
