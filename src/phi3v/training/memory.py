"""Device memory: free and peak memory, and an explained out-of-memory error."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from phi3v.model.runtime import device_name
from phi3v.planning.memory import GB
from phi3v.settings import FinetuneSettings

# Usable share of the free memory. The rest is for fragmentation and for other jobs of the machine.
SHARE = 0.95
# Mount point of control groups on Linux, and the file with a process's own group. Tests replace them.
GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class OutOfMemoryError(RuntimeError):
    """The device has too little memory."""


def capacity_bytes(device: torch.device, limit_gb: float | None) -> float:
    """Bytes that this process may use in total, including those it already uses. limit_gb: a limit in 10^9 bytes.

    On a CPU, the processes of a machine share its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        available = SHARE * (free + torch.cuda.memory_reserved(device))
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = SHARE * (free_ram() / processes + held_bytes(device))
    return available if limit_gb is None else min(available, limit_gb * GB)


def held_bytes(device: torch.device) -> float:
    """Bytes in use by this process: reserved on a CUDA device, resident on a CPU."""
    give_back(device)
    return float(torch.cuda.memory_reserved(device)) if device.type == "cuda" else _proc("self/status", "VmRSS")


def give_back(device: torch.device) -> None:
    """Releases memory that an allocator caches, so that it does not count as used."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_ram() -> float:
    """Free bytes of the machine, or of this process's control group if it has less."""
    free = _proc("meminfo", "MemAvailable")
    # This process's control group and its parents (version 2). A SLURM job with --mem has one.
    lines = OWN_GROUP.read_text().splitlines() if OWN_GROUP.is_file() else []
    own = next((line for line in lines if line.startswith("0::/")), "0::/")
    innermost = GROUPS / own.removeprefix("0::/")
    for group in (innermost, *innermost.parents):
        with contextlib.suppress(OSError, ValueError):
            limit = float((group / "memory.max").read_text())  # "max" means no limit
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # The kernel frees cached file pages before it runs out of memory.
            dropped = float(stat["inactive_file"]) + float(stat["active_file"])
            free = min(free, limit - float((group / "memory.current").read_text()) + dropped)
    return free


def _proc(file: str, name: str) -> float:
    """A size from /proc/meminfo or /proc/self/status, bytes."""
    lines = Path("/proc", file).read_text(encoding="ascii", errors="replace").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[list[float]]:
    """Measures the peak memory inside the block, in bytes. The list has one value after the block.

    Raises OSError if the system cannot reset a process's peak (CPU without Linux).
    """
    result: list[float] = []
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    yield result
    result.append(
        float(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else _proc("self/status", "VmHWM")
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


MEMORY_SOURCES = {
    "cuda": (
        "peak: torch.cuda.max_memory_allocated; reserved: torch.cuda.max_memory_reserved; context: memory in use on "
        "the "
        "device beyond PyTorch's reserve (torch.cuda.mem_get_info), including other processes"
    ),
    "cpu": "peak: largest resident set (getrusage)",
}
"""Origin of the figures in observed.json and speed.json, by kind of device."""


def context_bytes(device: torch.device) -> int:
    """Memory in use on a CUDA device beyond PyTorch's reserve: context, kernels, NCCL, and other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


@contextlib.contextmanager
def explain_memory(
    settings: FinetuneSettings, device: torch.device, culprit: Callable[[], str] = str
) -> Iterator[None]:
    """Converts out of memory to one message with the numbers and the three most effective settings.

    settings: as the user set them, including `auto`, so that the advice does not contradict them. culprit: returns a
    sentence about the current examples, or "".
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        numbers = str(error).split(". ")[0]
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            numbers = (
                f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB allocated at the peak, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free ({numbers})"
            )
        advice = "; ".join(_what_helps(settings)[:3])
        raise OutOfMemoryError(
            f"out of memory on {device_name(device)}: {numbers}. {culprit()}Try first: {advice}"
        ) from error


def _what_helps(settings: FinetuneSettings) -> list[str]:
    """Settings that this job can still change, the largest savings first."""
    full, fixed = settings.method in ("full", "frozen"), not settings.is_probed
    size, crops = settings.micro_batch_size, settings.num_crops or "the data folder's"
    ways = [
        (f"--batch_size_per_gpu 1 (now {size}; the global batch size stays the same)", size not in (1, "auto")),
        ("--gradient_checkpointing (now off)", not settings.gradient_checkpointing),
        (f"--recompute_every 1 (now {settings.recompute_every})", settings.recompute_every > 1),
        ("--use_flash_attention (now off)", not settings.flash_attention),
        ("--optimizer adamw_8bit (now adamw)", full and settings.optimizer == "adamw"),
        ("--optimizer adamw_offload", full and fixed and settings.optimizer != "adamw_offload"),
        ("--use_lora (now full fine-tuning)", full),
        ("--use_qlora (now LoRA on 16-bit weights)", settings.method == "lora"),
        (
            "--zero_stage 3 on several GPUs",
            full and fixed and settings.optimizer == "adamw" and settings.zero_stage < 3,
        ),
        (f"--num_crops 4 (now {crops})", settings.num_crops != 4),
        ("--freeze_vision_model", settings.freeze_vision_model == "no"),
    ]
    return [text for text, helps in ways if helps]
