"""Converts sources to a data folder: images/, one JSONL file of conversations per split, and dataset.json last.

All files are written to a hidden folder and moved to their final place at the end, so an interrupted conversion leaves
the previous content intact. Equal sources give equal bytes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from phi3v.data import recipe
from phi3v.data.check import leakage
from phi3v.data.conversations import (
    Conversation,
    DataError,
    Turn,
    format_line,
    image_path_problem,
    quoted,
    read_conversations,
)
from phi3v.data.fetch import FAILURES, fetch_urls, locked_files, url_file
from phi3v.data.folder import LENGTHS, Description, SplitEntry, describe, record_picture
from phi3v.data.formats import FORMATS, ROWS, as_text, column
from phi3v.data.pictures import PictureOptions, StoredPicture, read_pictures
from phi3v.data.rows import Inputs, Picture, Rejection, Sample, may_name_urls
from phi3v.provenance.manifest import digest_file, write_json
from phi3v.settings import CONVERTER_VERSION, FORMAT_OPTIONS, Dataset, Division, OptionValue, Split, number_of, validate

OnError = Literal["stop", "skip"]
Pages = Iterator[Callable[[], list[StoredPicture]]]
"""Functions that return the decoded pages of each picture of a row, some after waiting for a thread."""

SMALL_BYTES = 2**14
"""Pictures with fewer bytes are decoded without a thread, because starting it takes longer."""

MAX_NAME_BYTES = 255
"""Longest name of a file or folder on nearly every file system."""

_MARK = ".converted"
"""Marker file: the converter wrote images/ and the jsonl beside it and may overwrite them."""


@dataclass(frozen=True)
class SplitSource:
    """Source of one split."""

    format: str
    inputs: Inputs
    url: str
    revision: str | None
    sha256: str
    """Digest of the source file, or of the list of source files."""
    options: dict[str, OptionValue]
    rows: str = ":"
    first_turn: bool = False
    """Whether only the first turn is used."""
    urls: Path = Path()
    """Folder of the files that were downloaded from URLs in rows."""
    chosen: tuple[Division, str] | None = None
    """The division of the rows, and the name of the part to use."""

    @property
    def samples(self) -> Iterator[tuple[int, Sample | Rejection]]:
        """(row number in the source, sample) of the selected rows."""
        rows = row_slice(self.rows)
        found = itertools.islice(enumerate(FORMATS[self.format](self.inputs)), rows.start, rows.stop)
        parts = divide(self.format, self.inputs, self.chosen[0], rows) if self.chosen else itertools.repeat("")
        for (number, sample), part in zip(found, parts, strict=self.chosen is not None):
            if self.chosen and part != self.chosen[1]:
                continue
            if self.first_turn and isinstance(sample, Sample):
                sample = replace(sample, turns=sample.turns[:1])
            yield number, sample

    def origin(self) -> dict[str, object]:
        """The description of the source in dataset.json."""
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


def divide(format_name: str, inputs: Inputs, how: Division, taken: slice = slice(None)) -> list[str]:
    """The split of each row: whole groups, in an order that the seed determines, until a split has its share.

    Each label (of a group's first row) is divided separately, and rounding remainders carry over to the next label. A
    share smaller than every group still gets one group. Raises DataError for a format without columns or an unknown
    column.
    """
    if format_name not in ROWS:
        raise DataError(f"split: format {format_name} defines its own splits; expected one of {', '.join(ROWS)}")
    group_of, of_row = dict[str, int](), list[int]()
    sizes, labels = list[int](), list[str]()
    for place, (where, _, row) in enumerate(itertools.islice(ROWS[format_name](inputs), taken.start, taken.stop)):
        values = []
        known = row if isinstance(row, dict) else {}
        for option, name in (("group", how.group), ("stratify", how.stratify)):
            try:
                values.append(as_text(column(known, name)) if name and known else "")
            except KeyError:
                raise DataError(
                    f"{where}: split.{option}: no column `{name}`; expected one of {', '.join(known)}"
                ) from None
        group = group_of.setdefault(values[0] or f"\0{place}", len(group_of))
        if group == len(sizes):
            sizes.append(0)
            labels.append(values[1])
        sizes[group] += 1
        of_row.append(group)
    ranks = [hashlib.sha256(f"{how.seed}/{name}".encode()).digest() for name in group_of]
    order = sorted(range(len(sizes)), key=lambda group: (labels[group], ranks[group]))
    parts, quotas = ["train"] * len(sizes), {"val": 0.0, "test": 0.0}
    for _, stratum in itertools.groupby(order, key=lambda group: labels[group]):
        groups = list(stratum)
        rows = sum(sizes[group] for group in groups)
        quotas = {"val": quotas["val"] + how.val * rows, "test": quotas["test"] + how.test * rows}
        for group in groups:
            part = next((part for part, left in quotas.items() if sizes[group] <= left + 0.5 and left > 0), "train")
            if part != "train":
                parts[group], quotas[part] = part, quotas[part] - sizes[group]
    for part in ("val", *(["test"] if how.test else [])):
        spare = [group for group in order if parts[group] == "train"]
        if part not in parts and len(spare) > 1:
            parts[min(spare, key=lambda group: sizes[group])] = part
    if how.group and len(set(parts)) < 2:
        raise DataError(
            f"{inputs.root}: split.group: column `{how.group}` has {len(sizes)} different values, too few to divide; "
            "expected more"
        )
    return [parts[group] for group in of_row]


def jsonl_name(format_name: str, split: str) -> str:
    """File name of a split. UCF-101 uses the recipe's name."""
    return f"ucf101_{split}.jsonl" if format_name == "ucf101" else f"{split}.jsonl"


@dataclass
class OwnIds:
    """Makes the ids in the source unique over all splits of the folder."""

    others: list[Path]
    """JSONL files of other splits that stay in the folder."""
    counts: dict[str, int] | None = None

    def unique(self, name: str, split: str) -> str:
        """The id itself. If it is already in use, the id with the split as prefix, then also with a number."""
        if self.counts is None:
            self.counts = {example.id: 1 for path in self.others for example in read_conversations(path)}
        uses = self.counts[name] = self.counts.get(name, 0) + 1
        if uses == 1:
            return name
        return self.unique(f"{split}-{name}" if uses == 2 else f"{split}-{name}-{uses - 1}", split)


@dataclass
class SplitWriter:
    """Writes the pictures of a split to images/SPLIT of the working folder, and formats its lines."""

    split: str
    source: SplitSource
    images: Path
    ids: OwnIds
    written: int = 0
    warnings: list[str] = field(default_factory=list)
    of_row: dict[Path, bytes] = field(default_factory=dict)
    """Files of the current row, and their contents."""
    folders: set[Path] = field(default_factory=set)
    """Folders that already exist."""

    def forget_row(self) -> None:
        """Removes the pictures of the current row, which is rejected."""
        for path in self.of_row:
            path.unlink()
        self.written -= len(self.of_row)

    def read(self, picture: Picture, where: str) -> list[StoredPicture]:
        """The decoded pages of a picture. Raises DataError."""
        data = self._fetched(picture.data, where) if isinstance(picture.data, str) else picture.data
        given = self.source.inputs.options
        options = PictureOptions(given.pixel_range, given.max_pixels, given.dpi)
        try:
            return read_pictures(data, where, options, picture.page, picture.decoded)
        except DataError as error:
            if not (isinstance(picture.data, str) and isinstance(data, Path)):
                raise
            # For a downloaded picture, name its URL, not the file name in the cache.
            raise DataError(str(error).replace(data.name, picture.data)) from None

    def line(self, number: int, sample: Sample | Rejection, pages: Pages) -> bytes:
        """Writes the pictures of a sample and returns its line. Raises DataError."""
        if isinstance(sample, Rejection):
            raise DataError(f"{sample.where}: {sample.reason}")
        inputs, place, turns = self.source.inputs, 0, []
        for turn in sample.turns:
            images: list[str] = []
            for picture in turn.pictures:
                images += self.write(picture, next(pages)(), number, place + len(images), sample.where)
            place += len(images)
            answers = turn.answers if len(turn.answers) > 1 else ()
            turns.append(Turn(tuple(images), turn.user, turn.answers[0] if turn.answers else "", answers, turn.system))
        own = sample.id != inputs.row_id(number) and self.source.format not in recipe.FORMATS
        name = self.ids.unique(sample.id, self.split) if own else sample.id
        return format_line(Conversation(name, inputs.source, tuple(turns), sample.meta), inputs.options.unlabelled)

    def write(self, picture: Picture, pages: list[StoredPicture], number: int, place: int, where: str) -> list[str]:
        """Writes the pages of a picture and returns their paths relative to images/. Raises DataError.

        number, place: source row and position in it, for the picture's name.
        """
        paths: list[str] = []
        for page, stored in enumerate(pages, picture.page or 1):
            marked = f"{picture.name}.{page}" if picture.name and (picture.page or len(pages) > 1) else picture.name
            path = self._path(marked, stored.suffix, number, place + len(paths), where)
            paths.append(path)
            target = self.images / path
            if target.parent not in self.folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.folders.add(target.parent)
            if stored.warning:
                self.warnings.append(f"{where}: {stored.warning}")
            try:
                with open(target, "xb") as file:  # a copy, so that editing the original does not change converted data
                    file.write(stored.data)
            except FileExistsError:
                if target.read_bytes() != stored.data:
                    raise DataError(
                        f"{where}: picture {quoted(path)}: another picture has the same name; expected unique names"
                    ) from None
            else:
                self.written += 1
                self.of_row[target] = stored.data
        return paths

    def _fetched(self, url: str, where: str) -> Path:
        path = url_file(self.source.urls, url)
        if not path.is_file():
            reason = self.failures.get(url, "run scripts/download.py again")
            raise DataError(f"{where}: picture {url}: not downloaded: {reason}")
        return path

    @functools.cached_property
    def failures(self) -> dict[str, str]:
        """Reasons of failed downloads. Read once, because there may be hundreds of thousands."""
        path = self.source.urls / FAILURES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _path(self, name: str, suffix: str, number: int, place: int, where: str) -> str:
        name = name or f"{number // 1000:05d}/{number:08d}-{place}{suffix}"
        if not name.lower().endswith((".jpg", ".jpeg") if suffix == ".jpg" else suffix):
            name += suffix
        path = f"{self.split}/{name}"
        longest = max(len(part.encode()) for part in path.split("/"))
        if expected := image_path_problem(path) or (
            longest > MAX_NAME_BYTES and f"at most {MAX_NAME_BYTES} bytes per part of the path"
        ):
            raise DataError(f"{where}: picture name {quoted(path)}; expected {expected}")
        return path


def _read_ahead(source: SplitSource, writer: SplitWriter) -> Iterator[tuple[int, Sample | Rejection, Pages]]:
    """(row number, sample, pages of its pictures) in order, while threads decode the pictures of the next samples.

    Decoding releases the GIL, so threads run in parallel. Two samples per thread limit the memory.
    """
    waiting: deque[tuple[int, Sample | Rejection, Pages]] = deque()

    def pages(picture: Picture, where: str) -> Callable[[], list[StoredPicture]]:
        inline = picture.decoded or (isinstance(picture.data, bytes) and len(picture.data) < SMALL_BYTES)
        if inline or source.inputs.workers == 1:
            return functools.partial(writer.read, picture, where)
        return pool.submit(writer.read, picture, where).result

    with ThreadPoolExecutor(source.inputs.workers) as pool:
        for number, sample in source.samples:
            turns = sample.turns if isinstance(sample, Sample) else ()
            decoded = [pages(picture, sample.where) for turn in turns for picture in turn.pictures]
            waiting.append((number, sample, iter(decoded)))
            if len(waiting) > 2 * source.inputs.workers:
                yield waiting.popleft()
        yield from waiting


def _convert_split(
    split: str, source: SplitSource, work: Path, on_error: OnError, log: TextIO, ids: OwnIds
) -> SplitEntry:
    name = jsonl_name(source.format, split)
    examples, rejected, bare, digest, first_reason = 0, 0, 0, hashlib.sha256(), ""
    writer = SplitWriter(split, source, work / "images", ids)
    # A progress bar on a terminal, a line every 30 seconds in a log.
    delay, pause = (0.0, 0.1) if sys.stderr.isatty() else (30.0, 30.0)
    with open(work / name, "wb") as file, open(work / f"{split}.sha256", "w", encoding="utf-8") as record:
        for number, sample, pages in tqdm(
            _read_ahead(source, writer), desc=f"converting {split}", unit="row", delay=delay, mininterval=pause
        ):
            try:
                line = writer.line(number, sample, pages)
            except DataError as error:
                reason = str(error).removeprefix(f"{sample.where}: ")
                if on_error == "stop":
                    raise DataError(
                        f"{split}: {sample.where}: {reason}\nTo skip such rows and list them in rejected.jsonl, use "
                        "--on-error "
                        "skip, or `on_error: skip` in the dataset's entry"
                    ) from None
                writer.forget_row()
                rejected += 1
                first_reason = first_reason or f"; the first is {sample.where}: {reason}"
                _log(log, split, sample.where, reason)
            else:
                file.write(line)
                digest.update(line)
                for path, content in writer.of_row.items():
                    record_picture(record, path.relative_to(writer.images).as_posix(), content)
                examples += 1
                bare += b'"images": ["' not in line
            writer.of_row.clear()
        file.flush()
        os.fsync(file.fileno())
    untaken = sorted(source.inputs.untaken.items())
    for file_name, reason in untaken:
        _log(log, split, file_name, reason)
    if not examples:
        part = "all rows" if source.rows == ":" else f"rows {source.rows}"
        raise DataError(
            f"{split}: {source.url}: got no valid example ({part}, {rejected} rejected); expected at least "
            f"one{first_reason}"
        )
    without = f"; {number_of(bare, 'example')} without a picture" if bare else ""
    found = f"{number_of(examples, 'example')}, {number_of(writer.written, 'picture')}"
    print(f"{split}: {found}, {rejected:,} rejected{without}", file=sys.stderr)
    for noun, what, notes in (
        ("file", "skipped", [f"{file}: {reason}" for file, reason in untaken]),
        ("picture", "with a warning", writer.warnings),
    ):
        if notes:
            few = "; ".join(notes[:5])
            more = "; …" if len(notes) > 5 else ""
            print(f"{split}: {number_of(len(notes), noun)} {what} ({few}{more})", file=sys.stderr)
    counts: SplitEntry = {"file": name, "examples": examples, "images": writer.written, "rejected": rejected}
    if untaken:
        counts["untaken"] = len(untaken)
    return {**counts, "sha256": digest.hexdigest()}


def _log(log: TextIO, split: str, where: str, reason: str) -> None:
    """Writes a line of rejected.jsonl."""
    log.write(json.dumps({"split": split, "where": where, "reason": reason}, ensure_ascii=False) + "\n")


def convert(
    name: str,
    splits: dict[str, SplitSource],
    output_dir: str | Path,
    facts: Description,
    on_error: OnError = "stop",
    keep_other_splits: bool = False,
) -> Description:
    """Converts splits to output_dir and returns the content of dataset.json.

    facts: how the examples train and are scored, for dataset.json.
    on_error: "stop" at the first row that cannot be converted, or "skip" it, list it in rejected.jsonl and count it.
    keep_other_splits: keep the splits that already exist (conversion of one split by hand). Otherwise they are removed.
    Raises DataError, or OSError (a full disk). The output folder is then unchanged.
    """
    for split in splits:
        if image_path_problem(split) or "/" in split:
            raise DataError(f"split: got {split!r}; expected a valid folder name")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(output_dir, {split: jsonl_name(source.format, split) for split, source in splits.items()})
    previous = describe(output_dir) if keep_other_splits else {}
    entries, origins = {**previous.get("splits", {})}, {**previous.get("source", {})}
    ids = OwnIds([output_dir / entry["file"] for split, entry in entries.items() if split not in splits])
    work = output_dir / ".converting"
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    try:
        with open(work / "rejected.jsonl", "w", encoding="utf-8") as log:
            for split, source in splits.items():
                scratch = work / "scratch" / split
                scratch.mkdir(parents=True)
                source = replace(source, inputs=replace(source.inputs, scratch=scratch))
                entries[split] = _convert_split(split, source, work, on_error, log, ids)
                origins[split] = source.origin()
                shutil.rmtree(scratch, ignore_errors=True)
        dataset: Description = {
            "name": name,
            "converter": ",".join(dict.fromkeys(str(origin["format"]) for origin in origins.values())),
            "converter_version": CONVERTER_VERSION,
            "source": origins,
            **facts,
            "splits": entries,
            "rejected": sum(entry.get("rejected", 0) for entry in entries.values()),
            "leakage": leakage({split: work if split in splits else output_dir for split in entries}, entries),
        }
        _move_into_place(work, output_dir, {split: entries[split] for split in splits}, bool(previous))
        write_json(output_dir / "dataset.json", dataset, indent=2)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dataset


def _refuse_foreign(output_dir: Path, names: dict[str, str]) -> None:
    """Raises DataError for existing content that the converter did not write and would replace."""
    if (output_dir / _MARK).exists():
        return
    for split, name in names.items():
        for path in (output_dir / name, output_dir / "images" / split, output_dir / "dataset.json"):
            if path.exists() or path.is_symlink():
                raise DataError(
                    f"{path}: exists, but the converter did not write it; choose a new or empty output folder"
                )


def _move_into_place(work: Path, output_dir: Path, results: dict[str, SplitEntry], keep: bool) -> None:
    (output_dir / _MARK).touch()
    (output_dir / "dataset.json").unlink(missing_ok=True)
    shutil.rmtree(output_dir / LENGTHS, ignore_errors=True)
    (output_dir / "images").mkdir(exist_ok=True)
    for split, result in results.items():
        shutil.rmtree(output_dir / "images" / split, ignore_errors=True)
        names = (f"images/{split}", result["file"], f"{split}.sha256")
        for name in names if (work / names[0]).exists() else names[1:]:
            os.replace(work / name, output_dir / name)
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


def dataset_sources(name: str, dataset: Dataset, source_dir: str | Path, workers: int = 2) -> dict[str, SplitSource]:
    """The source of each split of an entry, from the downloads in source_dir. Raises DataError."""
    sources: dict[str, SplitSource] = {}
    locked = functools.cache(
        functools.partial(locked_files, source_dir)
    )  # local files are read completely to compare them
    for split, entry in dataset.splits.items():
        folder, files, lock = locked(entry.url, entry.revision)
        digest = _digest([[file.path, file.size, file.sha256] for file in lock.files])
        options = entry.parsed_options()
        if dataset.group_by and "columns" in FORMAT_OPTIONS[entry.format]:
            meta = options.columns.get("meta", [])
            meta = [*([meta] if isinstance(meta, str) else meta), dataset.group_by]
            options = options.model_copy(update={"columns": {**options.columns, "meta": list(dict.fromkeys(meta))}})
        inputs = Inputs(files, folder, options.split or split, name, options, workers=workers)
        revision, first = lock.resolved or entry.revision, (options.turns or dataset.turns) == "first"
        urls = Path(source_dir) / "urls"
        source = SplitSource(entry.format, inputs, entry.url, revision, digest, entry.options, entry.rows, first, urls)
        if dataset.split is None:
            sources[split] = source
        else:
            parts = ("train", "val", "test") if dataset.split.test else ("train", "val")
            sources = {part: replace(source, chosen=(dataset.split, part)) for part in parts}
    return sources


def fetch_pictures(sources: dict[str, SplitSource], workers: int = 8) -> None:
    """Downloads the pictures whose URLs are in rows to the cache of their source. Prints and records failures.

    Raises DataError for rows without the columns, OSError if the disk is full.
    """
    urls: dict[str, None] = {}
    for source in {id(source.inputs): source for source in sources.values() if source.format in ROWS}.values():
        if not any(map(may_name_urls, source.inputs.files)):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            for sample in FORMATS[source.format](replace(source.inputs, only_urls=True, scratch=Path(scratch))):
                for turn in sample.turns if isinstance(sample, Sample) else ():
                    urls |= dict.fromkeys(picture.data for picture in turn.pictures if isinstance(picture.data, str))
        cache, limit = source.urls, int(source.inputs.options.fetch_gb * 1e9)
    if urls:
        files, failures = fetch_urls(urls, cache, limit, workers)
        few = "".join(f"\n  {url}: {reason}" for url, reason in list(failures.items())[:5])
        failed = f"{len(failures)} failed ({cache / FAILURES})"
        print(f"downloaded {number_of(len(files), 'picture')} from URLs in rows, {failed}{few}", file=sys.stderr)


def convert_dataset(
    name: str,
    dataset: Dataset,
    source_dir: str | Path,
    output_dir: str | Path,
    on_error: OnError | None = None,
    workers: int = 2,
) -> Description:
    """Converts an entry of a datasets file from the downloads in source_dir. Raises DataError.

    on_error: None uses the entry's setting.
    """
    facts: Description = {"turns": dataset.turns, "metric": dataset.metric, "num_crops": dataset.num_crops}
    if len(dataset.metrics) > 1:
        facts["metrics"] = dataset.metrics
    if dataset.group_by:
        facts["group_by"] = dataset.group_by
    if dataset.max_new_tokens:
        facts["max_new_tokens"] = dataset.max_new_tokens
    splits = dataset_sources(name, dataset, source_dir, workers)
    return convert(name, splits, output_dir, facts, on_error or dataset.on_error)


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
    options: Mapping[str, OptionValue] | None = None,
    on_error: OnError = "stop",
    workers: int = 2,
) -> Description:
    """Converts a file or folder to one split. Other splits of output_dir stay. Raises DataError."""
    name, given = name or Path(output_dir).resolve().name, dict(options or {})
    entry = validate(Split, {"url": str(source), "format": format_name, "rows": rows, "options": given}, "command line")
    if not source.exists():
        raise DataError(f"--input: {source}: no such file or folder; expected a table, JSON file, archive or folder")
    if source.is_dir():
        root, files = source, sorted(path for path in source.rglob("*") if path.is_file())
        digest = _digest([[path.relative_to(root).as_posix(), path.stat().st_size] for path in files])
    else:
        root, files, digest = source.parent, [source], digest_file(source)
    parsed = entry.parsed_options()
    if images_dir:
        parsed = parsed.model_copy(update={"images_dir": str(images_dir.resolve())})
    inputs = Inputs(files, root, parsed.split or split, name, parsed, workers=workers)
    cache = Path(output_dir) / ".urls"
    splits = {split: SplitSource(format_name, inputs, str(source), None, digest, given, rows, turns == "first", cache)}
    fetch_pictures(splits)
    facts: Description = {"turns": turns, "metric": metric, "num_crops": num_crops}
    return convert(name, splits, output_dir, facts, on_error, keep_other_splits=True)
