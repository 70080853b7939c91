"""Devices: finds hardware entries by the names that users and drivers give, and computes MFU and HFU. No torch.

An unknown device raises an error or has no utilisation. Nothing is guessed.
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
    "add an entry with the figures of its datasheet to a hardware file of your own (fields: "
    "docs/reference/configuration.md, Hardware), and name the file in `files.hardware` of your run, or with scripts/plan.py --hardware FILE"
)
# Words in a driver's device name that mark a different board with other peaks.
OTHER_BOARDS = {"pcie", "nvl", "ti", "super", "d", "laptop", "mobile", "max", "mig"}


def _plain(name: str) -> str:
    name = re.sub(r"nvidia|geforce|quadro|gb$", "", name.lower().strip())
    return re.sub(r"[^a-z0-9]", "", name)


def find_hardware(name: str, entries: dict[str, Hardware]) -> str:
    """Key of the entry that a user means by `name` ("V100-32GB", "rtx 4090"). Raises SettingsError if there is none.

    Ignores case, spaces and makers' names. The part before the memory is sufficient ("T4", "V100") if only one entry
    has it; otherwise the error lists the candidates. The beginning of a word may be another board (L40 and L40S, H20
    and H200, MI300A and MI300X), so it is an error that lists similar names. A driver's name works too ("NVIDIA
    A100-SXM4-80GB", from nvidia-smi).
    """
    wanted = _plain(name)
    exact = [key for key in entries if _plain(key) == wanted]
    if exact:
        return exact[0]
    starting = [key for key in entries if wanted and _plain(key.split("-")[0]) == wanted]
    if len(starting) == 1:
        return starting[0]
    if starting:
        raise SettingsError(f"GPU {name!r}: matches several entries; expected one of {', '.join(starting)}")
    if device := hardware_of_device(name, entries):
        return device
    close = [key for key in entries if wanted and wanted in _plain(key)]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise SettingsError(f"GPU {name!r}: unknown{meant}; expected one of {', '.join(sorted(entries))}; or {HOW_TO_ADD}")


def hardware_of_device(device_name: str, entries: dict[str, Hardware]) -> str | None:
    """Key of the entry for a driver's device name ("NVIDIA A100-SXM4-80GB", "Tesla T4"), or None if none matches.

    All parts of the entry's name must be words of the device name (or two or three joined words). The longest such
    entry is used. An additional word can mark another board (H100 PCIe, RTX 3090 Ti, RTX 4090 D); then no entry
    matches.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    pairs = [first + second for first, second in itertools.pairwise(words)]
    joined = {*words, *pairs, *(pair + third for pair, third in zip(pairs, words[2:], strict=False))}
    fitting = []
    for key, entry in entries.items():
        parts = re.findall(r"[a-z0-9]+", key.lower())
        other_board = OTHER_BOARDS & set(words) - set(parts)
        if entry.kind != "cpu" and all(part in joined for part in parts) and not other_board:
            fitting.append((sum(map(len, parts)), key))
    return max(fitting)[1] if fitting else None


def hardware_entry(device_name: str, files: Sequence[str] = HARDWARE_FILES) -> tuple[str, Hardware] | None:
    """(key, entry) of a device by the driver's name. None for a CPU, or if no file has an entry."""
    present = [file for file in files if Path(file).is_file()]
    if device_name.startswith("CPU") or not present:
        return None
    entries = read_entries(present, Hardware, Path())
    key = hardware_of_device(device_name, entries)
    return None if key is None else (key, entries[key])


@dataclass(frozen=True)
class Utilisation:
    """Computes the FLOP rate and utilisation of a job on `devices` devices."""

    count: Callable[[Work], TrainingFlops]
    devices: int
    peak_tflops: float | None
    """Dense peak per device in the compute dtype. None if the device is not in the hardware files."""
    peak_source: str | None = None
    """The hardware entry and its source, or a note that the peak was measured."""

    def of(self, work: Work, seconds: float) -> dict[str, float | None]:
        """{"tflops", "mfu", "hfu"}: model TFLOP/s over all devices, and shares of the peak (None: unknown)."""
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
    """Utilisation of a job. config: values of the model's config.json. device_name: name of the device from the driver.

    files: hardware files. Later files extend earlier ones; missing files are ignored.
    """
    assert settings.recompute is not None, "replace auto by its choice first"
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
