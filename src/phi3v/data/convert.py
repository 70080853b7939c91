"""Converting sources to a data folder: images/, the conversations jsonl of each split, dataset.json last.

Everything is made in a hidden folder beside its final place and moved there at the end, so an interrupted conversion
leaves the old content. Equal sources give equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from phi3v.data.check import leakage
from phi3v.data.conversations import Conversation, DataError, Turn, format_line, image_path_problem, shown
from phi3v.data.fetch import link_or_copy, locked_files
from phi3v.data.folder import LENGTHS, Description, SplitEntry, describe
from phi3v.data.formats import FORMATS
from phi3v.data.pictures import read_pictures
from phi3v.data.rows import Inputs, Picture, Rejection, Sample
from phi3v.provenance.manifest import digest_file, write_json
from phi3v.settings import CONVERTER_VERSION, Dataset

OnError = Literal["stop", "skip"]

MAX_NAME_BYTES = 255
"""Of a file or folder on nearly every file system."""

_MARK = ".converted"
"""Marker file: the converter wrote images/ and the jsonl beside it and may overwrite them."""


@dataclass(frozen=True)
class SplitSource:
    """Where one split comes from."""

    format: str
    inputs: Inputs
    url: str
    revision: str | None
    sha256: str
    """Of the source file, or of the listing of several."""
    options: dict[str, str]
    rows: str = ":"
    first_turn: bool = False
    """Only the first turn is kept."""

    def origin(self) -> dict[str, object]:
        """What dataset.json states of it."""
        return {
            "format": self.format,
            "url": self.url,
            "revision": self.revision,
            "files": len(self.inputs.files),
            "sha256": self.sha256,
            "rows": self.rows,
            "options": self.options,
        }


def row_slice(rows: str) -> slice:
    """The slice of "500:", "0:500" or ":"."""
    start, _, stop = rows.partition(":")
    return slice(int(start or 0), int(stop) if stop else None)


def jsonl_name(format_name: str, split: str) -> str:
    """File name of a split; UCF-101's is the recipe's."""
    return f"ucf101_{split}.jsonl" if format_name == "ucf101" else f"{split}.jsonl"


@dataclass
class PictureWriter:
    """Writes the pictures of a split under images/SPLIT of the working folder."""

    images: Path
    split: str
    written: int = 0
    of_row: list[Path] = field(default_factory=list)
    """Files of the row under way."""

    def forget_row(self) -> None:
        """The row under way is not taken: remove its pictures."""
        for path in self.of_row:
            path.unlink()
        self.written -= len(self.of_row)

    def write(self, picture: Picture, number: int, place: int, where: str) -> str:
        """Store a picture and return its path relative to images/. Raises DataError.

        number, place: source row and position in it, for the picture's name.
        """
        stored = read_pictures(picture.data, where)[0]
        path = self._path(picture.name, stored.suffix, number, place, where)
        target = self.images / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if target.read_bytes() != stored.data:
                raise DataError(
                    f"{where}: picture {shown(path)}: another one of that name is there; expected names to differ"
                )
            return path
        if stored.original and isinstance(picture.data, Path):
            link_or_copy(picture.data, target)
        else:
            target.write_bytes(stored.data)
        self.written += 1
        self.of_row.append(target)
        return path

    def _path(self, name: str, suffix: str, number: int, place: int, where: str) -> str:
        name = name or f"{number // 1000:05d}/{number:08d}-{place}{suffix}"
        if not name.lower().endswith((".jpg", ".jpeg") if suffix == ".jpg" else suffix):
            name += suffix
        path = f"{self.split}/{name}"
        longest = max(len(part.encode()) for part in path.split("/"))
        if expected := image_path_problem(path) or (
            longest > MAX_NAME_BYTES and f"at most {MAX_NAME_BYTES} bytes a part"
        ):
            raise DataError(f"{where}: picture name {shown(path)}; expected {expected}")
        return path


def _line(sample: Sample | Rejection, number: int, source: SplitSource, writer: PictureWriter) -> bytes:
    """The line of a sample, its pictures written. Raises DataError."""
    if isinstance(sample, Rejection):
        raise DataError(f"{sample.where}: {sample.reason}")
    place, turns = 0, []
    for turn in sample.turns[:1] if source.first_turn else sample.turns:
        images = [writer.write(picture, number, place + k, sample.where) for k, picture in enumerate(turn.pictures)]
        place += len(images)
        turns.append(Turn(tuple(images), turn.user, turn.answers[0], turn.answers if len(turn.answers) > 1 else ()))
    return format_line(Conversation(sample.id, source.inputs.source, tuple(turns)))


def _convert_split(split: str, source: SplitSource, work: Path, on_error: OnError, log: TextIO) -> SplitEntry:
    name = jsonl_name(source.format, split)
    examples, rejected, digest = 0, 0, hashlib.sha256()
    writer = PictureWriter(work / "images", split)
    rows = row_slice(source.rows)
    samples = itertools.islice(enumerate(FORMATS[source.format](source.inputs)), rows.start, rows.stop)
    # A bar on a terminal, a line every half minute in a log.
    delay, pause = (0.0, 0.1) if sys.stderr.isatty() else (30.0, 30.0)
    with open(work / name, "wb") as file:
        for number, sample in tqdm(samples, desc=f"converting {split}", unit="row", delay=delay, mininterval=pause):
            try:
                line = _line(sample, number, source, writer)
            except DataError as error:
                reason = str(error).removeprefix(f"{sample.where}: ")
                if on_error == "stop":
                    raise DataError(
                        f"{split}: {sample.where}: {reason}\n--on-error skip leaves such rows out, and lists them in "
                        "rejected.jsonl"
                    ) from None
                writer.forget_row()
                rejected += 1
                log.write(json.dumps({"split": split, "where": sample.where, "reason": reason}) + "\n")
            else:
                file.write(line)
                digest.update(line)
                examples += 1
            writer.of_row.clear()
        file.flush()
        os.fsync(file.fileno())
    if not examples:
        raise DataError(f"{split}: no example ({rejected} rows rejected, rows {source.rows!r}); expected at least one")
    print(f"{split}: {examples} examples, {writer.written} pictures, {rejected} rejected", file=sys.stderr)
    counts: SplitEntry = {"file": name, "examples": examples, "images": writer.written, "rejected": rejected}
    return {**counts, "sha256": digest.hexdigest()}


def convert(
    name: str,
    splits: dict[str, SplitSource],
    output_dir: str | Path,
    turns: str,
    metric: str,
    num_crops: int | None,
    on_error: OnError = "stop",
    keep_other_splits: bool = False,
    scoring: Description | None = None,
) -> Description:
    """Convert splits into output_dir and return dataset.json's content.

    scoring: further fields of dataset.json that evaluation reads.
    on_error: "stop" at the first row that cannot be taken, or "skip" it: it is listed in rejected.jsonl and counted.
    keep_other_splits: splits already there stay (conversion of one split by hand); else they go.
    Raises DataError, or OSError (a full disk): then nothing of the output folder has changed.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(output_dir, {split: jsonl_name(source.format, split) for split, source in splits.items()})
    previous = describe(output_dir) if keep_other_splits else {}
    work = output_dir / ".converting"
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    results: dict[str, SplitEntry] = {}
    try:
        with open(work / "rejected.jsonl", "w", encoding="utf-8") as log:
            for split, source in splits.items():
                scratch = work / "scratch" / split
                scratch.mkdir(parents=True)
                source = replace(source, inputs=replace(source.inputs, scratch=scratch))
                results[split] = _convert_split(split, source, work, on_error, log)
                shutil.rmtree(scratch, ignore_errors=True)
        entries = {**previous.get("splits", {}), **results}
        origins = {**previous.get("source", {}), **{split: source.origin() for split, source in splits.items()}}
        dataset: Description = {
            "name": name,
            "converter": ",".join(dict.fromkeys(str(origin["format"]) for origin in origins.values())),
            "converter_version": CONVERTER_VERSION,
            "source": origins,
            "turns": turns,
            "metric": metric,
            "num_crops": num_crops,
            **(scoring or {}),
            "splits": entries,
            "rejected": sum(entry.get("rejected", 0) for entry in entries.values()),
            "leakage": leakage({split: work if split in results else output_dir for split in entries}, entries),
        }
        _move_into_place(work, output_dir, results, bool(previous))
        write_json(output_dir / "dataset.json", dataset, indent=2)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dataset


def _refuse_foreign(output_dir: Path, names: dict[str, str]) -> None:
    """Raise DataError for content that the converter did not write and would replace."""
    if (output_dir / _MARK).exists():
        return
    for split, name in names.items():
        for path in (output_dir / name, output_dir / "images" / split, output_dir / "dataset.json"):
            if path.exists() or path.is_symlink():
                raise DataError(
                    f"{path}: there already, and not written by this converter; expected a new or empty output folder"
                )


def _move_into_place(work: Path, output_dir: Path, results: dict[str, SplitEntry], keep: bool) -> None:
    (output_dir / _MARK).touch()
    (output_dir / "dataset.json").unlink(missing_ok=True)
    shutil.rmtree(output_dir / LENGTHS, ignore_errors=True)
    (output_dir / "images").mkdir(exist_ok=True)
    for split, result in results.items():
        old = output_dir / "images" / split
        if old.exists():
            shutil.rmtree(old)
        if (work / "images" / split).exists():
            os.replace(work / "images" / split, old)
        os.replace(work / result["file"], output_dir / result["file"])
    log, rejected = work / "rejected.jsonl", output_dir / "rejected.jsonl"
    if keep and rejected.exists():
        lines = rejected.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if json.loads(line)["split"] not in results)
        log.write_text(kept + log.read_text(encoding="utf-8"), encoding="utf-8")
    rejected.unlink(missing_ok=True)
    if log.stat().st_size:
        os.replace(log, rejected)


def _digest(listing: list[list[str | int]]) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def convert_dataset(
    name: str,
    dataset: Dataset,
    source_dir: str | Path,
    output_dir: str | Path,
    on_error: OnError | None = None,
    workers: int = 2,
) -> Description:
    """Convert an entry of a datasets file from what scripts/download.py fetched. Raises DataError.

    on_error: None: as the entry states.
    """
    splits: dict[str, SplitSource] = {}
    for split, entry in dataset.splits.items():
        folder, files, source = locked_files(source_dir, entry.url, entry.revision)
        digest = _digest([[file.path, file.size, file.sha256] for file in source.files])
        revision = source.resolved or entry.revision
        inputs = Inputs(files, folder, entry.options.get("split", split), name, entry.options, workers=workers)
        turns = entry.options.get("turns", dataset.turns)
        splits[split] = SplitSource(
            entry.format, inputs, entry.url, revision, digest, entry.options, entry.rows, turns == "first"
        )
    on_error = on_error or dataset.on_error
    scoring: Description = {}
    if len(dataset.metrics) > 1:
        scoring["metrics"] = dataset.metrics
    if dataset.group_by:
        scoring["group_by"] = dataset.group_by
    if dataset.max_new_tokens:
        scoring["max_new_tokens"] = dataset.max_new_tokens
    return convert(
        name, splits, output_dir, dataset.turns, dataset.metric, dataset.num_crops, on_error, scoring=scoring
    )


def convert_files(
    format_name: str,
    source: Path,
    output_dir: str | Path,
    split: str,
    images_dir: Path | None = None,
    name: str = "",
    turns: str = "all",
    metric: str = "accuracy",
    num_crops: int | None = None,
    rows: str = ":",
    options: dict[str, str] | None = None,
    on_error: OnError = "stop",
    workers: int = 2,
) -> Description:
    """Convert a file or folder by hand into one split; other splits of output_dir stay. Raises DataError."""
    name = name or Path(output_dir).resolve().name
    if format_name not in FORMATS:
        raise DataError(f"--format: got {format_name!r}; expected one of {', '.join(FORMATS)}")
    if not source.exists():
        raise DataError(f"--input: {source}: no such file or folder")
    given = options or {}
    if source.is_dir():
        root, files = source, sorted(path for path in source.rglob("*") if path.is_file())
        digest = _digest([[path.relative_to(root).as_posix(), path.stat().st_size] for path in files])
    else:
        root, files, digest = source.parent, [source], digest_file(source)
    inner = {**given, **({"images_dir": str(images_dir.resolve())} if images_dir else {})}
    inputs = Inputs(files, root, split, name, inner, workers=workers)
    part = SplitSource(format_name, inputs, str(source), None, digest, given, rows, turns == "first")
    return convert(name, {split: part}, output_dir, turns, metric, num_crops, on_error, True)
