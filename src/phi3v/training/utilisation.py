"""MFU and HFU of training steps: the planner's FLOP count over this device's dense peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.planning.flops import TrainingFlops, Work, training_flops, utilisation
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import hardware_of_device
from phi3v.settings import FinetuneSettings, Hardware, read_entries

HARDWARE_FILE = Path("config/hardware.yaml")


@dataclass(frozen=True)
class Utilisation:
    """What a step's work and time come to on `devices` devices."""

    count: Callable[[Work], TrainingFlops]
    devices: int
    peak_tflops: float | None
    """Dense peak of one device in the compute type; None where the device is not in config/hardware.yaml."""

    def of(self, work: Work, seconds: float) -> dict[str, float | None]:
        """{"tflops", "mfu", "hfu"}: model TFLOP/s of all devices together, and shares of the peak (None: unknown)."""
        flops = self.count(work)
        rates: dict[str, float | None] = {"tflops": flops.model / seconds / 1e12, "mfu": None, "hfu": None}
        if self.peak_tflops:
            rates["mfu"] = utilisation(flops.model, seconds, self.peak_tflops, self.devices)
            rates["hfu"] = utilisation(flops.hardware, seconds, self.peak_tflops, self.devices)
        return rates


def utilisation_of(settings: FinetuneSettings, config: dict[str, Any], device_name: str, devices: int) -> Utilisation:
    """How to count this job. config: the model's; device_name: as the driver says, "CPU …" has no peak of its own."""
    geometry = geometry_from_config(config)
    vision_adapters = settings.freeze_vision_model == "no"

    def count(work: Work) -> TrainingFlops:
        return training_flops(
            geometry, work, settings.method, rank=settings.lora_rank, flash=settings.use_flash_attention,
            checkpointing="non_reentrant" if settings.gradient_checkpointing else "none",
            vision_adapters=vision_adapters,
        )  # fmt: skip

    return Utilisation(count, devices, _peak(settings, device_name))


def _peak(settings: FinetuneSettings, device_name: str) -> float | None:
    if device_name.startswith("CPU") or not HARDWARE_FILE.is_file():
        return None
    entries = read_entries([str(HARDWARE_FILE)], Hardware, Path())
    key = hardware_of_device(device_name, entries)
    return getattr(entries[key].peak_tflops, settings.dtype) if key else None
