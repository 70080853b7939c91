"""Where a data folder's pictures are: files under images/, or members of tar shards; one way to read both.

Shards are tar files in the webdataset layout (`000000012.json` beside `000000012.0.jpg`): a cluster's file system then
holds hundreds of files and not millions. Beside them lies an index, 28 bytes a picture, with which any picture is one
read at a known place.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phi3v.data.conversations import DataError, format_line, read_conversations
from phi3v.data.images import displayed_size, open_rgb

OPEN_SHARDS = 64
"""Files kept open by a process."""


def path_hash(path: str) -> int:
    """64 bits that stand for a picture's path in an index."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


class Pictures:
    """Pictures of one split of a data folder, by their path in the jsonl."""

    def __init__(self, data_dir: str | Path, shards: Sequence[str] = (), index: str = "") -> None:
        self.data_dir = Path(data_dir)
        self._root = os.path.realpath(self.data_dir / "images")
        self.root = Path(self._root)
        self._folders: dict[str, str] = {}
        self.shards = [self.data_dir / name for name in shards]
        self._handles: dict[int, int] = {}
        self._pid = 0
        if self.shards:
            try:
                with np.load(self.data_dir / index) as stored:
                    self._hashes, self._places = stored["hashes"], stored["places"]
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{self.data_dir / index}: not an index of shards ({error})") from None

    def locate(self, path: str, where: str) -> Path | bytes:
        """The picture's file, or its bytes. Raises DataError: not there, or outside the folder."""
        if self.shards:
            return self._read(path, where)
        # Following every part of a path is eight calls to the file system; a folder's share of them is kept.
        folder, _, name = path.rpartition("/")
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(f"{self._root}/{folder}")
        file = f"{real}/{name}"
        if os.path.islink(file) or not f"{real}/".startswith(f"{self._root}/"):
            file = os.path.realpath(file)
            if not file.startswith(f"{self._root}/"):
                raise DataError(f"{where}: image {path!r} is a link out of {self.root}; expected a file inside it")
        return Path(file)

    def open(self, path: str, where: str) -> Image.Image:
        """The picture, upright and in RGB. Raises DataError."""
        return open_rgb(self.locate(path, where), f"{where}: image {path!r}")

    def size(self, path: str, where: str) -> tuple[int, int]:
        """(width, height) as it will be opened, from the header alone. Raises DataError."""
        if self.shards:
            shard, offset, size = self._place(path, where)
            return displayed_size(
                io.BufferedReader(_Member(self._handle(shard), offset, size)), f"{where}: image {path!r}"
            )
        return displayed_size(self.locate(path, where), f"{where}: image {path!r}")

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
            return os.stat(self.locate(path, where)).st_size  # type: ignore[arg-type]
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

    def __getstate__(self) -> dict[str, Any]:
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

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._handle, [left], self._start + self._position) if left else 0
        self._position += count
        return count


def pictures_of(data_dir: str | Path, entry: dict[str, Any]) -> Pictures:
    """The pictures of a split, from its entry in dataset.json ({} for a folder made by hand)."""
    return Pictures(data_dir, entry.get("shards", ()), entry.get("index", ""))


def write_shards(jsonl: Path, images: Path, folder: Path, split: str, shard_bytes: int) -> dict[str, Any]:
    """Pack the examples of a jsonl and their pictures into folder/shards; returns what dataset.json says of them.

    A shard is closed by the first example that makes it longer than shard_bytes. A picture that several examples name
    is stored with the first. Equal inputs give equal bytes. The files are removed as they are packed, so that the disk
    needs room for the pictures once.
    """
    target = folder / "shards"
    target.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    starts: list[int] = []
    hashes: list[int] = []
    places: list[tuple[int, int, int]] = []
    known: set[int] = set()
    archive: tarfile.TarFile | None = None
    try:
        for number, example in enumerate(read_conversations(jsonl)):
            if archive is None or archive.offset > shard_bytes:
                if archive is not None:
                    archive.close()
                names.append(f"shards/{split}-{len(names):05d}.tar")
                starts.append(number)
                archive = tarfile.open(folder / names[-1], "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            _add(archive, f"{number:09d}.json", format_line(example))
            for place, path in enumerate(example.images):
                key = path_hash(path)
                if key in known:
                    continue
                known.add(key)
                file = images / path
                data = file.read_bytes()
                offset = _add(archive, f"{number:09d}.{place}{Path(path).suffix.lower()}", data)
                hashes.append(key)
                places.append((len(names) - 1, offset, len(data)))
                file.unlink()
    finally:
        if archive is not None:
            archive.close()
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    index = f"shards/{split}.index.npz"
    np.savez(
        folder / index,
        hashes=np.array(hashes, np.uint64)[order],
        places=np.array(places, np.int64).reshape(-1, 3)[order],
    )
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
