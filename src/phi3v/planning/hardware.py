"""Hardware entries by the names people and drivers use. Nothing is guessed: an unknown device is refused, or None."""

from __future__ import annotations

import itertools
import re

from phi3v.settings import Hardware, SettingsError

HOW_TO_ADD = (
    "add an entry with its datasheet's figures to your own hardware file (fields: config/README.md, Hardware) and name "
    "it in `files.hardware` of your run, or with scripts/plan.py --hardware FILE"
)


# Words in a driver's device name that make it another board than the one without them, with other peaks.
OTHER_BOARDS = {"pcie", "nvl", "ti", "super", "d", "laptop", "mobile", "max", "mig"}


def _plain(name: str) -> str:
    name = re.sub(r"nvidia|geforce|quadro|gb$", "", name.lower().strip())
    return re.sub(r"[^a-z0-9]", "", name)


def find_hardware(name: str, entries: dict[str, Hardware]) -> str:
    """Key of the entry that a person means by `name` ("V100-32GB", "rtx 4090"); raises SettingsError otherwise.

    Spelling is free as to case, spaces and makers' names. The part before the memory is enough ("T4", "V100") where it
    fits one entry alone; one that fits several is refused with their names. A beginning of a word is another board's
    name (L40 and L40S, H20 and H200, MI300A and MI300X): refused with what may be meant. A driver's name is taken too ("NVIDIA A100-SXM4-80GB", from nvidia-smi).
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
    one); the entry that says most wins. A word more can be another board (H100 PCIe, RTX 3090 Ti, RTX 4090 D): then none fits.
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
