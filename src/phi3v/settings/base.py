"""What all settings share: strict models, the roles of their fields, errors that name the place, and YAML files."""

from __future__ import annotations

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
    """What another value of a field means for a result. A field without a role is `RECIPE`."""

    IDENTITY = "identity"
    """Names the result, or says where inputs and outputs are; contents are compared by digest instead."""
    PUBLISHED = "published"
    """The figure to compare with, where it was measured, and what is said about it."""
    RECIPE = "recipe"
    """Decides the result."""
    NUMERICS = "numerics"
    """Requested type and kernels; a manifest records which ones really ran."""
    EQUIVALENT = "equivalent"
    """Another value gives the same updates up to rounding, or another seed's run of the same recipe."""
    RUNTIME = "runtime"
    """Same bytes in the end."""


@dataclass(frozen=True)
class Bare:
    """Mark of a field whose flag may stand without a value."""

    yes: str
    """What the bare flag means."""
    no: str | None = None
    """What --no-FLAG means; None: there is no such flag."""


@functools.cache
def fields_with(model: type[BaseModel], *roles: Role) -> tuple[str, ...]:
    """Names of a model's fields that have one of the roles: by role in the order given, then as they are declared."""

    def role(name: str) -> Role:
        return next((mark for mark in model.model_fields[name].metadata if isinstance(mark, Role)), Role.RECIPE)

    return tuple(name for wanted in roles for name in model.model_fields if role(name) is wanted)


@functools.cache
def accepted_names(model: type[BaseModel]) -> frozenset[str]:
    """Names under which a model takes its fields: their own and their aliases."""
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
    """Unknown fields are errors; docstrings under the fields become their descriptions."""


_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password of a URL: never shown."""


class SettingsError(ValueError):
    """A wrong setting; the message names file, row, field, value and what was expected."""


def check_known(where: str, field: str, value: str, known: Iterable[str]) -> None:
    """Raises SettingsError if the value is none of the known names."""
    if value not in known:
        raise SettingsError(f"{where}: field `{field}`: got {value!r}: expected one of {', '.join(sorted(known))}")


def explain(error: ValidationError, where: str, typed: Mapping[str, str] | None = None) -> SettingsError:
    """One line per problem: where, field, value, what was expected.

    typed: field to the other name under which it was given, which stands beside its own.
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
            expected = "unknown field; no such setting"
        elif item["type"] == "missing":
            lines.append(f"{where}: field `{field}`: missing; expected a value")
            continue
        value = _IN_URL.sub("***@", repr(item["input"]))
        # A problem of several fields has all of them as its value, and names the wrong one itself.
        got = "" if item["type"] == "value_error" and isinstance(item["input"], Mapping) else f" got {value}:"
        at = f"field `{field}`{other.get(field, '')}:{got} " if field else ""
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
