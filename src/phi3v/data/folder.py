"""A data folder: its description, the lines of each split, and its pictures under images/. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TextIO, TypedDict

import numpy as np
from PIL import Image

from phi3v.data.conversations import MAX_LINE_BYTES, DataError
from phi3v.data.pictures import displayed_size, open_rgb
from phi3v.settings import number_of

LENGTHS = ".lengths"
"""Subfolder with token counts of the examples (phi3v.data.lengths)."""


class SplitEntry(TypedDict, total=False):
    """Entry of a split in dataset.json."""

    file: str
    examples: int
    images: int
    rejected: int
    untaken: int
    """Files that the format skips. Absent if there are none."""
    sha256: str


class Description(TypedDict, total=False):
    """Content of dataset.json. `source` and `leakage` are by split."""

    name: str
    converter: str
    converter_version: int
    source: dict[str, dict[str, object]]
    turns: str
    metric: str
    metrics: list[str]
    """Absent if there is only one metric."""
    group_by: str
    max_new_tokens: int
    num_crops: int | None
    splits: dict[str, SplitEntry]
    rejected: int
    leakage: dict[str, dict[str, int]]


class LineIndex:
    """Lines of a file by number. Keeps only their byte offsets in memory."""

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
        """[lines + 1] start of each line, and end of the file."""
        self._handle: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        if stop - start > MAX_LINE_BYTES:
            raise DataError(
                f"{self.path}:{index + 1}: got {stop - start} bytes; expected a line of at most {MAX_LINE_BYTES}"
            )
        # One handle per process, because forked workers must not share one.
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), os.open(self.path, os.O_RDONLY))
        line = os.pread(self._handle[1], stop - start, start)
        if len(line) != stop - start:
            raise DataError(
                f"{self.path}:{index + 1}: the file became shorter during use; do not edit data of a running job"
            )
        return line

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and handle[0] == os.getpid():
            os.close(handle[1])


def describe(data_dir: str | Path) -> Description:
    """dataset.json of a data folder, or {} for a folder made by hand. Raises DataError if the file is invalid."""
    path = Path(data_dir) / "dataset.json"
    if not path.exists():
        return {}
    try:
        value: Description = json.loads(path.read_text(encoding="utf-8"))
        for name, split in value["splits"].items():
            if not isinstance(split["file"], str) or "/" in split["file"]:
                raise ValueError(f"split {name!r}")
        return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a dataset description ({error}); convert the data again with scripts/convert.py"
        ) from None


def split_file(data_dir: str | Path, split: str) -> Path:
    """The JSONL file of a split: from dataset.json, else SPLIT.jsonl or *_SPLIT.jsonl. Raises DataError."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected a folder with images/ and {split}.jsonl")
    entry = describe(data_dir).get("splits", {}).get(split)
    if entry:
        found = [data_dir / entry["file"]]
    else:
        plain = data_dir / f"{split}.jsonl"
        found = [plain] if plain.is_file() else sorted(data_dir.glob(f"*_{split}.jsonl"))
    if len(found) != 1 or not found[0].is_file():
        there = ", ".join(sorted(path.name for path in data_dir.glob("*.jsonl"))) or "no JSONL file"
        raise DataError(
            f"{data_dir}: split {split!r}: got {there}; expected exactly one {split}.jsonl or *_{split}.jsonl"
        )
    return found[0]


def splits_of(data_dir: Path) -> dict[str, Path]:
    """Splits and their files: from dataset.json, else every *.jsonl except rejected.jsonl."""
    if entries := describe(data_dir).get("splits"):
        return {split: data_dir / entry["file"] for split, entry in entries.items()}
    files = (path for path in sorted(data_dir.glob("*.jsonl")) if path.name != "rejected.jsonl")
    return {path.stem.rpartition("_")[2]: path for path in files}


class Pictures:
    """Pictures of a data folder, by their paths in the JSONL file."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir)
        self._root = os.path.realpath(self.data_dir / "images")
        self._folders: dict[str, str] = {}

    def file(self, path: str, where: str) -> Path:
        """The picture's file. Raises DataError if it is outside the folder."""
        # Resolving a path takes eight file system calls, so resolved folders are cached.
        folder, _, name = path.rpartition("/")
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(f"{self._root}/{folder}")
        file = f"{real}/{name}"
        if os.path.islink(file) or not f"{real}/".startswith(f"{self._root}/"):
            file = os.path.realpath(file)
            if not file.startswith(f"{self._root}/"):
                raise DataError(
                    f"{where}: image {path!r} is a link to a file outside {self._root}; expected a file inside it"
                )
        return Path(file)

    def open(self, path: str, where: str) -> Image.Image:
        """The picture, upright and in RGB. Raises DataError."""
        return open_rgb(self.file(path, where), f"{where}: image {path!r}")

    def size(self, path: str, where: str) -> tuple[int, int]:
        """(width, height) of the opened picture, from the header alone. Raises DataError."""
        return displayed_size(self.file(path, where), f"{where}: image {path!r}")

    def bytes_of(self, path: str, where: str) -> bytes:
        """The stored bytes of the picture. Raises DataError."""
        try:
            return self.file(path, where).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: image {path!r}: cannot be read: {error}") from None

    def digests(self, paths: Iterable[str]) -> dict[str, str]:
        """sha256 of each picture's bytes, by path in order. Raises DataError."""
        unique = sorted(set(paths))
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda path: sha256(self.bytes_of(path, str(self.data_dir))).hexdigest(), unique)
            return dict(zip(unique, found, strict=True))

    def stored_bytes(self, path: str, where: str) -> int:
        """Size of the stored picture in bytes, without reading it. Raises DataError."""
        try:
            return self.file(path, where).stat().st_size
        except OSError as error:
            raise DataError(f"{where}: image {path!r}: cannot be read: {error}") from None


def record_picture(file: TextIO, path: str, content: bytes) -> None:
    """Appends a picture to SPLIT.sha256, which `sha256sum --check` can read. path: relative to images/."""
    file.write(f"{sha256(content).hexdigest()}  images/{path}\n")


def check_unchanged(data_dir: str | Path, split: str, digests: dict[str, str]) -> None:
    """Raises DataError if a picture changed since the conversion. Folders made by hand have no record to compare
    with."""
    record = Path(data_dir) / f"{split}.sha256"
    if not record.exists():
        return
    with open(record, encoding="utf-8") as lines:
        converted = {line[73:-1]: line[:64] for line in lines}
    changed = [path for path, digest in digests.items() if digest != converted.get(path)]
    if changed:
        few = ", ".join(repr(path) for path in changed[:3]) + (" …" if len(changed) > 3 else "")
        raise DataError(
            f"{record}: {number_of(len(changed), 'picture')} changed since the conversion: {few}; "
            "convert the data again, or delete this file to accept the pictures"
        )
