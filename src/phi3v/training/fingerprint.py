"""What a speed was measured on: devices, power limit, links, driver, libraries, commit, container, data.

Every figure of a speed table is only as good as this list; what cannot be found out is null, never guessed.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v.manifest import commit, container, versions
from phi3v.model.runtime import nvidia_smi
from phi3v.training.observe import device_name

# Where the kernel lists InfiniBand ports; a test points it elsewhere.
INFINIBAND = Path("/sys/class/infiniband")


def fingerprint(device: torch.device, data_dir: Path) -> dict[str, Any]:
    """The machines and the software of this job, from all processes; a collective call. Never raises."""
    own = {"host": platform.node(), "device": device_name(device), **gpu_facts(device)}
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    return {
        "devices": dict(Counter(item["device"] for item in everyone)),
        "machines": len({item["host"] for item in everyone}),
        "power_limit_w": _one_or_all(item["power_limit_w"] for item in everyone),
        "driver": _one_or_all(item["driver"] for item in everyone),
        "interconnect": interconnect() if device.type == "cuda" and not torch.version.hip else None,
        "network": network(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))
        if device.type == "cuda" and dist.is_nccl_available()
        else None,
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **commit(),
        "container": container(),
        "dataset": dataset_revision(data_dir),
    }


def _one_or_all(values: Any) -> Any:
    """The value that all processes agree on, else the sorted list of those seen."""
    seen = set(values)
    return seen.pop() if len(seen) == 1 else sorted(seen, key=str)


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """{"power_limit_w", "driver"} of this process's GPU as nvidia-smi says; None on CPUs, AMD's GPUs, without nvidia-smi."""
    facts: dict[str, Any] = {"power_limit_w": None, "driver": None}
    # ROCm's devices are `cuda` to PyTorch, and nvidia-smi, where it is there, speaks of others.
    if device.type != "cuda" or torch.version.hip:
        return facts
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    said = nvidia_smi("-i", uuid, "--query-gpu=power.limit,driver_version", "--format=csv,noheader,nounits")
    if said:
        power, driver = (word.strip() for word in said.splitlines()[0].split(","))
        facts["driver"] = driver
        if re.fullmatch(r"[0-9.]+", power):
            facts["power_limit_w"] = float(power)
    return facts


def interconnect() -> str | None:
    """Links between the GPUs of this machine, as `nvidia-smi topo -m` names them: NV12, PIX, SYS …; None: one GPU."""
    said = nvidia_smi("topo", "-m")
    # nvidia-smi underlines the heading with terminal codes.
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", said or "").splitlines()]
    rows = [words[1:] for words in lines if words and re.fullmatch(r"GPU\d+", words[0]) and "X" in words]
    links = {link for words in rows for link in words[: len(rows)]} - {"X"}
    return ", ".join(sorted(links)) or None


def network() -> str | None:
    """InfiniBand ports of this machine and their rates, "8 x 200 Gb/sec (4X HDR)"; None where there are none."""
    rates = [path.read_text(encoding="utf-8").strip() for path in sorted(INFINIBAND.glob("*/ports/*/rate"))]
    return ", ".join(f"{count} x {rate}" for rate, count in sorted(Counter(rates).items())) or None


def dataset_revision(data_dir: Path) -> dict[str, Any] | None:
    """{split: {"url", "revision", "sha256"}} of the sources that a data folder was converted from; None: not known."""
    try:
        source = json.loads((data_dir / "dataset.json").read_text(encoding="utf-8"))["source"]
        return {split: {name: of[name] for name in ("url", "revision", "sha256")} for split, of in source.items()}
    except (OSError, ValueError, KeyError):
        return None
