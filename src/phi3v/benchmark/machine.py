"""Records the machine of a speed measurement: devices, power limit, links, driver, libraries, commit, container, data.

Unknown values are null. Nothing is guessed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v.model.runtime import TORCH_DTYPE, compute_device, device_name, nvidia_smi
from phi3v.planning.hardware import hardware_of_device
from phi3v.provenance.manifest import commit, container, versions
from phi3v.settings import Hardware, SettingsError, SpeedSettings, read_entries
from phi3v.training.launch import of_all, world_size

# Where the kernel lists InfiniBand ports; a test points it elsewhere.
INFINIBAND = Path("/sys/class/infiniband")
# Large enough that a core's rate no longer grows, small enough for 20 ms.
PRODUCT_SIZE, PRODUCTS = 1024, 8


def fingerprint(device: torch.device, data_dir: Path) -> dict[str, Any]:
    """The machines and the software of this job, from all processes. A collective call. Never raises."""
    own = {"host": platform.node(), "device": device_name(device), **gpu_facts(device)}
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    cuda = device.type == "cuda"
    return {
        "devices": dict(Counter(item["device"] for item in everyone)),
        "machines": len({item["host"] for item in everyone}),
        "power_limit_w": _one_or_all(item["power_limit_w"] for item in everyone),
        "driver": _one_or_all(item["driver"] for item in everyone),
        "interconnect": interconnect() if cuda and not torch.version.hip else None,
        "network": network(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **commit(),
        "container": container(),
        "dataset": dataset_revision(data_dir),
    }


def _one_or_all(values: Iterable[object]) -> object:
    """The common value of all processes, or the sorted list of different values."""
    seen = set(values)
    return seen.pop() if len(seen) == 1 else sorted(seen, key=str)


def gpu_facts(device: torch.device) -> dict[str, float | str | None]:
    """{"power_limit_w", "driver"} of this process's GPU by nvidia-smi. None on CPUs, AMD GPUs and without
    nvidia-smi."""
    facts: dict[str, float | str | None] = {"power_limit_w": None, "driver": None}
    # ROCm's devices are `cuda` to PyTorch, and an nvidia-smi beside them reports other devices.
    if device.type != "cuda" or torch.version.hip:
        return facts
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    answer = nvidia_smi("-i", uuid, "--query-gpu=power.limit,driver_version", "--format=csv,noheader,nounits")
    if answer:
        power, driver = (word.strip() for word in answer.splitlines()[0].split(","))
        facts["driver"] = driver
        if re.fullmatch(r"[0-9.]+", power):
            facts["power_limit_w"] = float(power)
    return facts


def interconnect() -> str | None:
    """Links between the GPUs of this machine, by `nvidia-smi topo -m`: NV12, PIX, SYS … None with one GPU."""
    # nvidia-smi underlines the heading with terminal codes.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", nvidia_smi("topo", "-m") or "")
    lines = [line.split() for line in plain.splitlines()]
    rows = [words[1:] for words in lines if words and re.fullmatch(r"GPU\d+", words[0]) and "X" in words]
    links = {link for words in rows for link in words[: len(rows)]} - {"X"}
    return ", ".join(sorted(links)) or None


def network() -> str | None:
    """InfiniBand ports of this machine and their rates, such as "8 x 200 Gb/sec (4X HDR)". None without InfiniBand."""
    rates = [path.read_text(encoding="utf-8").strip() for path in sorted(INFINIBAND.glob("*/ports/*/rate"))]
    return ", ".join(f"{count} x {rate}" for rate, count in sorted(Counter(rates).items())) or None


def dataset_revision(data_dir: Path) -> dict[str, Any] | None:
    """{split: {"url", "revision", "sha256"}} of the sources of a data folder. None if unknown."""
    try:
        source = json.loads((data_dir / "dataset.json").read_text(encoding="utf-8"))["source"]
        return {split: {name: of[name] for name in ("url", "revision", "sha256")} for split, of in source.items()}
    except (OSError, ValueError, KeyError):
        return None


def found_devices(settings: SpeedSettings) -> list[str]:
    """Names of the CUDA devices that this process may use. Raises SettingsError, see compute_device."""
    if compute_device(settings).type == "cpu":
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def check_devices(settings: SpeedSettings, found: list[str]) -> None:
    """Raises SettingsError that describes this machine if it is not the row's. --stand_in allows any machine.

    found: names of this machine's devices (found_devices). Checks the number of processes, that each process of this
    machine has a device, and that each device matches the hardware entry `expect_hardware`.
    """
    processes, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    seen = ", ".join(f"{count} x {name}" for name, count in Counter(found).items()) or "no CUDA device"
    row = f"row {settings.row or '(unnamed)'}"
    if found and local > len(found):
        raise SettingsError(
            f"{row}: got {local} processes on this machine, which has {seen}; expected one process per device"
        )
    missing = []
    if settings.expect_processes and processes != settings.expect_processes:
        missing.append(f"field `expect_processes`: got {processes} processes; expected {settings.expect_processes}")
    if settings.expect_hardware:
        entries = read_entries(settings.hardware, Hardware, Path())
        if settings.expect_hardware not in entries:
            raise SettingsError(
                f"{row}: field `expect_hardware`: got {settings.expect_hardware!r}: expected one of "
                f"{', '.join(sorted(entries))}"
            )
        entry = entries[settings.expect_hardware]
        kinds = {hardware_of_device(name, entries) for name in found} or {None}
        if entry.kind != "cpu" and kinds != {settings.expect_hardware}:
            missing.append(f"field `expect_hardware`: expected {entry.title}")
    if missing and not settings.stand_in:
        raise SettingsError(
            f"{row}: {'; '.join(missing)}; this machine has {seen}; to measure here anyway and label the result, add "
            "--stand_in"
        )


def measured_peak(dtype: str) -> tuple[float, str]:
    """(TFLOP/s of one process, how it was measured): large products on the CPU, every process at once; collective.

    dtype: bf16, fp16 or fp32. The rate is the fastest of several products, because other programs slow some of them
    down, and the mean over the processes.
    """
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(TORCH_DTYPE[dtype]) for _ in range(2))
    if dist.is_initialized():
        dist.barrier()
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    rate = of_all(2 * PRODUCT_SIZE**3 / min(seconds) / 1e12, "SUM", torch.device("cpu")) / world_size()
    threads = torch.get_num_threads()
    return rate, (
        f"measured: {dtype} products of {PRODUCT_SIZE} x {PRODUCT_SIZE} on this CPU, {threads} "
        f"thread{'s' if threads > 1 else ''} a process, the fastest of {PRODUCTS} before and after the timing"
    )
