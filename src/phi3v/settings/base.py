"""What all settings share: strict models, field roles, error messages, and YAML files."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class Role(StrEnum):
    """How changing a field affects the result. A field without a role is `RECIPE`."""

    IDENTITY = "identity"
    """Names the result, or locates inputs and outputs. Results compare the contents by digest instead."""
    PUBLISHED = "published"
    """The published figure to compare with, where it was measured, and notes about it."""
    RECIPE = "recipe"
    """Determines the result."""
    NUMERICS = "numerics"
    """Requested dtype and kernels. The manifest records which ones ran."""
    EQUIVALENT = "equivalent"
    """Another value gives the same updates up to rounding, or the same recipe with another seed."""
    RUNTIME = "runtime"
    """Does not change a byte of the result."""


@dataclass(frozen=True)
class Bare:
    """Marks a field whose flag can be given without a value."""

    yes: str
    """What the bare flag means."""
    no: str | None = None
    """What --no-FLAG means. If None, there is no such flag."""


@functools.cache
def fields_with(model: type[BaseModel], *roles: Role) -> tuple[str, ...]:
    """Names of the model's fields that have one of the roles, ordered by role and then by declaration."""

    def role(name: str) -> Role:
        return next((mark for mark in model.model_fields[name].metadata if isinstance(mark, Role)), Role.RECIPE)

    return tuple(name for wanted in roles for name in model.model_fields if role(name) is wanted)


@functools.cache
def accepted_names(model: type[BaseModel]) -> frozenset[str]:
    """All names that a model accepts for its fields, aliases included."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names |= {choice for choice in field.validation_alias.choices if isinstance(choice, str)}
    return frozenset(names)


class Strict(
    BaseModel,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    protected_namespaces=(),
    allow_inf_nan=False,
):
    """Rejects unknown fields. The docstring under a field is its description."""


_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password in a URL. Error messages hide them."""


class SettingsError(ValueError):
    """A wrong setting. The message names the file, row, field, value, and what was expected."""


def number_of(count: int, noun: str, plural: str = "") -> str:
    """`1 picture`, `1,200 pictures`, for messages. plural: if it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def check_choice(where: str, field: str, value: str, choices: Iterable[str]) -> None:
    """Raises SettingsError if the value is not one of the choices."""
    if value not in choices:
        raise SettingsError(f"{where}: field `{field}`: got {value!r}: expected one of {', '.join(sorted(choices))}")


def explain(
    error: ValidationError, where: str, typed: Mapping[str, str] | None = None, model: type[BaseModel] | None = None
) -> SettingsError:
    """One line per problem: location, field, value, and what was expected.

    typed: field to the alias that the user typed. The message names both. model: whose fields an unknown one may mean.
    """
    other = {name: f" (given as {alias})" for name, alias in (typed or {}).items()}
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        expected = item["msg"].removeprefix("Value error, ")
        name = expected.partition(":")[0]
        if not field and name in other:
            expected = expected.replace(name, f"{name}{other[name]}", 1)
        if item["type"] == "extra_forbidden":
            like = difflib.get_close_matches(str(item["loc"][-1]), _fields(model) if model else [], 1)
            expected = (
                f"unknown field; did you mean `{like[0]}`?" if like else "unknown field; remove it or correct its name"
            )
        elif item["type"] == "missing":
            lines.append(f"{where}: field `{field}`: missing; expected a value")
            continue
        value = _IN_URL.sub("***@", repr(item["input"]))
        # If several fields conflict, the input is the whole mapping and the message already names the field.
        got = "" if item["type"] == "value_error" and isinstance(item["input"], Mapping) else f" got {value}:"
        at = f"field `{field}`{other.get(field, '')}:{got} " if field else ""
        lines.append(f"{where}: {at}{expected}")
    return SettingsError("\n".join(lines))


def _fields(model: type[BaseModel]) -> list[str]:
    """Names of the fields of a model and of the models in it."""
    schema = model.model_json_schema()
    return sorted({name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", {})})


def validate(model: type[M], values: Any, where: str) -> M:
    """Parses `values` as `model`. Raises SettingsError that starts each problem with `where`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, where, model=model) from None


class _UniqueKeys(yaml.SafeLoader):
    """Rejects a mapping that contains a key twice. YAML itself would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"field `{key}` appears twice; remove one of them", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping. Raises SettingsError if it is missing, empty or malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: got {'an empty file' if values is None else type(values).__name__}; expected `field: value` lines"
        )
    return values


def read_entries(paths: list[str], model: type[M], root: Path) -> dict[str, M]:
    """Reads named entries from YAML files. Raises SettingsError if two files define the same name."""
    entries: dict[str, M] = {}
    for path in paths:
        for name, values in read_yaml(root / path).items():
            if name in entries:
                raise SettingsError(
                    f"{path}: entry `{name}`: already defined in an earlier file of this run; rename one of them"
                )
            entries[name] = validate(model, values, f"{path}: entry `{name}`")
    return entries
