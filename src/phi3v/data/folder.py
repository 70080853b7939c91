"""A data folder: its description, the file of each split, and the lines of a file by number. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.conversations import MAX_LINE_BYTES, DataError


class LineIndex:
    """Lines of a file by number; holds their byte offsets only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        ends: list[np.ndarray] = []
        size = 0
        with open(self.path, "rb") as file:
            while block := file.read(1 << 24):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (size + 1))
                size += len(block)
        edges = np.concatenate([np.zeros(1, np.int64), *ends])
        self.offsets = edges if edges[-1] == size else np.append(edges, size)
        """[lines + 1] where each line starts, and the file's end."""
        self._handle: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        if stop - start > MAX_LINE_BYTES:
            raise DataError(
                f"{self.path}:{index + 1}: {stop - start} bytes; expected a line of at most {MAX_LINE_BYTES}"
            )
        # A handle a process: forked workers must not share one, and a position is given with each read anyway.
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), os.open(self.path, os.O_RDONLY))
        line = os.pread(self._handle[1], stop - start, start)
        if len(line) != stop - start:
            raise DataError(f"{self.path}:{index + 1}: the file became shorter while it was in use")
        return line

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and handle[0] == os.getpid():
            os.close(handle[1])


def describe(data_dir: str | Path) -> dict[str, Any]:
    """dataset.json of a data folder; {} for a folder made by hand. Raises DataError when it is not what the converter
    writes."""
    path = Path(data_dir) / "dataset.json"
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for name, split in value["splits"].items():
            if not isinstance(name, str) or not isinstance(split["file"], str) or "/" in split["file"]:
                raise ValueError(f"split {name!r}")
        return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a dataset description ({error}); expected what scripts/convert.py writes"
        ) from None


def split_file(data_dir: str | Path, split: str) -> Path:
    """The jsonl of a split: as dataset.json says, else SPLIT.jsonl or *_SPLIT.jsonl. Raises DataError."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected one with images/ and {split}.jsonl")
    entry = describe(data_dir).get("splits", {}).get(split)
    if entry:
        found = [data_dir / entry["file"]]
    else:
        found = [path for path in [data_dir / f"{split}.jsonl"] if path.is_file()] or sorted(
            data_dir.glob(f"*_{split}.jsonl")
        )
    if len(found) != 1 or not found[0].is_file():
        there = ", ".join(sorted(path.name for path in data_dir.glob("*.jsonl"))) or "no jsonl"
        raise DataError(f"{data_dir}: split {split!r}: expected one {split}.jsonl or *_{split}.jsonl; there: {there}")
    return found[0]
