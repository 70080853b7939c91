"""What a converter yields: one sample a source row, or the reason why the row cannot be taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from phi3v.data.conversations import DataError, image_path_problem, shown, text_problem

R = TypeVar("R")


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
    """What a converter reads."""

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

    def option(self, name: str, default: str) -> str:
        """A converter option or its default."""
        return self.options.get(name, default)

    @property
    def images_dir(self) -> Path:
        """Where relative image paths start."""
        return self.root / self.options.get("images_dir", ".")

    def row_id(self, row: int) -> str:
        """Id of a source row that has none of its own."""
        return f"{self.source}-{self.split}-{row:08d}"


def each_row(
    rows: Iterator[tuple[str, int, R]], build: Callable[[str, int, R], Sample]
) -> Iterator[Sample | Rejection]:
    """Build a sample of each (where, row number, row); a row that raises DataError becomes a Rejection."""
    for where, number, row in rows:
        try:
            yield build(where, number, row)
        except DataError as error:
            reason = str(error)
            yield Rejection(where, reason.removeprefix(f"{where}: "))


def file_under(root: Path, path: object, where: str, field_name: str) -> tuple[Path, str]:
    """(file, its path under root) of an image path in a table or json. Raises DataError unless it lies inside root and
    is a file."""
    if expected := image_path_problem(path) or text_problem(path):
        raise DataError(f"{where}: field `{field_name}`: got {shown(path)}; expected {expected}")
    assert isinstance(path, str)
    file = root / path
    try:
        inside, there = file.resolve().is_relative_to(root.resolve()), file.is_file()
    except OSError as error:  # a name that the file system cannot have
        raise DataError(
            f"{where}: field `{field_name}`: got {shown(path)}: {error.strerror}; expected a file in {root}"
        ) from None
    if not inside:
        raise DataError(
            f"{where}: field `{field_name}`: got {shown(path)}: a link out of {root}; expected a file inside it"
        )
    if not there:
        raise DataError(f"{where}: field `{field_name}`: got {shown(path)}: no such file in {root}")
    return file, path
