"""Checking a data folder: every line's shape, ids, image paths, the pictures themselves, and leaks between splits.

Three levels, each with the ones before it: "shape" (lines and ids), "paths" (every image path is a file inside the
folder), "images" (every picture decodes; the same pixels in two splits are reported). All problems are gathered: the
first 20 of each kind are kept with file:line:field, the rest are counted.

`leakage` compares bytes, not pixels: that costs next to nothing, so the converter does it for every dataset.
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
    raw_lines,
    read_conversations,
    record_problem,
    shown,
)
from phi3v.data.folder import Pictures, SplitEntry, check_unchanged, describe, splits_of
from phi3v.data.pictures import thin_problem
from phi3v.data.processes import process_pool

Level = Literal["shape", "paths", "images"]

KEPT_OF_A_KIND = 20


class Problems:
    """What is wrong, gathered by kind."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, kind: str, message: str) -> None:
        """One more problem of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= KEPT_OF_A_KIND:
            self.kept.setdefault(kind, []).append(message)

    def forget(self, prefix: str) -> None:
        """Drop the kinds that start so."""
        for kind in [kind for kind in self.counts if kind.startswith(prefix)]:
            del self.counts[kind], self.kept[kind]

    @property
    def total(self) -> int:
        """Number of problems."""
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """Messages, and a count if more of a kind were found than are kept."""
        for kind, kept in self.kept.items():
            yield from kept
            if self.counts[kind] > len(kept):
                yield f"… {self.counts[kind] - len(kept)} more: {kind}"


@dataclass
class SplitCheck:
    """What was found in a split."""

    file: str
    examples: int = 0
    pictures: dict[str, int] = field(default_factory=dict)
    """Path of each picture to the line that first names it."""


def _kind(problem: str) -> str:
    """A problem without its numbers and values."""
    text = re.sub(r"\[\d+\]", "[]", re.sub(r"got .*?; expected", "expected", problem, flags=re.DOTALL))
    return re.sub(r"\d+", "N", text)


def check_lines(path: Path, problems: Problems, with_paths: bool, ids: set[str]) -> SplitCheck:
    """Shape of every line and uniqueness of ids; with_paths also gathers the pictures. ids: those of other splits."""
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
                problems.add("id: not unique", f"{where}: field `id`: got {shown(record['id'])}; expected it once")
            ids.add(record["id"])
            if with_paths:
                for turn in record["conversations"]:
                    for name in turn.get("images", ()):
                        found.pictures.setdefault(name, found.examples)
    if not found.examples:
        problems.add("empty file", f"{path}: empty; expected one JSON object a line")
    return found


def check_paths(pictures: Pictures, found: SplitCheck, problems: Problems) -> None:
    """Every picture is a file inside images/, links included; those that are not are dropped from `found`."""
    for name, number in list(found.pictures.items()):
        try:
            file = pictures.file(name, "")
            reason = "" if os.path.isfile(file) else "not a file" if os.path.exists(file) else "no such file"
        except DataError:
            reason = "is a link that leaves the folder"
        if reason:
            message = f"{found.file}:{number}: image {shown(name)}: {reason} in {pictures.data_dir / 'images'}"
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
    """Every picture decodes; the same pixels in two splits are a leak. Returns {"SPLIT and SPLIT": shared pictures}."""
    jobs = [(split, name) for split, found in checks.items() for name in found.pictures]
    owners: dict[str, dict[bytes, str]] = {split: {} for split in checks}
    with process_pool(workers) as pool:
        results = pool.map(partial(check_picture, pictures), [path for _, path in jobs], chunksize=16)
        bar = tqdm(results, total=len(jobs), desc="decoding", unit="picture", disable=None)
        for (split, name), (problem, digest, width, height) in zip(jobs, bar, strict=True):
            where = f"{checks[split].file}:{checks[split].pictures[name]}: image {shown(name)}"
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
                f"{checks[other].file}:{lines[name]}: image {shown(name)}: the same pixels as {shown(mine[digest])} of "
                f"split {one}",
            )
    return shared


def validate_folder(
    data_dir: str | Path, level: Level = "images", workers: int = 1, tile_size: int = 336
) -> tuple[dict[str, SplitCheck], Problems, dict[str, int]]:
    """(what each split holds, everything that is wrong, shared pictures of two splits). Raises DataError: no data.

    tile_size: the model's, in pixels; a picture whose sides differ by a larger factor can vanish in it.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; expected one with images/ and a jsonl for each split")
    splits = splits_of(data_dir)
    if not splits:
        raise DataError(f"{data_dir}: no jsonl; expected one for each split")
    problems = Problems()
    checks: dict[str, SplitCheck] = {}
    ids: set[str] = set()
    described = describe(data_dir).get("splits", {})
    for split, path in splits.items():
        if not path.is_file():
            problems.add("split missing", f"{path}: missing; dataset.json names it as split {split}")
            continue
        found = checks[split] = check_lines(path, problems, level != "shape", ids)
        expected = described.get(split, {}).get("examples", found.examples)
        if expected != found.examples:
            message = f"{path}: {found.examples} lines; expected {expected}, as dataset.json states"
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
    """Those of the paths whose bytes are also a picture of the training split.

    Of the training pictures only those are read that are as long as one of the paths'. Raises DataError if one of the
    paths' is not there.
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
                continue  # a picture that cannot be read cannot have been trained on
    return {path for path, digest in digests.items() if digest in seen}


def leakage(folders: dict[str, Path], splits: dict[str, SplitEntry]) -> dict[str, dict[str, int]]:
    """dataset.json's `leakage`: {"val": {"examples": 3, "of": 500, "pictures": 3}} for each split but train.

    splits: as in dataset.json; folders: the data folder of each. {} without a split train. Raises DataError.
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
