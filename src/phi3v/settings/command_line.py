"""Settings as a command line and back (`flags` writes what `parse` reads), and the exit codes of scripts.

pydantic-settings does the parsing. This module adds lists such as `--image a.png b.png` whose values can contain
commas, flags that can be given without a value, limits in the help text, and groups of flags by role.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import pydantic_settings
from pydantic import AliasChoices, ValidationError

from phi3v.settings.base import Bare, Role, explain, fields_with

if TYPE_CHECKING:
    from phi3v.settings.commands import Command

C = TypeVar("C", bound="Command")

GROUPS = {
    Role.IDENTITY: "model, data and results",
    Role.RECIPE: "settings that determine the result",
    Role.NUMERICS: "precision and kernels",
    Role.EQUIVALENT: "same result up to rounding, or another seed",
    Role.RUNTIME: "execution; the result stays the same",
}


FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def type_text(schema: dict[str, Any]) -> str:
    """The type, choices and limits of a field, from its JSON schema."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "prefixItems" in schema:
        return f"[{', '.join(type_text(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {type_text(schema['items'])}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:.12g}" for key, sign in limits.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), *bounds])


class _List(argparse.Action):
    """Stores the values of a flag as a JSON list. pydantic-settings keeps commas and quotes in it unchanged."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, json.dumps(values))


def _add_argument(settings: type[Command], parser: argparse.ArgumentParser) -> Callable[..., None]:
    """Returns the function that adds a field of the settings to the parser."""
    schemas = settings.model_json_schema()["properties"]
    groups = {
        name: group
        for role, title in GROUPS.items()
        if (names := fields_with(settings, role))
        for group in [parser.add_argument_group(title)]
        for name in names
    }

    def add(_: argparse.ArgumentParser, *flags: str, **options: Any) -> None:
        name = options["dest"]
        field, limits = settings.model_fields[name], type_text(schemas[name])
        facts = [limits] if set(limits) & set("≥>≤<") else []
        if field.is_required():
            facts.append("required")
        elif field.default not in (None, "", []):
            facts.append(f"default: {field.default}")
        options["help"] = f"{field.description or ''} ({'; '.join(facts)})".removesuffix(" ()").replace("%", "%%")
        if options.get("action") == "append":
            options.update(action=_List, nargs="+", metavar="VALUE")
        for bare in field.metadata:
            if isinstance(bare, Bare):
                options.update(nargs="?", const=bare.yes)
                if bare.no is not None:
                    groups[name].add_argument(
                        f"--no-{name}", dest=name, action="store_const", const=bare.no, default=argparse.SUPPRESS
                    )
        groups[name].add_argument(*flags, **options)

    return add


def _typed(settings: type[Command], arguments: list[str]) -> dict[str, str]:
    """Field to the flag that the user typed for it, if that flag is an alias."""
    given = {argument.partition("=")[0] for argument in arguments}
    return {
        name: f"--{choice}"
        for name, field in settings.model_fields.items()
        if isinstance(field.validation_alias, AliasChoices)
        for choice in field.validation_alias.choices
        if choice != name and f"--{choice}" in given
    }


class _CommandLine(
    pydantic_settings.BaseSettings,
    cli_implicit_flags=True,
    cli_enforce_required=True,
    cli_avoid_json=True,
    cli_parse_none_str="\0",  # no argument can contain it, so `None` is ordinary text
    cli_hide_none_type=True,
):
    """The settings class while a command line is parsed. It reads no environment variables and no files."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: pydantic_settings.PydanticBaseSettingsSource,
        env_settings: pydantic_settings.PydanticBaseSettingsSource,
        dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,
        file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,
    ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def parse(settings: type[C], description: str | None, arguments: list[str] | None = None) -> C:
    """Parses a command line with one flag per field. On a wrong value, prints usage and the error, and exits with 2."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --FLAG VALUE …",
    )
    read: type[_CommandLine] = types.new_class(settings.__name__, (_CommandLine, settings))
    source = pydantic_settings.CliSettingsSource[Any](
        read, root_parser=parser, add_argument_method=_add_argument(settings, parser)
    )
    try:
        given = pydantic_settings.CliApp.run(read, arguments, cli_settings_source=source)
        values = {name: getattr(given, name) for name in settings.model_fields}
        return cast("C", settings.model_construct(given.model_fields_set, **values))
    except ValidationError as error:
        parser.error(
            str(explain(error, "command line", _typed(settings, sys.argv[1:] if arguments is None else arguments)))
        )
    except pydantic_settings.SettingsError as error:
        parser.error(f"command line: {error}")


def flags(settings: Command, roles: Iterable[Role] = Role) -> list[str]:
    """The flags that make `parse` return these settings. Settings at their defaults are omitted. roles: of the fields."""
    written, fields = [], type(settings).model_fields
    for name in fields_with(type(settings), *roles):
        value = getattr(settings, name)
        if value == fields[name].default:
            continue
        if isinstance(value, bool):
            written.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            written += [f"--{name}", *(str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values)]
    return written


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Imports without garbage collection, which takes an eighth of the time to import PyTorch and transformers.

    What exists afterwards stays out of later collections.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


FIRST_PROCESS_SECONDS = 2.0
"""How long the other processes of a machine wait, so that the first one reports. torchrun polls every 0.1 s."""


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits with its code.

    Errors of this package print one line without a traceback. The exit code is 2 for wrong input (ValueError), 1 for
    other failures, or the class's own `exit_code`. File errors (missing, already there, not writable) and a full disk
    print one line too. With several processes, the first process of each machine reports wrong input. If it finds
    none, torchrun does not stop the others, and they report their own.
    """
    try:
        sys.exit(main())
    except Exception as error:
        wrong_input = isinstance(error, (ValueError, *FILE_ERRORS))
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or type(error).__module__.startswith("phi3v.") or isinstance(error, FILE_ERRORS)):
            raise
        if wrong_input and os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(FIRST_PROCESS_SECONDS)
        remedy = "; the disk is full: free some space and run the same command again to resume" if full else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2 if wrong_input else 1))
