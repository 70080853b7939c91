"""MFU and HFU of measured steps: the planner's FLOP count over the device's dense peak. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3v.planning.flops import TrainingFlops, Work, training_flops, utilisation
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import hardware_of_device
from phi3v.settings import FinetuneSettings, Hardware, read_entries

HARDWARE_FILES = ("config/hardware.yaml",)


@dataclass(frozen=True)
class Utilisation:
    """Rates and shares of the peak of a job on `devices` devices."""

    count: Callable[[Work], TrainingFlops]
    devices: int
    peak_tflops: float | None
    """Dense peak of one device in the compute type; None if the device is not in the hardware files."""
    peak_source: str | None = None
    """The hardware entry and where its figure comes from, or that it was measured."""

    def of(self, work: Work, seconds: float) -> dict[str, float | None]:
        """{"tflops", "mfu", "hfu"}: model TFLOP/s of all devices, and shares of the peak (None: unknown)."""
        flops = self.count(work)
        rates: dict[str, float | None] = {"tflops": flops.model / seconds / 1e12, "mfu": None, "hfu": None}
        if self.peak_tflops:
            rates["mfu"] = utilisation(flops.model, seconds, self.peak_tflops, self.devices)
            rates["hfu"] = utilisation(flops.hardware, seconds, self.peak_tflops, self.devices)
        return rates


def utilisation_of(
    settings: FinetuneSettings,
    config: Mapping[str, object],
    device_name: str,
    devices: int,
    files: Sequence[str] = HARDWARE_FILES,
) -> Utilisation:
    """How to count this job. config: the model's; device_name: the driver's name of the device.

    files: hardware files; later ones extend earlier ones, and missing ones are ignored.
    """
    geometry = geometry_from_config(dict(config))
    share = settings.recompute
    assert share is not None, "auto has been replaced by its choice"
    vision_adapters = settings.freeze_vision_model == "no"

    def count(work: Work) -> TrainingFlops:
        return training_flops(
            geometry, work, settings.method, rank=settings.lora_rank, flash=settings.use_flash_attention,
            recompute=share, vision_adapters=vision_adapters,
        )  # fmt: skip

    found = hardware_entry(device_name, files)
    peak = getattr(found[1].peak_tflops, settings.dtype) if found else None
    source = f"{found[0]}: {found[1].source}" if found and peak else None
    return Utilisation(count, devices, peak, source)


def hardware_entry(device_name: str, files: Sequence[str] = HARDWARE_FILES) -> tuple[str, Hardware] | None:
    """(key, entry) of a device by the driver's name; None for a CPU, and if no file has it."""
    present = [file for file in files if Path(file).is_file()]
    if device_name.startswith("CPU") or not present:
        return None
    entries = read_entries(present, Hardware, Path())
    key = hardware_of_device(device_name, entries)
    return None if key is None else (key, entries[key])
