"""A first site file from what the cluster says."""

from __future__ import annotations

import re

from phi3v.cluster.facts import Facts, PartitionFacts
from phi3v.settings import CPU, Hardware


def devices_of(gres_type: str, hardware: dict[str, Hardware]) -> list[str]:
    """Entries of the hardware file that a GRES type may be: `a100` is a100-80gb or a100-40gb, `l40` is not l40s."""
    plain = re.sub(r"[^a-z0-9]", "", gres_type.lower().replace("nvidia", "").replace("tesla", ""))
    gpus = [name for name, entry in hardware.items() if plain and entry.kind != "cpu"]
    if of_that_name := [name for name in gpus if name.split("-")[0] == plain]:
        return of_that_name
    return [name for name in gpus if re.sub(r"[^a-z0-9]", "", name.lower()).startswith(plain)]


def site_text(facts: Facts, hardware: dict[str, Hardware]) -> str:
    """config/site.yaml with every choice that is the reader's as a comment."""
    lines = ["# Written by scripts/cluster.py from what this cluster says; fields: config/README.md, a cluster."]
    if facts.accounts:
        accounts = sorted(facts.accounts)
        lines.append(f"account: {accounts[0]}" + (f"  # or {', '.join(accounts[1:])}" if accounts[1:] else ""))
    lines.append("partitions:")
    open_partitions = [partition for partition in facts.partitions.values() if partition.up]
    for_cpu = [partition for partition in open_partitions if not partition.gpus] or open_partitions
    if for_cpu:
        preferred = facts.default if facts.default in for_cpu else max(for_cpu, key=_longest)
        lines.append(_line(CPU, preferred, "", [partition for partition in for_cpu if partition != preferred]))
    written: set[str] = set()
    for partition in sorted((found for found in open_partitions if found.gpus), key=_longest, reverse=True):
        for kind in partition.gpus:
            names = devices_of(kind, hardware)
            if not names:
                lines.append(
                    f"  # partition {partition.name}: GPU type {kind or '(none given)'} is no entry of the hardware file"
                )
            elif names[0] not in written:
                others = [other for other in open_partitions if kind in other.gpus and other != partition]
                written.add(names[0])
                lines.append(
                    _line(names[0], partition, kind, others)
                    + (f"  # {kind}: or {', '.join(names[1:])}" if names[1:] else "")
                )
    lines += [
        "# modules: [apptainer]           # environment modules that each job loads; PyTorch brings its own CUDA",
        "# cache: /scratch/$USER/phi3v    # off the home quota",
        "# scratch: /tmp                  # on the machine's own disk: pictures are copied there before training",
        "# offline: true                  # machines have no network",
    ]
    return "\n".join(lines) + "\n"


def _longest(partition: PartitionFacts) -> int:
    return partition.max_minutes or 10**9


def _line(device: str, partition: PartitionFacts, kind: str, others: list[PartitionFacts]) -> str:
    fields = [f"partition: {partition.name}"]
    if device != CPU:
        fields.append(f"gpus_per_node: {partition.gpus[kind]}")
        fields += [f"gpu_type: {kind}"] if kind else []
        fields += [f"cpus_per_gpu: {max(1, min(8, partition.cpus // partition.gpus[kind]))}"]
    fields += [f"max_runtime: {partition.max_minutes}"] if partition.max_minutes else []
    also = f"  # also: {', '.join(other.name for other in others)}" if others else ""
    return f"  {device}: {{{', '.join(fields)}}}{also}"
