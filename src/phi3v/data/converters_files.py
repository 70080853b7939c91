"""Converters of what people have: a folder of classes, a table, LLaVA/ShareGPT json; and of the official validation
files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.data.conversations import DataError, decode_line, raw_lines, shown
from phi3v.data.converters_parquet import without_markers
from phi3v.data.samples import Inputs, Picture, Rejection, Sample, SampleTurn, each_row, file_under
from phi3v.data.video import sample_frames

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def image_prompt(classes: list[str]) -> str:
    """The recipe's prompt for clips, for pictures."""
    return f"Classify the image into one of the following classes: {', '.join(classes)}."


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field `{field}`: got {shown(value)}; expected some text")
    return value.strip()


def _only(inputs: Inputs, suffixes: tuple[str, ...], kind: str) -> Path:
    """The one file of a kind; the option `file` names it where there are several."""
    named = inputs.options.get("file")
    found = [
        path
        for path in inputs.files
        if (path.relative_to(inputs.root).as_posix() == named if named else path.suffix.lower() in suffixes)
    ]
    if len(found) != 1:
        raise DataError(
            f"{inputs.root}: {len(found)} files {named or ', '.join(suffixes)}; expected one {kind} (option `file` "
            f"names it)"
        )
    return found[0]


def image_folder(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """CLASS/picture, or SPLIT/CLASS/picture: the folder is the answer. Option prompt: {classes} stands for the list of
    classes."""
    pictures = []
    for path in inputs.files:
        parts = path.relative_to(inputs.root).parts
        if path.suffix.lower() in IMAGE_SUFFIXES and len(parts) >= 2:
            pictures.append((parts[-3] if len(parts) > 2 else "", parts[-2], path))
    if any(split == inputs.split for split, _, _ in pictures):
        chosen = [item for item in pictures if item[0] == inputs.split]
    else:
        chosen = [item for item in pictures if not item[0]]
    if not chosen:
        raise DataError(
            f"{inputs.root}: no pictures as CLASS/NAME or {inputs.split}/CLASS/NAME; expected suffixes "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    classes = sorted({label for _, label, _ in pictures})
    prompt = (
        inputs.options["prompt"].replace("{classes}", ", ".join(classes))
        if "prompt" in inputs.options
        else image_prompt(classes)
    )

    def build(where: str, number: int, item: tuple[str, str, Path]) -> Sample:
        _, label, path = item
        picture = Picture(path, f"{label}/{path.name}")
        return Sample(where, inputs.row_id(number), (SampleTurn((picture,), prompt, (label,)),))

    rows = ((str(item[2].relative_to(inputs.root)), number, item) for number, item in enumerate(sorted(chosen)))
    return each_row(rows, build)


def table(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """CSV or TSV (by suffix) with a header: image, question, answer.

    `image` may be empty (text only) or name several pictures, separated by ";". Optional column `answers`: all accepted
    answers, separated by "|". Option prompt_suffix is added to every question.
    """
    path = _only(inputs, (".csv", ".tsv", ".txt"), "table")
    suffix = inputs.option("prompt_suffix", "")

    def rows() -> Iterator[tuple[str, int, dict[str, str]]]:
        csv.field_size_limit(2**24)
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t", strict=True)
                header = next(reader, [])
                for column in ("image", "question", "answer"):
                    if column not in header:
                        raise DataError(
                            f"{path}:1: column `{column}`: missing; expected image, question, answer; got "
                            f"{shown(header)}"
                        )
                for number, cells in enumerate(reader):
                    if cells:
                        yield (
                            f"{path.name}:{reader.line_num}",
                            number,
                            dict(zip(header, cells, strict=False)) | {"": str(len(cells) - len(header))},
                        )
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a table in UTF-8: {error}") from None

    def build(where: str, number: int, row: dict[str, str]) -> Sample:
        if row[""] != "0":
            raise DataError(f"{where}: {row['']} fields more than the header (negative: fewer); expected as many")
        names = [name.strip() for name in row["image"].split(";") if name.strip()]
        pictures = tuple(Picture(*file_under(inputs.images_dir, name, where, "image")) for name in names)
        answer = _text(row["answer"], where, "answer")
        others = [text.strip() for text in row.get("answers", "").split("|") if text.strip()]
        user = _text(row["question"], where, "question") + suffix
        return Sample(
            where, inputs.row_id(number), (SampleTurn(pictures, user, tuple(dict.fromkeys([answer, *others]))),)
        )

    return each_row(rows(), build)


def json_items(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(where, number, item) of a JSON list or of a jsonl, one item at a time: memory does not grow with the file."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start != b"[":
        with open(path, "rb") as file:
            for number, line in raw_lines(file):
                try:
                    yield f"{path.name}:{number}", number - 1, decode_line(line.rstrip(b"\r\n"))
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {error}") from None
        return
    decoder, number = json.JSONDecoder(), 0
    with open(path, encoding="utf-8-sig") as file:
        text, position, more = "", 0, True
        expects = "["
        while True:
            try:
                position = re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]
                if position == len(text):
                    raise json.JSONDecodeError("cut short", text, position)
                if expects == "item" and not (number == 0 and text[position] == "]"):
                    item, end = decoder.raw_decode(text, position)
                    # A number or word at the very end of what was read may go on; objects and lists cannot.
                    if end == len(text) and more and not isinstance(item, dict | list | str):
                        raise json.JSONDecodeError("cut short", text, position)
                    yield f"{path.name}: item {number}", number, item
                    number, position, expects = number + 1, end, ","
                elif expects == "[" or (expects == "," and text[position] == ","):
                    position, expects = position + 1, "item"
                elif text[position] == "]":
                    return
                else:
                    raise DataError(
                        f"{path}: item {number}: got {text[position]!r}; expected a comma or the list's end"
                    )
            except (json.JSONDecodeError, RecursionError) as error:
                if isinstance(error, RecursionError) or not more or len(text) - position > 2**26:
                    raise DataError(f"{path}: item {number}: not JSON: {error}") from None
                try:
                    block = file.read(max(2**20, len(text) - position))
                except UnicodeDecodeError as wrong:
                    raise DataError(f"{path}: item {number}: not UTF-8: {wrong}") from None
                text, position, more = text[position:] + block, 0, bool(block)


def _names(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def llava(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """LLaVA/ShareGPT: a list (or jsonl) of {image(s) or video, conversations: [{from, value}, …]}, human and gpt in
    turn.

    A message takes as many pictures as it has `<image>` marks; pictures that no mark asks for come first of all. Marks
    before and after the text go; a mark inside it becomes "image N", because in the conversations jsonl the pictures of
    a turn stand before its text.
    """
    path = _only(inputs, (".json", ".jsonl"), "json")
    frames = int(inputs.option("frames", "8"))

    def build(where: str, number: int, item: Any) -> Sample:
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {shown(item)}; expected an object")
        pictures = [
            Picture(*file_under(inputs.images_dir, name, where, "image"))
            for name in _names(item.get("image", item.get("images")))
        ]
        for name in _names(item.get("video", item.get("videos"))):
            clip, clip_name = file_under(inputs.images_dir, name, where, "video")
            pictures += [
                Picture(data, f"{clip_name}.{index}.jpg") for index, data in enumerate(sample_frames(clip, frames))
            ]
        messages = item.get("conversations", item.get("messages"))
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: field `conversations`: got {shown(messages)}; expected a list of messages")
        system, pairs = _pairs(messages, where)
        marks = [user.count("<image>") + user.count("<video>") * frames for user, _ in pairs]
        if sum(marks) > len(pictures):
            raise DataError(f"{where}: {sum(marks)} <image> marks; expected as many as pictures ({len(pictures)})")
        marks[0] += len(pictures) - sum(marks)
        turns, first = [], 0
        for index, ((user, answer), count) in enumerate(zip(pairs, marks, strict=True)):
            text = _numbered(without_markers(user.replace("<video>", "").strip()), first)
            text = f"{system}\n{text}" if system and not index else text
            turns.append(SampleTurn(tuple(pictures[first : first + count]), text, (answer,)))
            first += count
        return Sample(where, inputs.row_id(number), tuple(turns))

    return each_row(json_items(path), build)


def _pairs(messages: list[Any], where: str) -> tuple[str, list[tuple[str, str]]]:
    """(system text, (question, answer) pairs) of LLaVA messages."""
    kinds = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    system = ""
    texts: list[str] = []
    for index, message in enumerate(messages):
        field = f"conversations[{index}]"
        kind = kinds.get(str(message.get("from", message.get("role")))) if isinstance(message, dict) else None
        if kind is None:
            raise DataError(f"{where}: field `{field}.from`: got {shown(message)}; expected human, gpt or system")
        text = _text(message.get("value", message.get("content")), where, f"{field}.value")
        if kind == "system" and not index:
            system = text
            continue
        if kind != ("user", "assistant")[len(texts) % 2]:
            raise DataError(f"{where}: field `{field}.from`: got {kind}; expected human and gpt in turn")
        texts.append(text)
    if not texts or len(texts) % 2:
        raise DataError(f"{where}: field `conversations`: {len(texts)} messages; expected an answer to every question")
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def _numbered(text: str, first: int) -> str:
    """Marks inside a text as words, numbered over the conversation; text that was only marks stays askable."""
    number = first
    while "<image>" in text:
        number += 1
        text = text.replace("<image>", f"image {number}", 1)
    return text or "Describe what you see."


def nlvr2_official(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """NLVR2's dev.json / test1.json (one object a line: identifier, sentence, label) with PNG pairs dev-0-0-img0.png,
    -img1.png."""
    prompt = inputs.option("prompt", 'For the images shown, is this caption "{sentence}" true?\nAnswer yes or no.')

    def build(where: str, number: int, item: Any) -> Sample:
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {shown(item)}; expected an object")
        name = _text(item.get("identifier"), where, "identifier")
        label = str(item.get("label"))
        if label not in ("True", "False"):
            raise DataError(f"{where}: field `label`: got {shown(label)}; expected True or False")
        stem = name.rpartition("-")[0]
        pictures = tuple(
            Picture(*file_under(inputs.images_dir, f"{stem}-img{k}.png", where, "identifier")) for k in (0, 1)
        )
        user = prompt.replace("{sentence}", _text(item.get("sentence"), where, "sentence"))
        return Sample(where, name, (SampleTurn(pictures, user, ("Yes" if label == "True" else "No",)),))

    return each_row(json_items(_only(inputs, (".json", ".jsonl"), "json")), build)


def hateful_memes_official(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """Hateful Memes' dev_seen.jsonl / test_seen.jsonl: id, img, label, text, with the img/ folder."""
    prompt = inputs.option("prompt", "Is this an offensive meme?\nAnswer yes or no.")

    def build(where: str, number: int, item: Any) -> Sample:
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {shown(item)}; expected an object")
        label = item.get("label")
        if label not in (0, 1):
            raise DataError(f"{where}: field `label`: got {shown(label)}; expected 0 or 1")
        picture = Picture(*file_under(inputs.images_dir, item.get("img"), where, "img"))
        return Sample(where, f"meme-{item.get('id')}", (SampleTurn((picture,), prompt, ("Yes" if label else "No",)),))

    return each_row(json_items(_only(inputs, (".jsonl", ".json"), "jsonl")), build)


def docvqa_official(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """DocVQA's val_v1.0.json: {"data": [{questionId, question, image, answers}, …]} with the documents/ folder."""
    path = _only(inputs, (".json",), "json")

    def rows() -> Iterator[tuple[str, int, Any]]:
        try:
            data = json.loads(path.read_bytes())["data"]
            assert isinstance(data, list)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise DataError(f"{path}: expected a JSON object with a list `data`") from None
        return ((f"{path.name}: data[{number}]", number, item) for number, item in enumerate(data))

    def build(where: str, number: int, item: Any) -> Sample:
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {shown(item)}; expected an object")
        answers = item.get("answers")
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{where}: field `answers`: got {shown(answers)}; expected a list of accepted answers")
        accepted = tuple(dict.fromkeys(_text(answer, where, f"answers[{k}]") for k, answer in enumerate(answers)))
        picture = Picture(*file_under(inputs.images_dir, item.get("image"), where, "image"))
        user = f"{_text(item.get('question'), where, 'question')}\nAnswer briefly."
        return Sample(where, f"docvqa-{item.get('questionId', number)}", (SampleTurn((picture,), user, accepted),))

    return each_row(rows(), build)
