"""Formats of users' files: converts the rows of a source to samples. FORMATS lists the names for `format`.

Tables and image folders map columns to the roles of a question. `messages` reads chats in the formats of other
trainers. `conversations` is this package's own JSONL. The recipe's formats are in phi3v.data.recipe.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import itertools
import json
import math
import re
import string
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from phi3v.data import recipe
from phi3v.data.conversations import DataError, parse_record, quoted, record_problem
from phi3v.data.fetch import PROTOCOLS
from phi3v.data.pictures import picture_problem, picture_suffixes, sample_frames
from phi3v.data.recipe import Samples, classes_prompt
from phi3v.data.rows import (
    SPLIT_NAMES,
    TABLES,
    Inputs,
    Picture,
    Row,
    Rows,
    Sample,
    SampleTurn,
    each_row,
    is_junk,
    near,
    picture_under,
    read_rows,
    some_text,
)
from phi3v.settings import Options

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
"""Speaker by the `from` or `role` of a message."""

ROLES = {
    "image": ("image", "images"), "video": ("video", "videos"), "question": ("question",), "answer": ("answer",),
    "answers": ("answers",), "options": (), "system": ("system",), "id": ("id",), "page": ("page",),
    "meta": (), "messages": ("messages", "conversations", "conversation"),
}  # fmt: skip
"""Roles of columns, and the column names that have a role by default."""

QUESTION_ROLES = tuple(role for role in ROLES if role != "messages")

INSTEAD = {"image": "video", "answer": "answers"}
"""Role that can replace a required role."""

PEEK = 20
"""Number of first rows whose columns `columns` can name."""

MAX_PATH = 4096
"""Longest path. A longer text in an image column is a picture in base64."""


@functools.lru_cache(maxsize=4096)
def _key(keys: tuple[str, ...], name: str) -> str | None:
    """The key that matches a name, ignoring case. Cached, because rows of a source share a few lists of keys."""
    folded = name.strip().casefold()
    return name if name in keys else next((key for key in keys if key.strip().casefold() == folded), None)


@functools.lru_cache(maxsize=4096)
def _there(keys: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """The names that are keys, or start with a key and a dot."""
    return [name for name in names if {_key(keys, name), _key(keys, name.partition(".")[0])} != {None}]


def column(row: Row, name: str) -> object:
    """The value of a column, ignoring case. Dots lead into objects. Raises KeyError."""
    if (key := _key(tuple(row), name)) is not None:
        return row[key]
    first, _, rest = name.partition(".")
    inner = column(row, first) if rest else None
    if isinstance(inner, dict):
        return column(inner, rest)
    raise KeyError(name)


def as_text(value: object) -> str:
    """A cell as text: numbers and objects as JSON with sorted keys, a missing value as "".

    Dates of parquet files become ISO 8601, and decimals keep all their digits.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=as_text)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


@dataclass(frozen=True)
class Value:
    """Value of a role: a column, or text that contains columns."""

    column: str
    pieces: tuple[tuple[str, str | None], ...] = ()
    """(text, column after it) of a template. Empty: the column itself."""
    others: tuple[str, ...] = ()
    """Columns to try if the first is empty."""
    default: Value | None = None
    """Value of a row that has none of the columns."""

    def find(self, row: Row) -> tuple[str, object]:
        """(column, its value): the first column that is not empty, else the first that the row has, else ("", None)."""
        first: tuple[str, object] = ("", None)
        for name in _there(tuple(row), (self.column, *self.others)):
            with contextlib.suppress(KeyError):
                value = column(row, name)
                if value not in (None, "", []):
                    return name, value
                first = first if first[0] else (name, value)
        return first

    def of(self, row: Row, where: str) -> object:
        """The value for a row, or None without the column. Raises DataError if a column of a template is empty."""
        if not self.pieces:
            found, value = self.find(row)
            return value if found or not self.default else self.default.of(row, where)
        text = ""
        for before, name in self.pieces:
            filled = as_text(Value(name).of(row, where)) if name else ""
            if name and not filled:
                raise DataError(f"{where}: column `{name}`: empty or missing; expected text for {self.column!r}")
            text += before + filled
        return text


def _value(source: str, role: str, known: list[str], where: str) -> Value:
    """The column, template or constant that `columns` names. Raises DataError."""

    def is_column(name: str) -> bool:
        heads = {other.casefold() for other in known}
        return name.strip().casefold() in heads or name.partition(".")[0].strip().casefold() in heads

    def refuse(name: str) -> DataError:
        return DataError(
            f"{where}: columns.{role}: got {source!r}: no column `{name}`; expected one of {', '.join(known)}, a text "
            f"with columns in braces, or a constant text that contains a space{near(name, known)}"
        )

    if is_column(source):
        return Value(source)
    if role not in ("question", "answer", "system", "id"):
        raise refuse(source)
    try:
        pieces = tuple((text, name) for text, name, *_ in string.Formatter().parse(source))
    except ValueError as error:
        raise DataError(
            f"{where}: columns.{role}: got {source!r}: {error}; write literal braces as {{{{ and }}}}"
        ) from None
    for _, name in pieces:
        if name is not None and not is_column(name):
            raise refuse(name)
    if all(name is None for _, name in pieces) and (not re.search(r"\s|\W$", source) or near(source, known)):
        raise refuse(source)
    return Value(source, pieces)


def _values(
    inputs: Inputs, rows: Rows, roles: Iterable[str], needed: Iterable[str], **given: Value
) -> tuple[dict[str, list[Value]], Rows]:
    """(values of each role, all rows): from the option `columns`, or from the column names. Raises DataError.

    given: value of a required role that has no column.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, PEEK))
    peeked = [row for _, _, row in first if isinstance(row, dict)]
    known = list(dict.fromkeys(itertools.chain(*peeked)))
    where = first[0][0] if first else str(inputs.root)
    found: dict[str, list[Value]] = {role: [] for role in roles}
    for role, sources in inputs.options.columns.items():
        if role not in found:
            raise DataError(
                f"{where}: columns: got {role!r}; expected roles {', '.join(roles)}{near(role, list(found))}"
            )
        sources = [sources] if isinstance(sources, str) else sources
        found[role] = [_value(source, role, known, where) for source in sources if source]
    there = {role for role, values in found.items() if values}
    for role in found.keys() - inputs.options.columns.keys():
        if names := ROLES[role]:  # by name, in every row that has such a column
            found[role] = [own] = [Value(names[0], others=names[1:], default=given.get(role))]
            if any(own.find(row)[0] or own.of(row, where) for row in peeked):
                there.add(role)
    for role in needed if known else ():
        if role not in there | inputs.options.columns.keys() and INSTEAD.get(role) not in there:
            raise DataError(
                f"{where}: column `{role}`: missing; expected {', '.join(needed)}; got {', '.join(known)} (assign them "
                f"with option `columns`: `{role}: NAME`{_hint(role, peeked)}){near(role, known)}"
            )
    return found, itertools.chain(first, rows)


def _hint(role: str, rows: list[Row]) -> str:
    """A suggestion for rows that lack a required column."""
    row = rows[0]
    chats = [name for name in row if name.casefold() in ROLES["messages"]]
    if role == "messages":
        return "; for questions and answers, use format `table`"
    if chats:
        return f"; for the chats in `{chats[0]}`, use format `messages`"
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and len(rows) == 1:
        return f"; to read the list in it, use option `field: {lists[0]}`"
    return ", or a constant text for all rows" if role in ("question", "answer") else ""


def _listed(value: object) -> object:
    """Parses a list that is written as JSON in a cell. Returns any other value unchanged."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def pictures_of(inputs: Inputs, value: object, where: str, field: str = "image") -> list[Picture]:
    """The pictures of a cell or of a message part. Raises DataError.

    The value can be a path, several paths separated by `;`, a URL, encoded bytes, base64, an object that contains one
    of these, or a list.
    """
    if value is None or value == "" or value != value:
        return []
    if isinstance(value, Picture):
        return [value]
    if isinstance(value, bytes):
        return [Picture(value)]
    if isinstance(value, list):
        return [picture for item in value for picture in pictures_of(inputs, item, where, field)]
    if isinstance(value, dict):
        for key in ("bytes", "image_url", "url", "image", "source", "data", "path", "file_name"):
            if value.get(key):
                return pictures_of(inputs, f"data:;base64,{value[key]}" if key == "data" else value[key], where, field)
        raise DataError(f"{where}: field `{field}`: got {quoted(value)}; expected bytes, a path, a URL or base64")
    if not isinstance(value, str):
        raise DataError(f"{where}: field `{field}`: got {quoted(value)}; expected a string")
    text = value.strip()
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text[:32])
    if scheme and scheme[1].lower() in PROTOCOLS:
        return [Picture(text)]
    if scheme and scheme[1] != "file":
        raise DataError(
            f"{where}: field `{field}`: got {quoted(text)}; expected a path, or {'://, '.join(PROTOCOLS)}://"
        )
    if inputs.only_urls and not text.startswith("["):
        return []
    if text.startswith("data:") or len(text) > MAX_PATH:
        try:
            return [Picture(base64.b64decode(text.rpartition(",")[2], validate=True))]
        except binascii.Error as error:
            raise DataError(f"{where}: field `{field}`: got {quoted(text)}: {error}; expected base64") from None
    if isinstance(names := _listed(text), list):
        return pictures_of(inputs, names, where, field)
    if ";" not in text or (len(text) < 256 and (inputs.images_dir / text).is_file()):
        return [picture_under(inputs.images_dir, text, where, field)] if text else []
    return [picture_under(inputs.images_dir, part.strip(), where, field) for part in text.split(";") if part.strip()]


def clip_frames(inputs: Inputs, value: object, where: str) -> list[list[Picture]]:
    """The frames of each clip that a cell names. Raises DataError."""
    clips = []
    for clip in pictures_of(inputs, value, where, "video"):
        if not isinstance(clip.data, Path):
            raise DataError(f"{where}: field `video`: got {quoted(clip.data)}; expected a path")
        frames = [] if inputs.only_urls else sample_frames(clip.data, inputs.options.frames)
        clips.append([Picture(data, f"{clip.name}.{index}.jpg", decoded=True) for index, data in enumerate(frames)])
    return clips


def _choices(options: object, answer: object, where: str) -> tuple[str, str]:
    """(the options as lettered lines, the letter of the answer). Raises DataError."""
    options = list(options.values()) if isinstance(options, dict) else _listed(options)
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise DataError(f"{where}: field `options`: got {quoted(options)}; expected a list of 2 to 26 options")
    texts = [as_text(option) for option in options]
    letters = string.ascii_uppercase[: len(texts)]
    lines = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    given = as_text(answer)
    if texts.count(given) == 1:
        return lines, letters[texts.index(given)]
    if type(answer) is int and 0 <= answer < len(texts):
        return lines, letters[answer]
    if given and given.strip("().").upper() not in letters:
        expected = f"one of the options, its letter or its number from 0 ({quoted(texts)})"
        raise DataError(f"{where}: field `answer`: got {quoted(answer)}; expected {expected}")
    return lines, given.strip("().").upper()


def _first(values: dict[str, list[Value]], row: Row, where: str, role: str) -> object:
    return values[role][0].of(row, where) if values[role] else None


def _meta(values: dict[str, list[Value]], row: Row, where: str) -> dict[str, str]:
    return {value.column: as_text(value.of(row, where)) for value in values["meta"]}


def _build_question(inputs: Inputs, values: dict[str, list[Value]]) -> Callable[[str, int, Row], Sample]:
    """Returns the function that converts a row with roles to a sample of one turn."""

    def build(where: str, number: int, row: Row) -> Sample:
        first = partial(_first, values, row, where)
        pictures = [p for value in values["image"] for p in pictures_of(inputs, value.of(row, where), where)]
        for value in values["video"]:
            pictures += itertools.chain(*clip_frames(inputs, value.of(row, where), where))
        if inputs.only_urls:
            return Sample(where, "", (SampleTurn(tuple(pictures), "", ()),))
        # pandas writes integers with ".0" if the column has empty cells.
        if page := as_text(first("page")).removesuffix(".0"):
            if not page.isdecimal():
                raise DataError(f"{where}: field `page`: got {quoted(page)}; expected a number from 1")
            pictures = [replace(picture, page=int(page)) for picture in pictures]
        question = some_text(as_text(first("question")), where, "question") + inputs.options.prompt_suffix
        answer = as_text(first("answer"))
        if values["options"]:
            lines, answer = _choices(first("options"), first("answer"), where)
            question += lines
        others = first("answers")
        listed = others if isinstance(others, list) else as_text(others).split("|")
        answers = tuple(dict.fromkeys(filter(None, [answer, *map(as_text, listed)])))
        if not answers and not inputs.options.unlabelled:
            raise DataError(
                f"{where}: field `answer`: got {quoted(first('answer'))}; expected some text (to answer rows without "
                "labels, set option `unlabelled`)"
            )
        turn = SampleTurn(tuple(pictures), question, answers, as_text(first("system")))
        return Sample(where, as_text(first("id")) or inputs.row_id(number), (turn,), _meta(values, row, where))

    return build


def table(inputs: Inputs) -> Samples:
    """Rows of CSV, TSV, JSON, JSONL, parquet, or a dataset: columns image, question, answer, or option `columns`."""
    needed = ("image", "question") if inputs.options.unlabelled else ("image", "question", "answer")
    values, rows = _values(inputs, read_rows(inputs), QUESTION_ROLES, needed)
    return each_row(rows, _build_question(inputs, values))


def docvqa_official(inputs: Inputs) -> Samples:
    """DocVQA's val_v1.0.json: {"data": [{questionId, question, image, answers}, …]} with the documents/ folder."""
    columns = {"question": "{question}\nAnswer briefly.", "answer": [], "id": "docvqa-{questionId}"}
    options = inputs.options.model_copy(update={"field": "data", "columns": columns})
    return table(replace(inputs, options=options))


SPLIT_FOLDERS = ("train", "val", "validation", "valid", "dev", "test")


def _metadata(inputs: Inputs, path: Path) -> Iterator[tuple[str, str, Row]]:
    """(path of a picture, location for messages, row) of an image folder's metadata file. Raises DataError."""
    for where, _, row in read_rows(replace(inputs, files=[path], options=Options())):
        if isinstance(row, DataError):
            raise DataError(f"{where}: {row}")
        yield (path.relative_to(inputs.root).parent / as_text(row.get("file_name"))).as_posix(), where, row


def _beside(files: dict[str, list[Path]], picture: Path, suffix: str) -> Path | None:
    """The file with a picture's name and another suffix: in the same folder, or the only one anywhere."""
    wanted = picture.with_suffix(suffix)
    return next((files[key][0] for key in (str(wanted), wanted.name) if len(files.get(key, [])) == 1), None)


def folder_rows(inputs: Inputs) -> tuple[Rows, list[str]]:
    """(one row per picture in [SPLIT/][CLASS/]NAME, the classes). Raises DataError if there is no picture.

    Columns: image, file_name, label (the class), the columns of metadata.csv or metadata.jsonl (whose file_name names
    the picture), and the contents of NAME.json and NAME.txt: `json`, its fields, and `text`. Adds other files to
    inputs.untaken.
    """
    names, extra, files = list[Path](), dict[str, Row](), dict[str, list[Path]]()
    untaken: dict[str, str] = {}
    for path in inputs.files:
        name = path.relative_to(inputs.root)
        if is_junk(name):
            continue
        if path.stem == "metadata" and path.suffix in (*TABLES, ".jsonl", ".parquet"):
            for picture, where, found in _metadata(inputs, path):
                extra[picture], untaken[picture] = found, f"listed in {where}, but there is no such picture"
        elif path.suffix in (".json", ".txt"):
            untaken[str(name)] = "no picture has this name"
            for key in {str(name), name.name}:
                files.setdefault(key, []).append(name)
        elif path.suffix.lower() not in picture_suffixes() and (reason := picture_problem(path)):
            untaken[str(name)] = reason
        else:
            names.append(name)
    only_splits = all(len(name.parts) == 2 and name.parts[0] in SPLIT_FOLDERS for name in names)
    placed = []
    for name in names:
        *_, split, label, _ = ("", "", *name.parts)
        placed.append((*((label, "") if only_splits else (split, label)), name))
    splits = {split for split, _, _ in placed}
    wanted = next((split for split in (inputs.split, SPLIT_NAMES.get(inputs.split)) if split in splits), "")
    chosen = sorted((label, name) for split, label, name in placed if split == wanted)
    if not chosen:
        raise DataError(
            f"{inputs.root}: no pictures; expected NAME, CLASS/NAME or {inputs.split}/CLASS/NAME; got "
            f"{len(inputs.files)} files, "
            f"splits {', '.join(filter(None, sorted(splits))) or 'none'}"
        )
    for split, _, name in placed:
        untaken.pop(str(name), None)
        for suffix in (".json", ".txt"):
            untaken.pop(str(_beside(files, name, suffix)), None)
        if split not in (wanted, *SPLIT_FOLDERS):
            untaken[str(name)] = f"expected CLASS/NAME or {wanted or inputs.split}/CLASS/NAME"
    inputs.untaken.update(untaken)
    classes = sorted({label for split, label, _ in placed if label and split in (wanted, *SPLIT_FOLDERS)})

    def row(label: str, name: Path) -> Row | DataError:
        path, found = inputs.root / name, dict[str, object](label=label) if classes else {}
        beside, text = _beside(files, name, ".json"), _beside(files, name, ".txt")
        try:
            content = json.loads((inputs.root / beside).read_bytes()) if beside else None
            found |= (content if isinstance(content, dict) else {}) | ({"json": content} if beside else {})
            found |= {"text": (inputs.root / text).read_text("utf-8")} if text else {}
        except (ValueError, RecursionError) as error:
            return DataError(f"{beside or text}: {error}; expected JSON, or text in UTF-8")
        picture = Picture(path, f"{label}/{path.name}" if label else path.name)
        return found | extra.get(str(name), {}) | {"image": picture, "file_name": str(name)}

    rows = ((str(name), number, row(label, name)) for number, (label, name) in enumerate(chosen))
    return rows, classes


def imagefolder(inputs: Inputs) -> Samples:
    """Pictures in folders. The class is the answer, unless `columns` or the metadata define another."""
    rows, classes = folder_rows(inputs)
    prompt = inputs.options.prompt or classes_prompt("image", ["{classes}"])
    prompt = prompt.replace("{classes}", ", ".join(classes))
    defaults = {"question": Value(prompt, ((prompt, None),)), "answer": Value("label")}
    needed = ("image", "question") if inputs.options.unlabelled else ("image", "question", "answer")
    values, rows = _values(inputs, rows, QUESTION_ROLES, needed, **defaults)
    return each_row(rows, _build_question(inputs, values))


MARK = re.compile("(<image>|<video>)")
Part = tuple[str, list[Picture] | None]
"""(text, None), or (mark, its pictures). None instead of pictures means the row's next picture."""


def _message(inputs: Inputs, message: object, where: str, field: str) -> tuple[str, list[Part]]:
    """(speaker, text and marks in order). Raises DataError."""
    kind = SPEAKERS.get(str(message.get("from") or message.get("role"))) if isinstance(message, dict) else None
    sharegpt = isinstance(message, dict) and "from" in message
    if kind is None or not isinstance(message, dict):
        key, expected = ("from", "human, gpt") if sharegpt else ("role", "user, assistant")
        raise DataError(f"{where}: field `{field}.{key}`: got {quoted(message)}; expected {expected} or system")
    content = message.get("value") if message.get("value") is not None else message.get("content")
    if not isinstance(content, list):
        text = (
            ""
            if content == "" and kind == "system"
            else some_text(content, where, f"{field}.{'value' if sharegpt else 'content'}")
        )
        return kind, [(piece, None) for piece in MARK.split(text)]
    parts: list[Part] = []
    for place, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        name = str(part.get("type")).removeprefix("input_").removeprefix("output_") if isinstance(part, dict) else ""
        parts += [("\n", None)] if place else []
        if name == "text":
            parts += [(piece, None) for piece in MARK.split(as_text(part.get("text")))]
        elif name in ("image", "image_url"):
            own = {key: value for key, value in part.items() if key != "type" and value and not isinstance(value, int)}
            parts.append(("<image>", pictures_of(inputs, own, where, f"{field}.content[{place}]") if own else None))
        elif name == "video":
            clips = clip_frames(inputs, part.get("video") or part.get("path"), where)
            parts.append(("<video>", clips[0] if clips else None))
        else:
            raise DataError(
                f"{where}: field `{field}.content[{place}]`: got {quoted(part)}; expected type text, image, image_url "
                "or video"
            )
    return kind, parts


@dataclass
class _Talk:
    """Pictures of a chat that no turn has used yet, and the number of used ones."""

    images: deque[Picture]
    clips: deque[list[Picture]]
    used: int = 0

    def turn(self, parts: list[Part], first: list[Picture]) -> tuple[list[Picture], str]:
        """(pictures, text) of a question. Removes marks around the text. A mark inside the text becomes "image N",
        because the pictures of a turn come before its text."""
        pictures, text = first, ""
        self.used += len(first)
        for piece, found in parts:
            if not MARK.fullmatch(piece):
                text += piece
                continue
            if found is None:
                found = [self.images.popleft()] if piece == "<image>" else self.clips.popleft()
            pictures += found
            self.used += len(found)
            # Texts between marks contain no marks, so these temporary marks are unambiguous.
            text += f"<image>{self.used}<image>" if piece == "<image>" else piece
        ends = r"(?:\s|<image>\d+<image>|<video>)+"
        text = re.sub(r"<image>(\d+)<image>", r"image \1", re.sub(rf"^{ends}|{ends}$", "", text))
        return pictures, text.replace("<video>", "") or "Describe what you see."


def messages(inputs: Inputs) -> Samples:
    """Chats: a list of {from, value} or {role, content}, with pictures in columns image(s), video(s), or in message
    parts.

    A message uses one picture of the row for each `<image>` mark, or part without its own picture. Pictures without a
    mark come first. A system message stays separate, before the next question.
    """
    roles = ("messages", "image", "video", "system", "id", "meta")
    values, rows = _values(inputs, read_rows(inputs), roles, ("messages",))

    def build(where: str, number: int, row: Row) -> Sample:
        talk = _Talk(deque(), deque())
        for value in values["image"]:
            talk.images += pictures_of(inputs, value.of(row, where), where)
        for value in values["video"]:
            talk.clips += clip_frames(inputs, value.of(row, where), where)
        spoken = list[tuple[str, str, list[Part]]]()
        for value in values["messages"]:
            name, cell = value.find(row)
            listed = _listed(cell)
            if not isinstance(listed, list) or not listed:
                raise DataError(
                    f"{where}: field `{name or value.column}`: got {quoted(listed)}; expected a list of messages"
                )
            if all(isinstance(pair, dict) and pair.keys() <= SPEAKERS.keys() for pair in listed):
                # ms-swift's variant of ShareGPT: {human: question, assistant: answer}
                listed = [{"from": speaker, "value": text} for pair in listed for speaker, text in pair.items()]
            for index, message in enumerate(listed):
                field = f"{name}[{index}]"
                spoken.append((field, *_message(inputs, message, where, field)))
        wanted = Counter(piece for _, _, parts in spoken for piece, found in parts if found is None)
        for mark, there in (("<image>", talk.images), ("<video>", talk.clips)):
            if wanted[mark] > len(there):
                raise DataError(
                    f"{where}: got {wanted[mark]} {mark} marks; expected at most {len(there)}, the number of pictures"
                )
        first = [talk.images.popleft() for _ in range(len(talk.images) - wanted["<image>"])]
        first += itertools.chain(*(talk.clips.popleft() for _ in range(len(talk.clips) - wanted["<video>"])))
        system, turns = as_text(_first(values, row, where, "system")), list[SampleTurn]()
        question: tuple[list[Picture], str] | None = None
        for field, speaker, parts in spoken:
            text, marked = "".join(piece for piece, _ in parts), any(MARK.fullmatch(piece) for piece, _ in parts)
            if speaker == "system" and question is None:
                system = text
            elif speaker == "user" and question is None:
                question = talk.turn(parts, [] if turns else first)
            elif speaker == "assistant" and question is not None and not marked:
                turns.append(SampleTurn(tuple(question[0]), question[1], (text,), system))
                question, system = None, ""
            else:
                expected = "no picture in an answer" if marked else "user and assistant messages in turn"
                raise DataError(f"{where}: field `{field}.from`: got {speaker}; expected {expected}")
        if question is not None and inputs.options.unlabelled:
            turns.append(SampleTurn(tuple(question[0]), question[1], (), system))
        elif question is not None or not turns:
            raise DataError(
                f"{where}: field `messages`: got {len(spoken)} messages; expected an answer to every question (to "
                "answer "
                "a last question without label, set option `unlabelled`)"
            )
        own_id = as_text(_first(values, row, where, "id")) or inputs.row_id(number)
        return Sample(where, own_id, tuple(turns), _meta(values, row, where))

    return each_row(rows, build)


def conversation_rows(inputs: Inputs) -> Rows:
    """Lines of this package's own JSONL: SPLIT.jsonl or NAME_SPLIT.jsonl, unless `file` names another file."""
    own = [path for path in inputs.files if path.suffix == ".jsonl" and re.search(rf"(^|_){inputs.split}$", path.stem)]
    return read_rows(replace(inputs, files=own) if len(own) == 1 and not inputs.options.file else inputs)


def conversations(inputs: Inputs) -> Samples:
    """Conversations written by hand. Picture paths are relative to images/ beside the JSONL file, or to images_dir."""
    root = inputs.images_dir
    if inputs.options.images_dir == "." and (root / "images").is_dir():
        root = root / "images"

    def build(where: str, number: int, row: Row) -> Sample:
        if problem := record_problem(row):
            raise DataError(f"{where}: {problem}")
        record, turns = parse_record(row), []
        for turn in record.turns:
            pictures = tuple(picture_under(root, path, where, "images") for path in turn.images)
            turns.append(SampleTurn(pictures, turn.user, turn.accepted, turn.system))
        return Sample(where, record.id, tuple(turns), record.meta)

    return each_row(conversation_rows(inputs), build)


FORMATS: dict[str, Callable[[Inputs], Samples]] = {
    "table": table,
    "messages": messages,
    "sharegpt": messages,
    "llava": messages,
    "imagefolder": imagefolder,
    "image_folder": imagefolder,
    "conversations": conversations,
    "docvqa_official": docvqa_official,
    **recipe.FORMATS,
}

ROWS: dict[str, Callable[[Inputs], Rows]] = {
    **dict.fromkeys(("table", "messages", "sharegpt", "llava"), read_rows),
    **dict.fromkeys(("imagefolder", "image_folder"), lambda inputs: folder_rows(inputs)[0]),
    "conversations": conversation_rows,
}
"""Formats whose rows can be divided into splits by their columns."""
