"""YAML entries and tab-separated tables into settings, with errors that name file, row, field, value, expectation."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from phi3v.settings.rows import Training

M = TypeVar("M", bound=BaseModel)


_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password of a URL: never shown."""


class SettingsError(ValueError):
    """A wrong setting; the message names file, row, field, value and what was expected."""


def explain(error: ValidationError, where: str) -> SettingsError:
    """One line per problem: where, field, value, what was expected."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        expected = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            expected = "unknown field; no such setting"
        elif item["type"] == "missing":
            lines.append(f"{where}: field `{field}`: missing; expected a value")
            continue
        value = _IN_URL.sub("***@", repr(item["input"]))
        at = f"field `{field}`: got {value}: " if field else ""
        lines.append(f"{where}: {at}{expected}")
    return SettingsError("\n".join(lines))


def validate(model: type[M], values: Any, where: str) -> M:
    """`values` as `model`; raises SettingsError with `where` in front of each problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, where) from None


class _UniqueKeys(yaml.SafeLoader):
    """A mapping that names a key twice is an error; YAML itself would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"field `{key}` is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises SettingsError when missing, empty or malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got {'nothing' if values is None else type(values).__name__}; expected fields")
    return values


def read_entries(paths: list[str], model: type[M], root: Path) -> dict[str, M]:
    """Named entries of YAML files; the same name twice is an error."""
    entries: dict[str, M] = {}
    for path in paths:
        for name, values in read_yaml(root / path).items():
            if name in entries:
                raise SettingsError(f"{path}: entry `{name}`: already defined by an earlier file of this run")
            entries[name] = validate(model, values, f"{path}: entry `{name}`")
    return entries


RowT = TypeVar("RowT", bound=Training)


def read_table(path: str, model: type[RowT], root: Path) -> list[RowT]:
    """Rows of a tab-separated table with a header; lines that start with # are comments, empty cells are defaults."""
    try:
        lines = (root / path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}); expected a tab-separated table") from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise SettingsError(f"{path}: empty; expected a header line and rows")
    header = numbered[0][1].split("\t")
    for column in header:
        if column not in model.model_fields:
            raise SettingsError(
                f"{path}: line {numbered[0][0]}: column {column!r}: unknown; expected {', '.join(model.model_fields)}"
            )
    if len(set(header)) != len(header):
        raise SettingsError(f"{path}: line {numbered[0][0]}: a column is named twice; expected each once")
    rows = []
    for number, line in numbered[1:]:
        cells = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))
        if len(cells) != len(header):
            raise SettingsError(
                f"{path}: line {number}: {len(cells)} fields; expected {len(header)}, separated by tabs"
            )
        values = {column: cell for column, cell in zip(header, cells, strict=True) if cell != ""}
        rows.append(validate(model, values, f"{path}: line {number}: row `{values.get('row', '')}`"))
    if not rows:
        raise SettingsError(f"{path}: a header but no rows; expected at least one")
    return rows


def read_tables(paths: list[str], model: type[RowT], root: Path) -> list[tuple[str, RowT]]:
    """(file, row) of every row of several tables."""
    return [(path, row) for path in paths for row in read_table(path, model, root)]
