"""The JSONL file of conversations: one example per line, read strictly and written in one canonical form.

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
      {"images": ["val/BabyCrawling/clip.0.jpg"], "user": "Classify the video …", "assistant": "BabyCrawling"}]}

`images` are paths relative to DIR/images. A turn without pictures has an empty list or none. Optional fields: `system`,
an instruction before the question; `answers`, all accepted answers, of which `assistant` is the first; and `meta` of
the example. Any other line raises DataError with file, line, field, value and what was expected.
docs/reference/file-formats.md and workflow/schemas/conversations.schema.json describe the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_LINE_BYTES = 8 * 2**20
"""Longest line in bytes. Longer lines are rejected without reading them into memory."""

CONTROL_TOKEN = re.compile(
    r"<\|(?:user|assistant|system|end|endoftext|image|image_\d+|placeholder\d+)\|>|<s>|</s>|<unk>"
)
"""The model's control tokens. In a text, they would end an answer, start a turn or refer to a missing picture."""

_TURN_KEYS = {"images", "system", "user", "assistant", "answers"}
_RECORD_KEYS = {"id", "source", "conversations", "meta"}


class DataError(ValueError):
    """Invalid data. The message names the file, row, field, value, and what was expected."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its pictures, and its answer."""

    images: tuple[str, ...]
    user: str
    assistant: str
    answers: tuple[str, ...] = ()
    """All accepted answers, `assistant` first. Empty if `assistant` is the only one."""
    system: str = ""
    """System message before the question. Empty: none."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that evaluation accepts."""
        return self.answers or (self.assistant,)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    meta: dict[str, str] = field(default_factory=dict)
    """Attributes of the example in the source, such as a category."""

    @property
    def images(self) -> tuple[str, ...]:
        """Pictures of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)


def quoted(value: object) -> str:
    """The repr of a value, cut to 80 characters, for messages."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def image_path_problem(path: object) -> str | None:
    """What an image path is expected to be, or None if it is valid. It must stay inside the images folder on any
    system."""
    if type(path) is not str:
        return "a string"
    if not path or path[0] == "/" or "\\" in path or "\0" in path or "\n" in path or ":" in path[1:2]:
        return "a relative path with / between folders"
    if "//" in path or path[-1] == "/" or (path[0] == "." and path.startswith(("./", "../"))) or path in (".", ".."):
        return "a path inside the images folder, without empty, . or .. parts"
    if "/." in path and any(part in (".", "..") for part in path.split("/")):
        return "a path inside the images folder, without . or .. parts"
    if path.isspace():
        return "some text"
    if len(path) > 1024:
        return "at most 1024 characters"
    return _surrogate_problem(path)


def _surrogate_problem(text: str) -> str | None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "no lone surrogates"
    return None


def text_problem(text: object, empty: bool = False) -> str | None:
    """What a text is expected to be, or None if it is valid. empty: whether blank text is allowed."""
    if type(text) is not str:
        return "a string"
    if not empty and (not text or text.isspace()):
        return "some text"
    if "<" in text and (token := CONTROL_TOKEN.search(text)):
        return f"no control token of the model ({token.group()})"
    return _surrogate_problem(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"key {quoted(next(key for key in keys if keys.count(key) > 1))} appears twice; expected each key once"
        )
    return values


_decode = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys).decode


def decode_line(line: bytes) -> Any:
    """The JSON value of a line. Raises ValueError that describes the problem."""
    if line[:3] == b"\xef\xbb\xbf":
        raise ValueError("got a byte order mark; expected UTF-8 without one")
    if b"\r" in line:
        raise ValueError("got a carriage return; expected lines that end in \\n only")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; expected UTF-8 text") from None
    if not text or text.isspace():
        raise ValueError("got an empty line; expected one JSON object per line")
    try:
        return _decode(text)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None


def _text_field_problem(values: dict[str, Any], key: str, field: str, empty: bool = False) -> str | None:
    if key not in values:
        return f"field `{field}`: missing; expected a string"
    expected = text_problem(values[key], empty)
    return f"field `{field}`: got {quoted(values[key])}; expected {expected}" if expected else None


def _turn_problem(where: str, turn: object, unlabelled: bool) -> str | None:
    if type(turn) is not dict:
        return f"field `{where}`: got {quoted(turn)}; expected an object"
    for key in turn.keys() - _TURN_KEYS:
        return f"field `{where}.{key}`: unknown; expected images, system, user, assistant, answers"
    for key in ("user", "assistant", *(["system"] if "system" in turn else [])):
        if problem := _text_field_problem(turn, key, f"{where}.{key}", empty=unlabelled and key == "assistant"):
            return problem
    images = turn.get("images", [])
    if type(images) is not list:
        return f"field `{where}.images`: got {quoted(images)}; expected a list of paths"
    for index, path in enumerate(images):
        if expected := image_path_problem(path):
            return f"field `{where}.images[{index}]`: got {quoted(path)}; expected {expected}"
    if "answers" in turn:
        answers = turn["answers"]
        if type(answers) is not list or not answers:
            return f"field `{where}.answers`: got {quoted(answers)}; expected a list of accepted answers"
        for index, answer in enumerate(answers):
            if expected := text_problem(answer):
                return f"field `{where}.answers[{index}]`: got {quoted(answer)}; expected {expected}"
        if answers[0] != turn["assistant"]:
            expected = f"the assistant's answer, {quoted(turn['assistant'])}"
            return f"field `{where}.answers[0]`: got {quoted(answers[0])}; expected {expected}"
    return None


def record_problem(record: object, unlabelled: bool = False) -> str | None:
    """The first problem of a decoded line, or None. unlabelled: answers may be empty."""
    if type(record) is not dict:
        return f"got {quoted(record)}; expected an object"
    for key in record.keys() - _RECORD_KEYS:
        return f"field `{key}`: unknown; expected id, source, conversations, meta"
    for key in ("id", "source"):
        if problem := _text_field_problem(record, key, key):
            return problem
        if "\n" in record[key]:
            return f"field `{key}`: got {quoted(record[key])}; expected no line break"
    meta = record.get("meta", {})
    if type(meta) is not dict or any(text_problem(value, empty=True) for value in meta.values()):
        return f"field `meta`: got {quoted(meta)}; expected an object whose values are strings"
    turns = record.get("conversations")
    if type(turns) is not list or not turns:
        return f"field `conversations`: got {quoted(turns)}; expected a list of turns"
    return next(
        filter(None, (_turn_problem(f"conversations[{k}]", turn, unlabelled) for k, turn in enumerate(turns))), None
    )


def parse_line(line: bytes, where: str, unlabelled: bool = False) -> Conversation:
    """Parses one line, with or without its line end. Raises DataError that starts with `where` (file:line).

    unlabelled: answers may be empty.
    """
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: got {len(line)} bytes; expected a line of at most {MAX_LINE_BYTES}")
    try:
        record = decode_line(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if problem := record_problem(record, unlabelled):
        raise DataError(f"{where}: {problem}")
    return parse_record(record)


def parse_record(record: dict[str, Any]) -> Conversation:
    """Parses a decoded line that has no problem."""
    turns = (
        Turn(
            tuple(turn.get("images", ())),
            turn["user"],
            turn["assistant"],
            tuple(turn.get("answers", ())),
            turn.get("system", ""),
        )
        for turn in record["conversations"]
    )
    return Conversation(record["id"], record["source"], tuple(turns), record.get("meta", {}))


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of a JSONL file. Reads at most MAX_LINE_BYTES + 1 bytes of a line that is too
    long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
        yield number, line


def read_conversations(path: str | Path, unlabelled: bool = False) -> Iterator[Conversation]:
    """Yields the examples of a JSONL file. Raises DataError at the first invalid line, and if there is no line.

    unlabelled: answers may be empty.
    """
    number = 0
    with open(path, "rb") as file:
        for number, line in raw_lines(file):
            yield parse_line(line, f"{path}:{number}", unlabelled)
    if not number:
        raise DataError(f"{path}: empty; expected one JSON object per line")


def format_line(conversation: Conversation, unlabelled: bool = False) -> bytes:
    """A line of the JSONL file with its line end. Field order and encoding are fixed, so equal examples give equal
    bytes.

    unlabelled: answers may be empty. Raises DataError.
    """
    turns = [
        {"images": list(turn.images)}
        | ({"system": turn.system} if turn.system else {})
        | {"user": turn.user, "assistant": turn.assistant}
        | ({"answers": list(turn.answers)} if turn.answers else {})
        for turn in conversation.turns
    ]
    record: dict[str, object] = {"id": conversation.id, "source": conversation.source, "conversations": turns}
    if conversation.meta:
        record["meta"] = conversation.meta
    if problem := record_problem(record, unlabelled):
        raise DataError(f"example {quoted(conversation.id)}: {problem}")
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")).encode("utf-8") + b"\n"


def prompt_text(turn: Turn, first_image: int = 1) -> str:
    """The text of a turn up to the start of the answer, as in Phi-3-vision's chat template.

    Starts with the system message. A mark for each picture is on its own line before the text. first_image: number of
    the turn's first picture. Pictures are numbered over the whole conversation.
    """
    marks = "".join(f"<|image_{first_image + index}|>\n" for index in range(len(turn.images)))
    system = f"<|system|>\n{turn.system}<|end|>\n" if turn.system else ""
    return f"{system}<|user|>\n{marks}{turn.user}<|end|>\n<|assistant|>\n"


def answer_text(turn: Turn) -> str:
    """The answer and the marks that end it (recipe)."""
    return f"{turn.assistant}<|end|>\n<|endoftext|>"
