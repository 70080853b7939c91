"""Devices: hardware entries by the names people and drivers use, and MFU and HFU over their peaks. No torch.

Nothing is guessed: an unknown device is refused, or has no utilisation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phi3v.planning.flops import TrainingFlops, Work, training_flops, utilisation
from phi3v.planning.geometry import geometry_from_config
from phi3v.settings import FinetuneSettings, Hardware, SettingsError, read_entries

HARDWARE_FILES = ("config/hardware.yaml",)
HOW_TO_ADD = (
    "add an entry with its datasheet's figures to your own hardware file (fields: docs/reference/configuration.md, "
    "Hardware) and name it in `files.hardware` of your run, or with scripts/plan.py --hardware FILE"
)
# Words in a driver's device name that make it another board than the one without them, with other peaks.
OTHER_BOARDS = {"pcie", "nvl", "ti", "super", "d", "laptop", "mobile", "max", "mig"}


def _plain(name: str) -> str:
    name = re.sub(r"nvidia|geforce|quadro|gb$", "", name.lower().strip())
    return re.sub(r"[^a-z0-9]", "", name)


def find_hardware(name: str, entries: dict[str, Hardware]) -> str:
    """Key of the entry that a person means by `name` ("V100-32GB", "rtx 4090"); raises SettingsError otherwise.

    Case, spaces and makers' names do not matter. The part before the memory is enough ("T4", "V100") if it fits one
    entry alone; one that fits several is refused with their names. The beginning of a word is another board's name (L40
    and L40S, H20 and H200, MI300A and MI300X): it is refused with what may be meant. A driver's name works too
    ("NVIDIA A100-SXM4-80GB", from nvidia-smi).
    """
    wanted = _plain(name)
    exact = [key for key in entries if _plain(key) == wanted]
    if exact:
        return exact[0]
    starting = [key for key in entries if wanted and _plain(key.split("-")[0]) == wanted]
    if len(starting) == 1:
        return starting[0]
    if starting:
        raise SettingsError(f"GPU {name!r}: fits {', '.join(starting)}; expected one of them")
    if device := hardware_of_device(name, entries):
        return device
    close = [key for key in entries if wanted and wanted in _plain(key)]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise SettingsError(f"GPU {name!r}: unknown{meant}; expected one of {', '.join(sorted(entries))}; or {HOW_TO_ADD}")


def hardware_of_device(device_name: str, entries: dict[str, Hardware]) -> str | None:
    """Key of the entry for a driver's device name ("NVIDIA A100-SXM4-80GB", "Tesla T4"), or None if none fits.

    Every part of the entry's name must stand in the device's name as a word of its own (or two or three words in
    one); the longest such entry wins. A further word can mean another board (H100 PCIe, RTX 3090 Ti, RTX 4090 D): then
    none fits.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    pairs = [first + second for first, second in itertools.pairwise(words)]
    known = {*words, *pairs, *(pair + third for pair, third in zip(pairs, words[2:], strict=False))}
    fitting = []
    for key, entry in entries.items():
        parts = re.findall(r"[a-z0-9]+", key.lower())
        other_board = OTHER_BOARDS & set(words) - set(parts)
        if entry.kind != "cpu" and all(part in known for part in parts) and not other_board:
            fitting.append((sum(map(len, parts)), key))
    return max(fitting)[1] if fitting else None


def hardware_entry(device_name: str, files: Sequence[str] = HARDWARE_FILES) -> tuple[str, Hardware] | None:
    """(key, entry) of a device by the driver's name; None for a CPU, and if no file has it."""
    present = [file for file in files if Path(file).is_file()]
    if device_name.startswith("CPU") or not present:
        return None
    entries = read_entries(present, Hardware, Path())
    key = hardware_of_device(device_name, entries)
    return None if key is None else (key, entries[key])


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
    assert settings.recompute is not None, "auto has been replaced by its choice"
    count = partial(
        training_flops,
        geometry_from_config(config),
        method=settings.method,
        rank=settings.lora_rank,
        flash=settings.flash_attention,
        recompute=settings.recompute,
        frozen=settings.frozen_groups,
        targets=settings.lora_targets,
    )
    found = hardware_entry(device_name, files)
    peak = getattr(found[1].peak_tflops, settings.dtype) if found else None
    source = f"{found[0]}: {found[1].source}" if found and peak else None
    return Utilisation(count, devices, peak, source)
