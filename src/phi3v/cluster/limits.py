"""Limits of SLURM's accounting: what an association and the quality of service allow a job, and all jobs together."""

from __future__ import annotations

import getpass
from dataclasses import dataclass, field
from typing import NamedTuple

from phi3v.cluster.ask import ClusterError, ask, minutes

# Fields of both first.
_BOTH = ["MaxWall", "MaxTRESPerJob", "MaxTRESPerNode", "GrpTRES", "GrpJobs", "GrpSubmitJobs"]
# Of all jobs together, also those that have ended.
_USED = ["GrpWall", "GrpTRESMins"]
ASSOCIATION = [*_BOTH, "MaxJobs", "MaxSubmitJobs", *_USED]
QOS = [*_BOTH, "MaxJobsPerUser", "MaxSubmitJobsPerUser", "MaxTRESPerUser", "MaxTRESPerAccount", "MinTRESPerJob", *_USED]
JOBS = {
    "MaxJobs": "of your jobs run", "MaxJobsPerUser": "of your jobs run", "GrpJobs": "jobs of all its users run",
    "MaxSubmitJobs": "of your jobs wait or run", "MaxSubmitJobsPerUser": "of your jobs wait or run",
    "GrpSubmitJobs": "jobs of all its users wait or run",
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
    for row in _show("assoc", ["Account", "Partition", "QOS", "DefaultQOS", *ASSOCIATION], mine):
        users[row["Account"], row["Partition"]] = _limits(f"account {row['Account']}", row) if limited else []
        names = [name for name in row["QOS"].split(",") if name]
        default = row["DefaultQOS"] or (names[0] if len(names) == 1 else "normal")
        allowed[row["Account"]] = sorted(names, key=lambda name: (name != default, name))
    names = sorted({account for account, _ in users})
    if names and limited:
        for row in _show("assoc", ["Account", "User", *ASSOCIATION], f"account={','.join(names)}"):
            if not row["User"]:
                shared = [limit for limit in _limits(f"account {row['Account']}", row) if limit.name.startswith("Grp")]
                accounts[row["Account"]] = shared
    rows = _show("qos", ["Name", "Flags", *QOS]) if limited else []
    return Accounting(
        users, accounts, {row["Name"]: _limits(f"QOS {row['Name']}", row) for row in rows}, allowed,
        frozenset(row["Name"] for row in rows if "OverPartQOS" in row["Flags"]),
        next((row["DefaultAccount"] for row in _show("user", ["DefaultAccount"], mine)), ""),
    )  # fmt: skip


def _show(what: str, fields: list[str], *where: str) -> list[dict[str, str]]:
    """Lines of `sacctmgr show` by field; none if users may not read them."""
    try:
        answer = ask("sacctmgr", "-nP", "show", what, *where, f"format={','.join(fields)}")
    except ClusterError:
        return []
    return [dict(zip(fields, line.split("|"), strict=False)) for line in answer.splitlines() if line.strip()]


def _limits(where: str, row: dict[str, str]) -> list[Limit]:
    found = []
    for name, text in row.items():
        if name.endswith("Wall"):
            found += [Limit(where, name, "", limit)] if (limit := minutes(text)) is not None else []
        elif name in JOBS and text:
            found.append(Limit(where, name, "", int(text)))
        elif "TRES" in name and text:
            pairs = [part.partition("=") for part in text.split(",")]
            found += [Limit(where, name, tres, amount(value)) for tres, _, value in pairs]
    return found


def amount(text: str) -> int:
    """A number as SLURM prints it, memory in MB: `2`, `500G`, `1.5T`, `512M`."""
    scale = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}
    return int(float(text[:-1]) * scale[text[-1]]) if text[-1:] in scale else int(float(text))
