"""A data folder: its description, the lines of each split, and its pictures. Imports no torch.

Pictures are files under images/ or members of tar shards in the webdataset layout (`000000012.json` beside
`000000012.0.jpg`), so that a cluster's file system holds hundreds of files, not millions. An index beside the shards
(28 bytes per picture) makes any picture one read at a known place.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict

import numpy as np
from PIL import Image

from phi3v.data.conversations import MAX_LINE_BYTES, DataError, format_line, read_conversations
from phi3v.data.pictures import displayed_size, open_rgb

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LENGTHS = ".lengths"
"""Folder in a data folder: the tokens of its examples, counted before (phi3v.data.lengths)."""

OPEN_SHARDS = 64
"""Files kept open by a process."""


class ShardEntry(TypedDict, total=False):
    """What dataset.json states of a split's tar shards: their names, their index, each one's first example."""

    shards: list[str]
    index: str
    shard_starts: list[int]


class SplitEntry(ShardEntry, total=False):
    """What dataset.json states of a split."""

    file: str
    examples: int
    images: int
    rejected: int
    sha256: str


class Description(TypedDict, total=False):
    """The content of dataset.json; `source` and `leakage` by split."""

    name: str
    converter: str
    converter_version: int
    source: dict[str, dict[str, object]]
    turns: str
    metric: str
    num_crops: int | None
    splits: dict[str, SplitEntry]
    rejected: int
    leakage: dict[str, dict[str, int]]


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

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and handle[0] == os.getpid():
            os.close(handle[1])


def describe(data_dir: str | Path) -> Description:
    """dataset.json of a data folder; {} for a folder made by hand. Raises DataError if the converter did not write it."""
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
            f"{path}: not a dataset description ({error}); expected what scripts/convert.py writes"
        ) from None


def split_file(data_dir: str | Path, split: str) -> Path:
    """The jsonl of a split: as dataset.json names it, else SPLIT.jsonl or *_SPLIT.jsonl. Raises DataError."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected one with images/ and {split}.jsonl")
    entry = describe(data_dir).get("splits", {}).get(split)
    if entry:
        found = [data_dir / entry["file"]]
    else:
        plain = data_dir / f"{split}.jsonl"
        found = [plain] if plain.is_file() else sorted(data_dir.glob(f"*_{split}.jsonl"))
    if len(found) != 1 or not found[0].is_file():
        there = ", ".join(sorted(path.name for path in data_dir.glob("*.jsonl"))) or "no jsonl"
        raise DataError(f"{data_dir}: split {split!r}: expected one {split}.jsonl or *_{split}.jsonl; there: {there}")
    return found[0]


def splits_of(data_dir: Path) -> dict[str, Path]:
    """Splits and their files: as dataset.json names them, else every *.jsonl but rejected.jsonl."""
    if entries := describe(data_dir).get("splits"):
        return {split: data_dir / entry["file"] for split, entry in entries.items()}
    files = (path for path in sorted(data_dir.glob("*.jsonl")) if path.name != "rejected.jsonl")
    return {path.stem.rpartition("_")[2]: path for path in files}


def path_hash(path: str) -> int:
    """64 bits that stand for a picture's path in an index."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


class Pictures:
    """Pictures of one split of a data folder, by their path in the jsonl. entry: the split's in dataset.json."""

    def __init__(self, data_dir: str | Path, entry: ShardEntry | None = None) -> None:
        self.data_dir = Path(data_dir)
        self._root = os.path.realpath(self.data_dir / "images")
        self._folders: dict[str, str] = {}
        entry = entry or {}
        self.shards = [self.data_dir / name for name in entry.get("shards", ())]
        self._handles: dict[int, int] = {}
        self._pid = 0
        if self.shards:
            index = self.data_dir / entry["index"]
            try:
                with np.load(index) as stored:
                    self._hashes, self._places = stored["hashes"], stored["places"]
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{index}: not an index of shards ({error})") from None

    def locate(self, path: str, where: str) -> Path | bytes:
        """The picture's file, or its bytes. Raises DataError: not there, or outside the folder."""
        return self._read(path, where) if self.shards else self._file(path, where)

    def _file(self, path: str, where: str) -> Path:
        # Following every part of a path is eight calls to the file system; a folder's share of them is kept.
        folder, _, name = path.rpartition("/")
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(f"{self._root}/{folder}")
        file = f"{real}/{name}"
        if os.path.islink(file) or not f"{real}/".startswith(f"{self._root}/"):
            file = os.path.realpath(file)
            if not file.startswith(f"{self._root}/"):
                raise DataError(f"{where}: image {path!r} is a link out of {self._root}; expected a file inside it")
        return Path(file)

    def open(self, path: str, where: str) -> Image.Image:
        """The picture, upright and in RGB. Raises DataError."""
        return open_rgb(self.locate(path, where), f"{where}: image {path!r}")

    def size(self, path: str, where: str) -> tuple[int, int]:
        """(width, height) as it will be opened, from the header alone. Raises DataError."""
        source: Path | BinaryIO
        if self.shards:
            shard, offset, size = self._place(path, where)
            source = io.BufferedReader(_Member(self._handle(shard), offset, size))
        else:
            source = self._file(path, where)
        return displayed_size(source, f"{where}: image {path!r}")

    def bytes_of(self, path: str, where: str) -> bytes:
        """The picture as it is stored. Raises DataError."""
        found = self.locate(path, where)
        try:
            return found.read_bytes() if isinstance(found, Path) else found
        except OSError as error:
            raise DataError(f"{where}: image {path!r}: cannot be read: {error}") from None

    def stored_bytes(self, path: str, where: str) -> int:
        """Size of the stored picture, without reading it. Raises DataError."""
        if self.shards:
            return self._place(path, where)[2]
        try:
            return self._file(path, where).stat().st_size
        except OSError as error:
            raise DataError(f"{where}: image {path!r}: cannot be read: {error}") from None

    def _place(self, path: str, where: str) -> tuple[int, int, int]:
        """(shard, where it starts, how long it is) of a picture."""
        key = np.uint64(path_hash(path))
        place = int(np.searchsorted(self._hashes, key))
        if place == len(self._hashes) or self._hashes[place] != key:
            raise DataError(f"{where}: image {path!r}: not in the shards of {self.data_dir}")
        shard, offset, size = (int(value) for value in self._places[place])
        return shard, offset, size

    def _read(self, path: str, where: str) -> bytes:
        shard, offset, size = self._place(path, where)
        data = os.pread(self._handle(shard), size, offset)
        if len(data) != size:
            raise DataError(f"{where}: image {path!r}: {self.shards[shard]} is shorter than its index says")
        return data

    def _handle(self, shard: int) -> int:
        if self._pid != os.getpid():
            # A forked worker must not share positions or closing with its parent.
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            if len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.pop(next(iter(self._handles))))
            self._handles[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}, "_pid": 0}

    def __del__(self) -> None:
        if getattr(self, "_pid", 0) == os.getpid():
            for handle in self._handles.values():
                os.close(handle)


class _Member(io.RawIOBase):
    """A part of an open file, of which only what is asked for is read."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._position = handle, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        left = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._handle, [left], self._start + self._position) if left else 0
        self._position += count
        return count


def write_shards(jsonl: Path, images: Path, folder: Path, split: str, shard_bytes: int) -> ShardEntry:
    """Pack the examples of a jsonl and their pictures into folder/shards; returns what dataset.json states of them.

    A shard is closed by the first example that makes it longer than shard_bytes. A picture that several examples name
    is stored with the first. Equal inputs give equal bytes. The files are removed as they are packed, so that the disk
    holds the pictures once.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    starts: list[int] = []
    places: dict[int, tuple[int, int, int]] = {}
    with contextlib.ExitStack() as opened:
        archive: tarfile.TarFile | None = None
        for number, example in enumerate(read_conversations(jsonl)):
            if archive is None or archive.offset > shard_bytes:
                opened.close()
                names.append(f"shards/{split}-{len(names):05d}.tar")
                starts.append(number)
                archive = opened.enter_context(tarfile.open(folder / names[-1], "w:", format=tarfile.USTAR_FORMAT))
            _add(archive, f"{number:09d}.json", format_line(example))
            for place, path in enumerate(example.images):
                key = path_hash(path)
                if key not in places:
                    data = (images / path).read_bytes()
                    offset = _add(archive, f"{number:09d}.{place}{Path(path).suffix.lower()}", data)
                    places[key] = (len(names) - 1, offset, len(data))
                    (images / path).unlink()
    hashes = np.array(list(places), np.uint64)
    order = np.argsort(hashes, kind="stable")
    index = f"shards/{split}.index.npz"
    rows = np.array(list(places.values()), np.int64).reshape(-1, 3)
    np.savez(folder / index, hashes=hashes[order], places=rows[order])
    return {"shards": names, "index": index, "shard_starts": starts}


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; returns where its bytes start in the file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
    # A member is a header of one block, then its bytes, filled up to whole blocks.
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return archive.offset - blocks * tarfile.BLOCKSIZE


def shard_order(starts: Sequence[int], examples: int, seed: int, epoch: int, together: int = 8) -> list[int]:
    """A permutation of the examples that depends on seed and epoch only and stays within `together` shards at a time.

    Shards come in random order, `together` of them are mixed, then the next ones: a process reads few files at a time,
    each once. starts: index of each shard's first example.
    """
    rng = random.Random(f"shards/{seed}/{epoch}")
    edges = [*starts, examples]
    shards = list(range(len(starts)))
    rng.shuffle(shards)
    order: list[int] = []
    for first in range(0, len(shards), together):
        window = [
            index for shard in shards[first : first + together] for index in range(edges[shard], edges[shard + 1])
        ]
        rng.shuffle(window)
        order += window
    return order
