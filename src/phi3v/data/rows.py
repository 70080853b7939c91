"""Source rows: finds and reads the files of a split (tables, JSON, parquet, Hugging Face datasets, archives).

Every reader yields (location, row number, row). A row that cannot be read is a DataError in place of the row. Tables,
JSON and parquet have readers here, because `datasets` converts texts to dates and numbers, fills objects with nulls,
does not name rows in errors, and keeps a row group of pictures in memory. `datasets` finds the files of a split, and
reads saved datasets and tar files of samples.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import functools
import itertools
import json
import os
import posixpath
import re
import shutil
import stat
import sys
import tarfile
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import TextIO

from phi3v.data.conversations import DataError, decode_line, image_path_problem, quoted, raw_lines
from phi3v.settings import Options

Row = dict[str, object]
Rows = Iterator[tuple[str, int, Row | DataError]]
"""(file and row for messages, number from 0, the row or its error)"""

BATCH_ROWS = 32
"""Parquet rows in memory at a time."""

BLOCK = 2**20
"""Characters of a JSON list, or bytes of a table, to read at a time."""

MAX_ITEM = 2**26
"""Longest item of a JSON list in characters. A longer one is treated as malformed."""

MAX_RECORD_LINES = 1000
"""Most lines of a quoted table field. In a longer one, the quotation mark is ordinary text."""

MAX_UNPACKED_BYTES = 200 * 10**9
"""Largest unpacked size of an archive, as a protection against archive bombs."""

TABLES = (".csv", ".tsv", ".txt")
SUFFIXES = (*TABLES, ".json", ".jsonl", ".parquet", ".tar")
"""Suffixes of files that read_rows reads."""

JUNK = ("._*", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX")
"""Names of files and folders that operating systems create. They are ignored."""

SPLIT_NAMES = {"val": "validation"}
"""Our names of splits to the hub's names."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a sample: encoded bytes, a file that contains them, or a URL that was downloaded before."""

    data: bytes | Path | str
    name: str = ""
    """Path under images/SPLIT. Empty: the writer numbers it."""
    page: int | None = None
    """Page of a TIFF or PDF file, from 1. None: all pages."""
    decoded: bool = False
    """Whether `data` is a frame of a clip, which this package encoded from decoded pixels."""


@dataclass(frozen=True, slots=True)
class SampleTurn:
    """A question, its pictures and its accepted answers. The first answer is the training target."""

    pictures: tuple[Picture, ...]
    user: str
    answers: tuple[str, ...]
    """Empty only with the option `unlabelled`."""
    system: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """An example before it is written."""

    where: str
    """File and row in the source, for messages."""
    id: str
    """Id from the source, or one made from the row number."""
    turns: tuple[SampleTurn, ...]
    meta: dict[str, str] = field(default_factory=dict)
    """Attributes of the example in the source."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A source row that cannot be converted."""

    where: str
    reason: str


@dataclass(frozen=True)
class Inputs:
    """Input of a format."""

    files: list[Path]
    """Source files, in order."""
    root: Path
    """Folder of the files. Picture paths in tables or JSON are relative to it, or to its option images_dir."""
    split: str
    """Name of the split inside the source."""
    source: str
    """Name of the dataset."""
    options: Options = field(default_factory=Options)
    scratch: Path = Path("scratch")
    """Empty folder for unpacked files, which is removed afterwards."""
    workers: int = 1
    """Pictures and clips to decode in parallel."""
    only_urls: bool = False
    """Read only the URLs of pictures, and decode no clips."""
    untaken: dict[str, str] = field(default_factory=dict)
    """Files that a format skips, and why. Formats add them while reading."""

    @functools.cached_property
    def images_dir(self) -> Path:
        """Folder that relative picture paths start from."""
        return self.root / self.options.images_dir

    def row_id(self, row: int) -> str:
        """Id of a source row that has no id."""
        return f"{self.source}-{self.split}-{row:08d}"

    def own_files(self, suffixes: tuple[str, ...]) -> list[Path]:
        """The files of option `file`, or all files with one of the suffixes. Raises DataError if there is none."""
        named, files = self.options.file, [path for path in self.files if not is_junk(path.relative_to(self.root))]
        if named:
            found = [path for path in files if fnmatch.fnmatchcase(path.relative_to(self.root).as_posix(), named)]
        else:
            found = [path for path in files if path.suffix.lower() in suffixes]
        if not found:
            raise DataError(
                f"{self.root}: no file matches {named or ', '.join(suffixes)}{near(named, map(str, files))}"
            )
        return found

    def only(self, *suffixes: str) -> Path:
        """The only file with one of the suffixes, or the file of option `file`. Raises DataError if there are
        several."""
        found = self.own_files(suffixes)
        if len(found) != 1:
            raise DataError(
                f"{self.root}: got {len(found)} files matching {self.options.file or ', '.join(suffixes)}; expected "
                "one "
                "(select it with option `file`)"
            )
        return found[0]


def is_junk(path: PurePath) -> bool:
    """Whether an operating system created the file. path: relative to the source."""
    return any(fnmatch.fnmatchcase(part, pattern) for part in path.parts for pattern in JUNK)


def may_name_urls(path: Path) -> bool:
    """Whether rows of a file can contain URLs. False for pictures, and for text files without a URL."""
    kind = path.suffix.lower()
    if kind not in (*TABLES, ".json", ".jsonl"):
        return kind in (*SUFFIXES, ".arrow")
    end = b""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            if re.search(rb":\0?\\?/\0?\\?/", end + block):
                return True
            end = block[-8:]
    return False


def near(name: str, known: Iterator[str] | list[str]) -> str:
    """End of a message: the valid name that is most similar to a wrong one, if any."""
    folded = {other.casefold(): other for other in known}
    found = difflib.get_close_matches(name.casefold(), folded, 1, 0.7) if name else []
    return f"; did you mean `{folded[found[0]]}`?" if found else ""


def each_row(rows: Rows, build: Callable[[str, int, Row], Sample]) -> Iterator[Sample | Rejection]:
    """Builds a sample from each (location, row number, row). A row that raises DataError becomes a Rejection."""
    for where, number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"{where}: got {quoted(row)}; expected an object")
            yield build(where, number, row)
        except DataError as error:
            yield Rejection(where, str(error).removeprefix(f"{where}: "))


def some_text(value: object, where: str, field_name: str) -> str:
    """Text without surrounding white space. Raises DataError if nothing is left."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field `{field_name}`: got {quoted(value)}; expected some text")
    return value.strip()


@functools.lru_cache(maxsize=1000)
def _real(root: Path) -> str:
    return os.path.realpath(root)


@functools.lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, str]:
    """Names in a folder by their normalized form, and by that form without suffix."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    folded = {unicodedata.normalize("NFC", name).casefold(): name for name in sorted(names)}
    return {PurePosixPath(key).stem: name for key, name in folded.items()} | folded


def picture_under(root: Path, path: object, where: str, field_name: str) -> Picture:
    """The picture (or clip) of a path in a table or JSON file. Raises DataError unless it is a file inside root.

    Absolute paths, `./` and `\\` are accepted if the file is inside root. A name with decomposed letters, as macOS
    writes them, matches the composed ones.
    """
    seen = f"{where}: field `{field_name}`: got {quoted(path)}"
    if not isinstance(path, str):
        raise DataError(f"{seen}; expected a string")
    name, own = path.removeprefix("file://"), _real(root)
    if name.startswith("/"):
        inside = [base for base in (os.path.abspath(root), own) if name.startswith(f"{base}/")]
        if not inside:
            raise DataError(
                f"{seen}; expected a relative path, or one inside {root} (to change that folder, set option "
                "`images_dir`)"
            )
        name = name[len(inside[0]) + 1 :]
    name = posixpath.normpath(name.replace("\\", "/")) if name else name
    if expected := image_path_problem(name):
        raise DataError(f"{seen}; expected {expected} (option `images_dir` sets that folder, currently {root})")
    file = f"{root}/{name}"
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        forms = [f"{root}/{unicodedata.normalize(form, name)}" for form in ("NFC", "NFD")]
        file = next(filter(os.path.isfile, forms), "")
        if not file:
            wrong = PurePosixPath(unicodedata.normalize("NFC", name).casefold())
            known = _names((root / name).parent)
            like = known.get(wrong.name) or known.get(wrong.stem)
            hint = f"; did you mean `{like}`?" if like else " (to use another folder, set option `images_dir`)"
            raise DataError(f"{seen}: no such file in {root}{hint}") from None
    except OSError as error:  # a name that the file system does not support
        raise DataError(f"{seen}: {error.strerror}; expected a file in {root}") from None
    folder, base = os.path.split(file)
    if not (os.path.realpath(file) if os.path.islink(file) else f"{_real(Path(folder))}/{base}").startswith(f"{own}/"):
        raise DataError(f"{seen}: got a link to a file outside {root}; expected a file inside it")
    return Picture(Path(file), name)


def read_rows(inputs: Inputs) -> Rows:
    """The rows of a split, for any supported type of files. Raises DataError."""
    if any(path.name in ("state.json", "dataset_dict.json") for path in inputs.files):
        yield from _saved_rows(inputs)
        return
    options, numbers = inputs.options, itertools.count()
    for path in _split_files(inputs):
        kind = path.suffix.lower()
        if kind == ".parquet":
            yield from parquet_rows(path, numbers)
        elif kind == ".tar":
            yield from _sample_rows(inputs, path, numbers)
        elif kind in (".json", ".jsonl"):
            yield from json_rows(path, numbers, options.field)
        else:
            yield from table_rows(path, numbers, options.encoding, options.delimiter)


def _split_files(inputs: Inputs) -> list[Path]:
    """The files of the split: those of option `file`, the only file, or those that `datasets` finds."""
    options = inputs.options
    found = [] if options.config else inputs.own_files(SUFFIXES)
    if options.file or len(found) == 1:
        return found
    name, datasets = SPLIT_NAMES.get(inputs.split, inputs.split), _datasets()
    try:
        builder = datasets.load_dataset_builder(
            str(inputs.root), options.config or None, cache_dir=str(inputs.scratch / "datasets")
        )
        splits = {str(split): list(map(Path, paths)) for split, paths in (builder.config.data_files or {}).items()}
    except Exception as error:  # `datasets` raises many types
        reason, splits = str(error).splitlines()[0], {}
    else:
        reason = f"splits {', '.join(sorted(splits))}"
    files = splits.get(inputs.split) or splits.get(name) or []
    if wrong := [path for path in files if path.suffix.lower() not in SUFFIXES]:
        raise DataError(f"{wrong[0]}: got suffix {wrong[0].suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if not files:
        raise DataError(
            f"{inputs.root}: got {len(found)} files with rows, but none for split {inputs.split!r} ({reason}); select "
            "the files with option `file` (a name or pattern), `config` (a configuration) or `split` (another split)"
        )
    return files


def _datasets():  # type: ignore[no-untyped-def]
    """Hugging Face `datasets`, without network access and progress bars."""
    import datasets

    datasets.config.HF_HUB_OFFLINE, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = True, False
    datasets.disable_progress_bars()
    return datasets


def _saved_rows(inputs: Inputs) -> Rows:
    """Rows of a folder that save_to_disk wrote. Pictures stay encoded."""
    try:
        data = _datasets().load_from_disk(str(inputs.root))
    except (OSError, ValueError) as error:
        raise DataError(f"{inputs.root}: cannot be read as a saved dataset: {error}") from None
    if isinstance(data, dict):
        name = inputs.split if inputs.split in data else SPLIT_NAMES.get(inputs.split, inputs.split)
        if name not in data:
            raise DataError(
                f"{inputs.root}: no split {name!r}; expected one of {', '.join(data)} (select it with option `split`)"
            )
        data = data[name]
    number = 0
    for table in data.with_format("arrow").iter(BATCH_ROWS):
        for row in table.to_pylist():
            yield f"{inputs.root.name}: row {number}", number, row
            number += 1


def _sample_rows(inputs: Inputs, path: Path, numbers: Iterator[int]) -> Rows:
    """Samples of a tar file in the WebDataset layout, with a column for each suffix, and `__key__`."""
    datasets = _datasets()
    try:
        data = datasets.load_dataset(
            "webdataset",
            data_files=str(path),
            split="train",
            streaming=True,
            cache_dir=str(inputs.scratch / "datasets"),
        )
        for column, feature in data.features.items():
            if hasattr(feature, "decode"):
                data = data.cast_column(column, type(feature)(decode=False))
        for row in data:
            yield f"{path.name}: {row['__key__']}", next(numbers), row
    except (OSError, ValueError, TypeError, tarfile.TarError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{path}: cannot be read as a tar file of samples: {error}") from None


def parquet_rows(path: Path, numbers: Iterator[int], columns: list[str] | None = None) -> Rows:
    """Rows of a parquet file. Raises DataError if a column is missing."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix != ".parquet":
        raise DataError(f"{path}: not a .parquet file; expected only parquet files in this source")
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := sorted(set(columns or []) - set(names)):
                raise DataError(
                    f"{path}: column `{missing[0]}`: missing; expected {', '.join(columns or [])}; got "
                    f"{', '.join(names)}"
                )
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number = next(numbers)
                    yield f"{path.name}: row {number}", number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None


def _encoding(path: Path) -> str:
    """UTF-8 or UTF-16, from the byte order mark or the content. Otherwise cp1252, with a notice."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in start:
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            while text.read(BLOCK):
                pass
    except UnicodeDecodeError:
        print(f"{path}: not UTF-8; reading it as cp1252 (to change this, set option `encoding`)", file=sys.stderr)
        return "cp1252"
    return "utf-8-sig"


def _records(file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(last line, cells) of each record. A quotation mark that does not open a field is ordinary text."""
    again, number = deque[str](), 0
    while line := again.popleft() if again else file.readline():
        lines = [line]
        while True:
            try:
                cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
                # A field with a tab and a line end is really two rows that each start a field with a quotation mark.
                whole = delimiter != "\t" or len(lines) == 1 or not any("\t" in c and "\n" in c for c in cells)
                break
            except csv.Error as error:
                open_field = "unexpected end" in str(error) and len(lines) < MAX_RECORD_LINES
                whole = bool(open_field and (line := again.popleft() if again else file.readline()))
                if not whole:
                    break
                lines.append(line)
        if not whole:
            again.extendleft(reversed(lines[1:]))
            lines, cells = lines[:1], lines[0].rstrip("\r\n").split(delimiter)
        number += len(lines)
        yield number, cells


def table_rows(path: Path, numbers: Iterator[int], encoding: str = "", delimiter: str = "") -> Rows:
    """Rows of a CSV or TSV with a header. The default delimiter is the one that splits the header into most columns."""
    csv.field_size_limit(2**24)
    encoding = encoding or _encoding(path)
    try:
        with open(path, encoding=encoding, newline="") as file:
            if not delimiter:
                line = file.readline()
                marks = (",", "\t", ";") if path.suffix.lower() == ".csv" else ("\t", ",", ";")
                delimiter = max(marks, key=lambda mark: len(next(csv.reader([line], delimiter=mark), [])))
                file.seek(0)
            records = _records(file, delimiter)
            header = [name.strip() for name in next(records, (0, list[str]()))[1]]
            if not any(header):
                raise DataError(f"{path}: empty; expected a header and rows")
            for (line_number, cells), number in zip(records, numbers, strict=False):
                where = f"{path.name}:{line_number}"
                if len(cells) != len(header) and cells:
                    yield (
                        where,
                        number,
                        DataError(
                            f"got {len(cells)} fields with delimiter {delimiter!r}; expected {len(header)}, as in the "
                            "header "
                            "(to change the delimiter, set option `delimiter`)"
                        ),
                    )
                elif any(cells):  # spreadsheets write empty lines, and column names that are empty or repeated
                    yield where, number, dict(zip(header, cells, strict=True))
    except (csv.Error, UnicodeError, LookupError) as error:
        raise DataError(
            f"{path}: not a table in {encoding}: {error} (to change the encoding, set option `encoding`)"
        ) from None


def json_rows(path: Path, numbers: Iterator[int], field_name: str = "") -> Rows:
    """Items of a JSON list or lines of a JSONL file, one at a time, so that memory does not grow with the file.

    field_name: the list is this field of one JSON object, which is read completely.
    """
    if field_name:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        data = content.get(field_name) if isinstance(content, dict) else None
        if not isinstance(data, list):
            raise DataError(
                f"{path}: got no list `{field_name}`; expected a JSON object with this list (option `field`)"
            )
        yield from ((f"{path.name}: {field_name}[{k}]", next(numbers), item) for k, item in enumerate(data))
        return
    with open(path, "rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            yield from _list_items(path, numbers)
            return
        file.seek(0)
        for (line_number, line), number in zip(raw_lines(file), numbers, strict=False):
            line = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
            if not line.isspace():
                row: Row | DataError
                try:
                    row = decode_line(line.rstrip(b"\r\n"))
                except ValueError as error:
                    row = DataError(f"{error}; expected a JSON list, or one JSON object per line")
                yield f"{path.name}:{line_number}", number, row


def _list_items(path: Path, numbers: Iterator[int]) -> Rows:
    decoder, separator, number = json.JSONDecoder(), re.compile(r"\s*([,\]])\s*"), 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            text, position = file.read(BLOCK).partition("[")[2].lstrip(), 0
            while not (number == 0 and text.startswith("]")):
                try:
                    item, end = decoder.raw_decode(text, position)
                    # Only an item before a separator is complete. A number at the end of a block may continue.
                    if (found := separator.match(text, end)) is None:
                        raise json.JSONDecodeError("Expected a comma or the list's end", text, end)
                except (json.JSONDecodeError, RecursionError) as error:
                    left = len(text) - position
                    broken = isinstance(error, RecursionError) or left > MAX_ITEM
                    if broken or not (block := file.read(max(BLOCK, left))):
                        raise DataError(f"{path}: item {number}: not JSON: {error}") from None
                    text, position = (text[position:] + block).lstrip(), 0
                    continue
                yield f"{path.name}: item {number}", next(numbers), item
                number, position = number + 1, found.end()
                if found[1] == "]":
                    return
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: item {number}: not UTF-8: {error}") from None


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Unpacks the wanted files of a tar archive (compressed or not) to a folder. Yields their names in archive order.

    Raises DataError for any member that leaves the folder, is a link or is a device, wanted or not. (Python 3.11.2 in
    Debian 12 has no tarfile.data_filter, which also accepts links.)
    """
    total, seen = 0, set[str]()
    try:
        with tarfile.open(archive, "r|*") as file:
            for member in file:
                path = PurePosixPath(member.name)
                name = path.as_posix()
                expected = ""
                if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
                    expected = "only files and folders inside it, no absolute path, `..`, link or device"
                elif member.isdir() or not wanted(name):
                    continue
                elif name in seen:
                    expected = "each file once"
                elif total + member.size > MAX_UNPACKED_BYTES or member.size > shutil.disk_usage(folder).free:
                    expected = f"less than its {total + member.size} bytes so far, and enough free space"
                if expected:
                    raise DataError(f"{archive}: got member {quoted(member.name)}; expected {expected}")
                seen.add(name)
                total += member.size
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content = file.extractfile(member)
                assert content is not None, "a regular member has content"
                with open(folder / name, "xb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                yield name
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, tarfile.TarError):
            raise  # gzip and xz report damaged data as OSError without errno; this one comes from the disk
        raise DataError(f"{archive}: incomplete or damaged tar archive: {error}") from None
