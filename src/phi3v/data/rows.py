"""Source rows: what a format reads (files, tables, JSON, parquet, archives) and the samples that it yields.

A format turns each (where, row number, row) into a Sample; a row that it cannot take becomes a Rejection.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from phi3v.data.conversations import DataError, decode_line, image_path_problem, raw_lines, shown, text_problem

R = TypeVar("R")

BATCH_ROWS = 32
"""Parquet rows held in memory at a time."""

BLOCK = 2**20
"""Characters of a JSON list read at a time."""

MAX_ITEM = 2**26
"""A JSON list's item that does not end within so many characters is broken."""

MAX_UNPACKED_BYTES = 200 * 10**9
"""An archive that unpacks to more is refused: it is a bomb, or not the recipe's data."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a sample: encoded bytes, or a file that holds them."""

    data: bytes | Path
    name: str = ""
    """Its path under images/SPLIT; empty: the writer numbers it."""


@dataclass(frozen=True, slots=True)
class SampleTurn:
    """A question, its pictures and its accepted answers (the first is the one that trains)."""

    pictures: tuple[Picture, ...]
    user: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One example before it is written."""

    where: str
    """File and row it comes from, for messages."""
    id: str
    """Unique in the dataset."""
    turns: tuple[SampleTurn, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A source row that cannot be taken."""

    where: str
    reason: str


@dataclass(frozen=True)
class Inputs:
    """What a format reads."""

    files: list[Path]
    """Source files, in order."""
    root: Path
    """Folder they lie in; image paths of a table or json start here (or at its option images_dir)."""
    split: str
    """Name of the split being made."""
    source: str
    """Name of the dataset."""
    options: dict[str, str] = field(default_factory=dict)
    scratch: Path = Path("scratch")
    """Empty folder for unpacked files, removed afterwards."""
    workers: int = 1
    """Clips decoded side by side."""

    @property
    def images_dir(self) -> Path:
        """Where relative image paths start."""
        return self.root / self.options.get("images_dir", ".")

    def row_id(self, row: int) -> str:
        """Id of a source row that has none of its own."""
        return f"{self.source}-{self.split}-{row:08d}"

    def only(self, *suffixes: str) -> Path:
        """The one file with one of the suffixes; the option `file` names it if there are several. Raises DataError."""
        named = self.options.get("file")
        found = [
            path
            for path in self.files
            if (path.relative_to(self.root).as_posix() == named if named else path.suffix.lower() in suffixes)
        ]
        if len(found) != 1:
            raise DataError(
                f"{self.root}: {len(found)} files {named or ', '.join(suffixes)}; expected one (option `file` names it)"
            )
        return found[0]


def each_row(
    rows: Iterator[tuple[str, int, R]], build: Callable[[str, int, R], Sample]
) -> Iterator[Sample | Rejection]:
    """Build a sample of each (where, row number, row); a row that raises DataError becomes a Rejection."""
    for where, number, row in rows:
        try:
            yield build(where, number, row)
        except DataError as error:
            yield Rejection(where, str(error).removeprefix(f"{where}: "))


def each_object(
    rows: Iterator[tuple[str, int, object]], build: Callable[[str, int, dict[str, object]], Sample]
) -> Iterator[Sample | Rejection]:
    """each_row for items of JSON, each of which must be an object."""

    def checked(where: str, number: int, item: object) -> Sample:
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {shown(item)}; expected an object")
        return build(where, number, item)

    return each_row(rows, checked)


def some_text(value: object, where: str, field_name: str) -> str:
    """A text without the white space around it. Raises DataError if nothing is left."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field `{field_name}`: got {shown(value)}; expected some text")
    return value.strip()


def accepted_answers(value: object, where: str) -> tuple[str, ...]:
    """The different texts of a list of answers, in order. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: field `answers`: got {shown(value)}; expected a list of accepted answers")
    return tuple(dict.fromkeys(some_text(answer, where, f"answers[{k}]") for k, answer in enumerate(value)))


def picture_under(root: Path, path: object, where: str, field_name: str) -> Picture:
    """The picture (or clip) of an image path in a table or json. Raises DataError unless it is a file inside root."""
    expected = image_path_problem(path) or text_problem(path)
    seen = f"{where}: field `{field_name}`: got {shown(path)}"
    if expected or not isinstance(path, str):
        raise DataError(f"{seen}; expected {expected}")
    file = root / path
    try:
        inside, there = file.resolve().is_relative_to(root.resolve()), file.is_file()
    except OSError as error:  # a name that the file system cannot have
        raise DataError(f"{seen}: {error.strerror}; expected a file in {root}") from None
    if not inside:
        raise DataError(f"{seen}: a link out of {root}; expected a file inside it")
    if not there:
        raise DataError(f"{seen}: no such file in {root}")
    return Picture(file, path)


def parquet_rows(inputs: Inputs, columns: list[str]) -> Iterator[tuple[str, int, dict[str, object]]]:
    """(where, number over all files, row) of parquet files. Raises DataError for a file without the columns."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    for path in inputs.files:
        if path.suffix != ".parquet":
            raise DataError(f"{path}: not a .parquet file; expected the parquet files of the source only")
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                names = file.schema_arrow.names
                if missing := sorted(set(columns) - set(names)):
                    raise DataError(
                        f"{path}: column `{missing[0]}`: missing; expected {', '.join(columns)}; got {', '.join(names)}"
                    )
                for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        yield f"{path.name}: row {number}", number, row
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as parquet: {error}") from None


def table_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, int, dict[str, str]]]:
    """(file:line, number, row) of a CSV (suffix .csv) or TSV with a header. Raises DataError without the columns.

    Under the key "" a row has the number of its fields beyond the header's.
    """
    csv.field_size_limit(2**24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t", strict=True)
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                raise DataError(
                    f"{path}:1: column `{missing[0]}`: missing; expected {', '.join(columns)}; got {shown(header)}"
                )
            for number, cells in enumerate(reader):
                if cells:  # a spreadsheet may name columns "" or twice, and leave lines empty
                    row = dict(zip(header, cells, strict=False)) | {"": str(len(cells) - len(header))}
                    yield f"{path.name}:{reader.line_num}", number, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table in UTF-8: {error}") from None


def json_items(path: Path) -> Iterator[tuple[str, int, object]]:
    """(where, number, item) of a JSON list or of a jsonl, one item at a time: memory does not grow with the file."""
    with open(path, "rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            yield from _list_items(path)
            return
        file.seek(0)
        for number, line in raw_lines(file):
            try:
                yield f"{path.name}:{number}", number - 1, decode_line(line.rstrip(b"\r\n"))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None


def _list_items(path: Path) -> Iterator[tuple[str, int, object]]:
    decoder, separator, number = json.JSONDecoder(), re.compile(r"\s*([,\]])\s*"), 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            text, position = file.read(BLOCK).partition("[")[2].lstrip(), 0
            while not (number == 0 and text.startswith("]")):
                try:
                    item, end = decoder.raw_decode(text, position)
                    # Only what stands before a separator is whole: a number at the block's end may continue.
                    if (found := separator.match(text, end)) is None:
                        raise json.JSONDecodeError("Expected a comma or the list's end", text, end)
                except (json.JSONDecodeError, RecursionError) as error:
                    left = len(text) - position
                    broken = isinstance(error, RecursionError) or left > MAX_ITEM
                    if broken or not (block := file.read(max(BLOCK, left))):
                        raise DataError(f"{path}: item {number}: not JSON: {error}") from None
                    text, position = (text[position:] + block).lstrip(), 0
                    continue
                yield f"{path.name}: item {number}", number, item
                number, position = number + 1, found.end()
                if found[1] == "]":
                    return
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: item {number}: not UTF-8: {error}") from None


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Unpack the wanted files of a tar (compressed or not) into a folder; yields their names in the archive's order.

    A member that leaves the folder, a link or a device stops everything (DataError), wanted or not: such an archive is
    not what it claims to be.
    """
    total, seen = 0, set[str]()
    try:
        with tarfile.open(archive, "r|*") as file:
            for member in file:
                where = f"{archive}: member {shown(member.name)}"
                # tarfile.data_filter is not in Python 3.11.2, which Debian 12 has, and takes links.
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
                    raise DataError(
                        f"{where}: an absolute path, `..`, a link or a device; expected files and folders inside it only"
                    )
                name = path.as_posix()
                if not member.isreg() or not wanted(name):
                    continue
                if name in seen:
                    raise DataError(f"{where}: there twice; expected each once")
                seen.add(name)
                total += member.size
                if total > MAX_UNPACKED_BYTES or member.size > shutil.disk_usage(folder).free:
                    raise DataError(f"{where}: {total} bytes unpacked so far; expected less, and enough free space")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = file.extractfile(member)
                assert content is not None, "a regular member has content"
                with open(target, "xb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                yield name
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError) as error:
        raise DataError(f"{archive}: not a whole tar archive: {error}") from None
    except OSError as error:
        if error.errno is None:  # gzip and xz report damaged data as an OSError without a number
            raise DataError(f"{archive}: not a whole tar archive: {error}") from None
        raise
