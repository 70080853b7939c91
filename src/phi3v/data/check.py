"""Checks of a data folder: the shape of every line, ids, picture paths, the pictures, and leaks between splits.

There are three levels, and each includes the previous ones: "shape" (lines and ids), "paths" (every picture path is a
file inside the folder), "images" (every picture decodes; the same pixels in two splits are reported). All problems are
collected. The first 20 of each kind keep their file:line: field; the others are counted.

`leakage` compares bytes, not pixels. This is cheap, so the converter does it for every dataset.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from phi3v.data.conversations import (
    MAX_LINE_BYTES,
    Conversation,
    DataError,
    decode_line,
    quoted,
    raw_lines,
    read_conversations,
    record_problem,
)
from phi3v.data.folder import Pictures, SplitEntry, check_unchanged, describe, splits_of
from phi3v.data.pictures import thin_problem
from phi3v.data.processes import process_pool

Level = Literal["shape", "paths", "images"]

KEPT_OF_A_KIND = 20


class Problems:
    """Problems, collected by kind."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, kind: str, message: str) -> None:
        """Adds a problem of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= KEPT_OF_A_KIND:
            self.kept.setdefault(kind, []).append(message)

    def forget(self, prefix: str) -> None:
        """Removes the kinds that start with the prefix."""
        for kind in [kind for kind in self.counts if kind.startswith(prefix)]:
            del self.counts[kind], self.kept[kind]

    @property
    def total(self) -> int:
        """Number of problems."""
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """The messages, and for each kind the number of problems beyond those kept."""
        for kind, kept in self.kept.items():
            yield from kept
            if self.counts[kind] > len(kept):
                yield f"… {self.counts[kind] - len(kept)} more: {kind}"


@dataclass
class SplitCheck:
    """Contents of a split."""

    file: str
    examples: int = 0
    pictures: dict[str, int] = field(default_factory=dict)
    """Path of each picture to the first line that names it."""


def _kind(problem: str) -> str:
    """A problem without its numbers and values."""
    text = re.sub(r"\[\d+\]", "[]", re.sub(r"got .*?; expected", "expected", problem, flags=re.DOTALL))
    return re.sub(r"\d+", "N", text)


def check_lines(path: Path, problems: Problems, with_paths: bool, ids: set[str]) -> SplitCheck:
    """Checks the shape of every line and the uniqueness of ids. with_paths: also collect the pictures. ids: ids so
    far."""
    found = SplitCheck(path.name)
    with open(path, "rb") as file:
        for found.examples, line in raw_lines(file):
            where = f"{found.file}:{found.examples}"
            if len(line) > MAX_LINE_BYTES:
                problems.add("line too long", f"{where}: more than {MAX_LINE_BYTES} bytes; expected a shorter line")
                continue
            try:
                record = decode_line(line)
                problem = record_problem(record)
            except ValueError as error:
                problem = str(error)
            if problem:
                problems.add(_kind(problem), f"{where}: {problem}")
                continue
            if record["id"] in ids:
                problems.add("id: not unique", f"{where}: field `id`: got {quoted(record['id'])}; expected a unique id")
            ids.add(record["id"])
            if with_paths:
                for turn in record["conversations"]:
                    for name in turn.get("images", ()):
                        found.pictures.setdefault(name, found.examples)
    if not found.examples:
        problems.add("empty file", f"{path}: empty; expected one JSON object per line")
    return found


def check_paths(pictures: Pictures, found: SplitCheck, problems: Problems) -> None:
    """Checks that every picture is a file inside images/, also through links. Removes the others from `found`."""
    for name, number in list(found.pictures.items()):
        try:
            file = pictures.file(name, "")
            reason = "" if os.path.isfile(file) else "not a file" if os.path.exists(file) else "no such file"
        except DataError:
            reason = "is a link that leaves the folder"
        if reason:
            message = f"{found.file}:{number}: image {quoted(name)}: {reason} in {pictures.data_dir / 'images'}"
            problems.add(f"image: {reason}", message)
            del found.pictures[name]


def check_picture(pictures: Pictures, path: str) -> tuple[str, bytes, int, int]:
    """(problem or "", hash of the pixels, width, height) of a picture."""
    try:
        with pictures.open(path, "picture") as image:
            digest = hashlib.blake2b(struct.pack(">II", *image.size), digest_size=16)
            digest.update(image.tobytes())
            return "", digest.digest(), image.width, image.height
    except DataError as error:
        return str(error).removeprefix(f"picture: image {path!r}: "), b"", 0, 0


def check_images(
    pictures: Pictures, checks: dict[str, SplitCheck], problems: Problems, workers: int, tile_size: int
) -> dict[str, int]:
    """Checks that every picture decodes, and that no pixels occur in two splits. Returns {"SPLIT and SPLIT":
    shared}."""
    jobs = [(split, name) for split, found in checks.items() for name in found.pictures]
    owners: dict[str, dict[bytes, str]] = {split: {} for split in checks}
    with process_pool(workers) as pool:
        results = pool.map(partial(check_picture, pictures), [path for _, path in jobs], chunksize=16)
        bar = tqdm(results, total=len(jobs), desc="decoding", unit="picture", disable=None)
        for (split, name), (problem, digest, width, height) in zip(jobs, bar, strict=True):
            where = f"{checks[split].file}:{checks[split].pictures[name]}: image {quoted(name)}"
            if problem:
                problems.add("image does not decode", f"{where}: {problem}")
                continue
            owners[split][digest] = name
            if thin := thin_problem(width, height, tile_size):
                problems.add("image too thin", f"{where}: {thin}")
    shared: dict[str, int] = {}
    for one, other in itertools.combinations(checks, 2):
        lines, mine, theirs = checks[other].pictures, owners[one], owners[other]
        common = sorted(mine.keys() & theirs.keys(), key=lambda digest: lines[theirs[digest]])
        if common:
            shared[f"{one} and {other}"] = len(common)
        for digest in common:
            name = theirs[digest]
            problems.add(
                f"leak: picture of {other} also in {one}",
                f"{checks[other].file}:{lines[name]}: image {quoted(name)}: the same pixels as {quoted(mine[digest])} "
                "of "
                f"split {one}",
            )
    return shared


def validate_folder(
    data_dir: str | Path, level: Level = "images", workers: int = 1, tile_size: int = 336
) -> tuple[dict[str, SplitCheck], Problems, dict[str, int]]:
    """(contents of each split, problems, shared pictures of two splits). Raises DataError if there is no data.

    tile_size: side of the model's tiles in pixels. A picture whose sides differ by a larger factor can vanish in it.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected a folder with images/ and one JSONL file per split")
    splits = splits_of(data_dir)
    if not splits:
        raise DataError(f"{data_dir}: no JSONL file; expected one per split; run scripts/convert.py to write them")
    problems = Problems()
    checks: dict[str, SplitCheck] = {}
    ids: set[str] = set()
    described = describe(data_dir).get("splits", {})
    for split, path in splits.items():
        if not path.is_file():
            problems.add(
                "split missing", f"{path}: missing, but dataset.json lists it as split {split}; convert the data again"
            )
            continue
        found = checks[split] = check_lines(path, problems, level != "shape", ids)
        expected = described.get(split, {}).get("examples", found.examples)
        if expected != found.examples:
            message = f"{path}: {found.examples} lines; expected {expected}, the number in dataset.json"
            problems.add("number of examples", message)
    if level == "shape" or not any(found.pictures for found in checks.values()):
        return checks, problems, {}
    pictures = Pictures(data_dir)
    for found in checks.values():
        check_paths(pictures, found, problems)
    if level != "images":
        return checks, problems, {}
    for split, found in checks.items():
        try:
            check_unchanged(data_dir, split, pictures.digests(found.pictures))
        except DataError as error:
            problems.add("pictures changed", str(error))
    return checks, problems, check_images(pictures, checks, problems, workers, tile_size)


def in_training(paths: Iterable[str], own: Pictures, train: Iterable[Conversation], theirs: Pictures) -> set[str]:
    """The paths whose bytes are also a picture of the training split.

    Reads only training pictures with the same length as one of the paths' files. Raises DataError if such a file is
    missing.
    """
    digests = {path: hashlib.sha256(own.bytes_of(path, "leakage")).digest() for path in sorted(set(paths))}
    sizes = {own.stored_bytes(path, "leakage") for path in digests}
    seen: set[bytes] = set()
    done: set[str] = set()
    for example in train:
        for path in example.images:
            try:
                if path not in done and theirs.stored_bytes(path, example.id) in sizes:
                    done.add(path)
                    seen.add(hashlib.sha256(theirs.bytes_of(path, example.id)).digest())
            except DataError:
                continue  # training cannot have used a picture that cannot be read
    return {path for path, digest in digests.items() if digest in seen}


def leakage(folders: dict[str, Path], splits: dict[str, SplitEntry]) -> dict[str, dict[str, int]]:
    """dataset.json's `leakage`: {"val": {"examples": 3, "of": 500, "pictures": 3}} for each split except train.

    splits: as in dataset.json. folders: the data folder of each split. {} without a split train. Raises DataError.
    """
    if "train" not in splits:
        return {}
    train = folders["train"] / splits["train"]["file"]
    theirs = Pictures(folders["train"])
    found: dict[str, dict[str, int]] = {}
    for split, entry in splits.items():
        if split == "train":
            continue
        examples = [example.images for example in read_conversations(folders[split] / entry["file"])]
        paths = {path for images in examples for path in images}
        leaked = in_training(paths, Pictures(folders[split]), read_conversations(train), theirs)
        count = sum(any(path in leaked for path in images) for images in examples)
        found[split] = {"examples": count, "of": len(examples), "pictures": len(leaked)}
    return found
