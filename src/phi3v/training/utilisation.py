"""MFU and HFU of training steps: the planner's FLOP count over this device's dense peak.

A CPU has no datasheet peak: a speed measurement takes the rate of large products on the spot and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v.model.runtime import TORCH_DTYPE
from phi3v.planning.flops import TrainingFlops, Work, training_flops, utilisation
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import hardware_of_device
from phi3v.settings import FinetuneSettings, Hardware, read_entries

HARDWARE_FILES = ("config/hardware.yaml",)
# Large enough that a core's rate no longer grows, small enough for 20 ms.
PRODUCT_SIZE, PRODUCTS = 1024, 8


@dataclass(frozen=True)
class Utilisation:
    """What a step's work and time come to on `devices` devices."""

    count: Callable[[Work], TrainingFlops]
    devices: int
    peak_tflops: float | None
    """Dense peak of one device in the compute type; None where the device is not in the hardware files."""
    peak_source: str | None = None
    """The hardware entry and where its figure comes from, or that it was measured."""

    def of(self, work: Work, seconds: float) -> dict[str, float | None]:
        """{"tflops", "mfu", "hfu"}: model TFLOP/s of all devices together, and shares of the peak (None: unknown)."""
        flops = self.count(work)
        rates: dict[str, float | None] = {"tflops": flops.model / seconds / 1e12, "mfu": None, "hfu": None}
        if self.peak_tflops:
            rates["mfu"] = utilisation(flops.model, seconds, self.peak_tflops, self.devices)
            rates["hfu"] = utilisation(flops.hardware, seconds, self.peak_tflops, self.devices)
        return rates


def utilisation_of(
    settings: FinetuneSettings, config: dict[str, Any], device_name: str, devices: int,
    files: Sequence[str] = HARDWARE_FILES,
) -> Utilisation:  # fmt: skip
    """How to count this job. config: the model's; device_name: as the driver says, "CPU …" has no peak of its own.

    files: hardware files, later ones add to earlier ones; one that is not there is passed over.
    """
    geometry = geometry_from_config(config)
    share = settings.recompute
    assert share is not None, "what auto chose stands in the settings by now"
    vision_adapters = settings.freeze_vision_model == "no"

    def count(work: Work) -> TrainingFlops:
        return training_flops(
            geometry, work, settings.method, rank=settings.lora_rank, flash=settings.use_flash_attention,
            recompute=share, vision_adapters=vision_adapters,
        )  # fmt: skip

    return Utilisation(count, devices, *_peak(settings, device_name, files))


def _peak(settings: FinetuneSettings, device_name: str, files: Sequence[str]) -> tuple[float | None, str | None]:
    found = hardware_entry(device_name, files)
    if found is None:
        return None, None
    key, entry = found
    peak = getattr(entry.peak_tflops, settings.dtype)
    return (peak, f"{key}: {entry.source}") if peak else (None, None)


def hardware_entry(device_name: str, files: Sequence[str]) -> tuple[str, Hardware] | None:
    """(key, entry) of a device, by its name; None for a CPU, and if no file knows it."""
    there = [file for file in files if Path(file).is_file()]
    if device_name.startswith("CPU") or not there:
        return None
    entries = read_entries(there, Hardware, Path())
    key = hardware_of_device(device_name, entries)
    return None if key is None else (key, entries[key])


def measured_peak(dtype: str) -> tuple[float, str]:
    """(TFLOP/s of one process, how it was measured): large products on the CPU, every process at once; collective.

    A speed measurement calls it before and after and takes the larger.

    dtype: bf16, fp16 or fp32. The fastest of several, so that a neighbour's work does not pass for a low peak; the
    mean over the processes.
    """
    kind = TORCH_DTYPE[dtype]
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(kind) for _ in range(2))
    if dist.is_initialized():
        dist.barrier()
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    rate = torch.tensor([2 * PRODUCT_SIZE**3 / min(seconds) / 1e12], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(rate)
        rate /= dist.get_world_size()
    threads = torch.get_num_threads()
    how = (
        f"measured: {dtype} products of {PRODUCT_SIZE} x {PRODUCT_SIZE} on this CPU, {threads} "
        f"thread{'s' if threads > 1 else ''} a process, the fastest of {PRODUCTS} before and after the timing"
    )
    return float(rate), how
