"""Converting sources to a data folder: images/, the conversations jsonl of each split, dataset.json last.

Everything is made in a hidden folder beside its final place and moved there at the end, so an interrupted conversion
leaves what was there before. Equal sources give equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from phi3v.data.conversations import Conversation, DataError, Turn, format_line, image_path_problem, shown
from phi3v.data.converters import FORMATS
from phi3v.data.images import KEPT, as_png, inspect
from phi3v.data.leakage import leakage
from phi3v.data.lengths import FOLDER as LENGTHS
from phi3v.data.pictures import write_shards
from phi3v.data.samples import Inputs, Picture, Rejection, Sample
from phi3v.data.sources import link_or_copy, locked_files
from phi3v.provenance.manifest import digest_file, write_json
from phi3v.settings import CONVERTER_VERSION, Dataset

OnError = Literal["stop", "skip"]

MAX_IMAGE_BYTES = 256 * 2**20
"""A larger encoded picture is refused before it is read."""

MAX_NAME_BYTES = 255
"""Of a file or folder on nearly every file system."""

_MARK = ".converted"
"""Says that images/ and the jsonl beside it are this module's to replace."""


@dataclass(frozen=True)
class SplitSource:
    """Where one split comes from."""

    format: str
    inputs: Inputs
    origin: dict[str, Any]
    """What dataset.json says of it."""
    rows: str = ":"
    turns: str = "all"
    """first: only the first turn is kept."""


@dataclass
class SplitResult:
    """What was written of a split."""

    file: str
    examples: int = 0
    images: int = 0
    rejected: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def entry(self) -> dict[str, Any]:
        """Its part of dataset.json."""
        return {
            "file": self.file,
            "examples": self.examples,
            "images": self.images,
            "rejected": self.rejected,
            "sha256": self.digest.hexdigest(),
        }


def row_slice(rows: str) -> tuple[int, int | None]:
    """(start, stop) of "500:", "0:500" or ":"."""
    start, _, stop = rows.partition(":")
    return int(start or 0), int(stop) if stop else None


def jsonl_name(format_name: str, split: str) -> str:
    """File name of a split; UCF-101's is the recipe's."""
    return f"ucf101_{split}.jsonl" if format_name == "ucf101" else f"{split}.jsonl"


class PictureWriter:
    """Writes the pictures of a split under images/SPLIT of the working folder."""

    def __init__(self, images: Path, split: str) -> None:
        self.images, self.split, self.written = images, split, 0
        self._folders: set[Path] = set()
        self._of_row: list[Path] = []

    def next_row(self) -> None:
        """The row before is taken: its pictures stay."""
        self._of_row.clear()

    def forget_row(self) -> None:
        """The row under way is not taken: neither are its pictures."""
        for path in self._of_row:
            path.unlink()
        self.written -= len(self._of_row)
        self._of_row.clear()

    def write(self, picture: Picture, number: int, place: int, where: str) -> str:
        """Store a picture and return its path relative to images/. number, place: source row and position in it, for
        its name."""
        data = picture.data
        if isinstance(data, Path):
            if (size := data.stat().st_size) > MAX_IMAGE_BYTES:
                raise DataError(f"{where}: {data.name}: {size} bytes; expected at most {MAX_IMAGE_BYTES}")
            content = data.read_bytes()
        else:
            content = data
        info = inspect(content, where)
        suffix = KEPT.get(info.format, ".png")
        name = picture.name or f"{number // 1000:05d}/{number:08d}-{place}{suffix}"
        if not name.lower().endswith((".jpg", ".jpeg") if suffix == ".jpg" else (suffix,)):
            name += suffix
        path = f"{self.split}/{name}"
        longest = max(len(part.encode()) for part in path.split("/"))
        if expected := image_path_problem(path) or (
            longest > MAX_NAME_BYTES and f"at most {MAX_NAME_BYTES} bytes a part"
        ):
            raise DataError(f"{where}: picture name {shown(path)}; expected {expected}")
        target = self.images / path
        if target.parent not in self._folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._folders = {target.parent} if len(self._folders) > 10_000 else self._folders | {target.parent}
        if info.format not in KEPT:
            content = as_png(content, where)
        elif isinstance(data, Path) and not target.exists():
            link_or_copy(data, target)
            self._wrote(target)
            return path
        try:
            with open(target, "xb") as file:
                file.write(content)
        except FileExistsError:
            if target.read_bytes() != content:
                raise DataError(
                    f"{where}: picture {shown(path)}: another one of that name is there; expected names to differ"
                ) from None
            return path
        self._wrote(target)
        return path

    def _wrote(self, path: Path) -> None:
        self.written += 1
        self._of_row.append(path)


def _conversation(sample: Sample, number: int, source: str, turns: str, writer: PictureWriter) -> Conversation:
    place, written = 0, []
    for turn in sample.turns[:1] if turns == "first" else sample.turns:
        images = []
        for picture in turn.pictures:
            images.append(writer.write(picture, number, place, sample.where))
            place += 1
        answers = turn.answers if len(turn.answers) > 1 else ()
        written.append(Turn(tuple(images), turn.user, turn.answers[0], answers))
    return Conversation(sample.id, source, tuple(written))


def _convert_split(
    split: str, source: SplitSource, work: Path, on_error: OnError, rejected: Callable[[str, Rejection], None]
) -> SplitResult:
    result = SplitResult(jsonl_name(source.format, split))
    writer = PictureWriter(work / "images", split)
    start, stop = row_slice(source.rows)
    samples = enumerate(FORMATS[source.format](source.inputs))
    chosen = itertools.islice(samples, start, stop)
    with open(work / result.file, "wb") as file:
        for number, sample in _progress(chosen, f"converting {split}"):
            try:
                if isinstance(sample, Rejection):
                    raise DataError(f"{sample.where}: {sample.reason}")
                line = format_line(_conversation(sample, number, source.inputs.source, source.turns, writer))
            except DataError as error:
                where = sample.where
                if on_error == "stop":
                    text = str(error)
                    raise DataError(
                        f"{split}: {text if text.startswith(where) else f'{where}: {text}'}\n--on-error skip leaves "
                        f"such rows out, and lists them in rejected.jsonl"
                    ) from None
                writer.forget_row()
                result.rejected += 1
                rejected(split, Rejection(where, str(error).removeprefix(f"{where}: ")))
                continue
            writer.next_row()
            file.write(line)
            result.digest.update(line)
            result.examples += 1
        file.flush()
        os.fsync(file.fileno())
    result.images = writer.written
    if not result.examples:
        raise DataError(
            f"{split}: no example ({result.rejected} rows rejected, rows {source.rows!r}); expected at least one"
        )
    print(f"{split}: {result.examples} examples, {result.images} pictures, {result.rejected} rejected", file=sys.stderr)
    return result


def _progress(items: Iterable[Any], title: str) -> Iterator[Any]:
    """The items, with a bar on a terminal and a line every half minute in a log."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, unit="row")
        return
    last = time.monotonic()
    for count, item in enumerate(items):
        yield item
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{title}: {count + 1} rows", file=sys.stderr, flush=True)


def convert(
    name: str,
    splits: dict[str, SplitSource],
    output_dir: str | Path,
    turns: str,
    metric: str,
    num_crops: int | None,
    on_error: OnError = "stop",
    keep_other_splits: bool = False,
    shard_bytes: int = 0,
) -> dict[str, Any]:
    """Convert splits into output_dir and return dataset.json's content.

    on_error: "stop" at the first row that cannot be taken, or "skip" it: it is listed in rejected.jsonl and counted.
    keep_other_splits: splits already there stay (conversion of one split by hand); else they go.
    shard_bytes: pack the pictures of split train into tar shards of about that size instead of files; 0: files.
    Raises DataError, or OSError (a full disk): then nothing of the output folder has changed.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    names = {split: jsonl_name(source.format, split) for split, source in splits.items()}
    _refuse_foreign(output_dir, names)
    previous = _previous(output_dir) if keep_other_splits else {}
    work = output_dir / ".converting"
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    results: dict[str, SplitResult] = {}
    try:
        with open(work / "rejected.jsonl", "w", encoding="utf-8") as log:

            def rejected(split: str, item: Rejection) -> None:
                log.write(json.dumps({"split": split, "where": item.where, "reason": item.reason}) + "\n")

            for split, source in splits.items():
                scratch = work / "scratch" / split
                scratch.mkdir(parents=True)
                inputs = Inputs(**{**source.inputs.__dict__, "scratch": scratch})
                moved = SplitSource(source.format, inputs, source.origin, source.rows, source.turns)
                results[split] = _convert_split(split, moved, work, on_error, rejected)
                shutil.rmtree(scratch, ignore_errors=True)
        entries = {**previous.get("splits", {}), **{split: result.entry() for split, result in results.items()}}
        if shard_bytes and "train" in results:
            # Only the split that is read over and over, at random, by every process; evaluation reads few files once.
            jsonl = work / results["train"].file
            entries["train"] |= write_shards(jsonl, work / "images", work, "train", shard_bytes)
            shutil.rmtree(work / "images" / "train")
        origins = {**previous.get("source", {}), **{split: source.origin for split, source in splits.items()}}
        dataset = {
            "name": name,
            "converter": ",".join(dict.fromkeys(origin["format"] for origin in origins.values())),
            "converter_version": CONVERTER_VERSION,
            "source": origins,
            "turns": turns,
            "metric": metric,
            "num_crops": num_crops,
            "splits": entries,
            "rejected": sum(entry.get("rejected", 0) for entry in entries.values()),
        }
        dataset["leakage"] = leakage({split: work if split in results else output_dir for split in entries}, entries)
        _move_into_place(work, output_dir, results, bool(previous))
        write_json(output_dir / "dataset.json", dataset, indent=2)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dataset


def _previous(output_dir: Path) -> dict[str, Any]:
    path = output_dir / "dataset.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _refuse_foreign(output_dir: Path, names: dict[str, str]) -> None:
    """What this module did not write is not replaced."""
    if (output_dir / _MARK).exists():
        return
    for split, name in names.items():
        for path in (output_dir / name, output_dir / "images" / split, output_dir / "dataset.json"):
            if path.exists() or path.is_symlink():
                raise DataError(
                    f"{path}: there already, and not written by this converter; expected a new or empty output folder"
                )


def _move_into_place(work: Path, output_dir: Path, results: dict[str, SplitResult], keep: bool) -> None:
    (output_dir / _MARK).touch()
    (output_dir / "dataset.json").unlink(missing_ok=True)
    shutil.rmtree(output_dir / LENGTHS, ignore_errors=True)
    (output_dir / "images").mkdir(exist_ok=True)
    for split, result in results.items():
        for path in (output_dir / "shards").glob(f"{split}[-.]*"):
            path.unlink()
        if (work / "shards").exists() and split == "train":
            (output_dir / "shards").mkdir(exist_ok=True)
            for path in (work / "shards").iterdir():
                os.replace(path, output_dir / "shards" / path.name)
        old = output_dir / "images" / split
        if old.exists():
            shutil.rmtree(old)
        if (work / "images" / split).exists():
            os.replace(work / "images" / split, old)
        os.replace(work / result.file, output_dir / result.file)
    log = work / "rejected.jsonl"
    if keep and (output_dir / "rejected.jsonl").exists():
        kept = [
            line
            for line in (output_dir / "rejected.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            if json.loads(line)["split"] not in results
        ]
        log.write_text("".join(kept) + log.read_text(encoding="utf-8"), encoding="utf-8")
    if log.stat().st_size:
        os.replace(log, output_dir / "rejected.jsonl")
    else:
        (output_dir / "rejected.jsonl").unlink(missing_ok=True)


def convert_dataset(
    name: str,
    dataset: Dataset,
    source_dir: str | Path,
    output_dir: str | Path,
    on_error: OnError | None = None,
    workers: int = 2,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Convert an entry of a datasets file from what scripts/download.py fetched. Raises DataError.

    on_error, shard_bytes: None: as the entry says.
    """
    splits: dict[str, SplitSource] = {}
    for split, entry in dataset.splits.items():
        folder, files, source = locked_files(source_dir, entry.url, entry.revision)
        listing = [[file.path, file.size, file.sha256] for file in source.files]
        origin = {
            "format": entry.format,
            "url": entry.url,
            "revision": source.resolved or entry.revision,
            "files": len(files),
            "sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "rows": entry.rows,
            "options": entry.options,
        }
        inputs = Inputs(files, folder, entry.options.get("split", split), name, entry.options, workers=workers)
        turns = entry.options.get("turns", "first" if dataset.turns == "first" else "all")
        splits[split] = SplitSource(entry.format, inputs, origin, entry.rows, turns)
    return convert(
        name, splits, output_dir, dataset.turns, dataset.metric, dataset.num_crops, on_error or dataset.on_error,
        shard_bytes=int(dataset.shards * 10**6) if shard_bytes is None else shard_bytes,
    )  # fmt: skip


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
    shard_bytes: int = 0,
) -> dict[str, Any]:
    """Convert a file or folder by hand into one split; other splits of output_dir stay. Raises DataError."""
    name = name or Path(output_dir).resolve().name
    if format_name not in FORMATS:
        raise DataError(f"--format: got {format_name!r}; expected one of {', '.join(FORMATS)}")
    if not source.exists():
        raise DataError(f"--input: {source}: no such file or folder")
    root = source if source.is_dir() else source.parent
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    options = {**(options or {}), **({"images_dir": str(images_dir.resolve())} if images_dir else {})}
    listing = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in files]
    shown_options = {key: value for key, value in options.items() if key != "images_dir"}
    origin = {
        "format": format_name,
        "url": str(source),
        "revision": None,
        "files": len(files),
        "sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest() if source.is_dir() else digest_file(source),
        "rows": rows,
        "options": shown_options,
    }
    inputs = Inputs(files, root, split, name, options, workers=workers)
    part = SplitSource(format_name, inputs, origin, rows, "first" if turns == "first" else "all")
    return convert(
        name,
        {split: part},
        output_dir,
        turns,
        metric,
        num_crops,
        on_error,
        keep_other_splits=True,
        shard_bytes=shard_bytes,
    )
