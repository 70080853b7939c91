"""Formats: what a source's rows mean, as samples. FORMATS lists the names for `format` of a datasets file and --format.

A new format is a function from Inputs to samples (phi3v.data.rows has the readers) and a name in FORMATS.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

from phi3v.data.conversations import DataError, shown
from phi3v.data.pictures import sample_frames
from phi3v.data.processes import process_pool
from phi3v.data.rows import (
    Inputs,
    Picture,
    Rejection,
    Sample,
    SampleTurn,
    accepted_answers,
    each_object,
    each_row,
    json_items,
    parquet_rows,
    picture_under,
    some_text,
    table_rows,
    unpack,
)

Samples = Iterator[Sample | Rejection]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

SPLIT_ORDER = ("train", "val", "test")
"""Ids of clips count over the splits in this order."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks, by the `from` or `role` of a message."""


def classes_prompt(kind: str, classes: list[str]) -> str:
    """The recipe's prompt for clips, also used for pictures."""
    return f"Classify the {kind} into one of the following classes: {', '.join(classes)}."


def without_markers(text: str) -> str:
    """The text without `<image>` marks at its ends: pictures stand before the text by the jsonl's own rule."""
    text = text.strip()
    while text.startswith("<image>"):
        text = text.removeprefix("<image>").lstrip()
    while text.endswith("<image>"):
        text = text.removesuffix("<image>").rstrip()
    return text


def _bytes_picture(value: object, where: str, field: str) -> Picture:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{where}: field `{field}.bytes`: got {shown(data)}; expected the picture's encoded bytes")
    return Picture(data)


def cauldron(inputs: Inputs) -> Samples:
    """the_cauldron: `images` (list of {bytes, path}) and `texts` (list of {user, assistant, source}).

    All questions of a row become turns; the pictures go with the first.
    """

    def build(where: str, number: int, row: dict[str, object]) -> Sample:
        images, texts = row["images"], row["texts"]
        if not isinstance(images, list) or not images:
            raise DataError(f"{where}: field `images`: got {shown(images)}; expected a list of pictures")
        if not isinstance(texts, list) or not texts:
            raise DataError(f"{where}: field `texts`: got {shown(texts)}; expected a list of questions and answers")
        pictures = tuple(_bytes_picture(image, where, f"images[{index}]") for index, image in enumerate(images))
        turns = []
        for index, text in enumerate(texts):
            if not isinstance(text, dict):
                raise DataError(f"{where}: field `texts[{index}]`: got {shown(text)}; expected user and assistant")
            user = without_markers(some_text(text.get("user"), where, f"texts[{index}].user"))
            answer = some_text(text.get("assistant"), where, f"texts[{index}].assistant")
            turns.append(SampleTurn(() if index else pictures, user, (answer,)))
        return Sample(where, inputs.row_id(number), tuple(turns))

    return each_row(parquet_rows(inputs, ["images", "texts"]), build)


def docvqa_mini(inputs: Inputs) -> Samples:
    """The mini DocVQA set: `image` {bytes, path}, `query` {en, …}, `answers`: all are accepted, the first trains."""

    def build(where: str, number: int, row: dict[str, object]) -> Sample:
        query = row["query"]
        question = some_text(query.get("en") if isinstance(query, dict) else query, where, "query.en")
        answers = accepted_answers(row["answers"], where)
        picture = _bytes_picture(row["image"], where, "image")
        turn = SampleTurn((picture,), f"{question}\nAnswer briefly.", answers)
        return Sample(where, inputs.row_id(number), (turn,))

    return each_row(parquet_rows(inputs, ["image", "query", "answers"]), build)


def image_folder(inputs: Inputs) -> Samples:
    """CLASS/picture or SPLIT/CLASS/picture: the folder is the answer. In option prompt, {classes} lists the classes."""
    pictures = []
    for path in inputs.files:
        parts = path.relative_to(inputs.root).parts
        if path.suffix.lower() in IMAGE_SUFFIXES and len(parts) >= 2:
            pictures.append((parts[-3] if len(parts) > 2 else "", parts[-2], path))
    folder = inputs.split if any(split == inputs.split for split, _, _ in pictures) else ""
    chosen = sorted(item for item in pictures if item[0] == folder)
    if not chosen:
        raise DataError(
            f"{inputs.root}: no pictures as CLASS/NAME or {inputs.split}/CLASS/NAME; expected suffixes "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    classes = sorted({label for _, label, _ in pictures})
    prompt = inputs.options.get("prompt", classes_prompt("image", ["{classes}"])).replace(
        "{classes}", ", ".join(classes)
    )

    def build(where: str, number: int, item: tuple[str, str, Path]) -> Sample:
        _, label, path = item
        picture = Picture(path, f"{label}/{path.name}")
        return Sample(where, inputs.row_id(number), (SampleTurn((picture,), prompt, (label,)),))

    rows = ((str(item[2].relative_to(inputs.root)), number, item) for number, item in enumerate(chosen))
    return each_row(rows, build)


def table(inputs: Inputs) -> Samples:
    """CSV or TSV (by suffix) with a header: image, question, answer.

    `image` may be empty (text only) or name several pictures, separated by ";". Optional column `answers`: all accepted
    answers, separated by "|". Option prompt_suffix is added to every question.
    """

    def build(where: str, number: int, row: dict[str, str]) -> Sample:
        if row[""] != "0":
            raise DataError(f"{where}: {row['']} fields more than the header (negative: fewer); expected as many")
        names = [name.strip() for name in row["image"].split(";") if name.strip()]
        pictures = tuple(picture_under(inputs.images_dir, name, where, "image") for name in names)
        others = [text.strip() for text in row.get("answers", "").split("|") if text.strip()]
        answers = tuple(dict.fromkeys([some_text(row["answer"], where, "answer"), *others]))
        user = some_text(row["question"], where, "question") + inputs.options.get("prompt_suffix", "")
        return Sample(where, inputs.row_id(number), (SampleTurn(pictures, user, answers),))

    return each_row(table_rows(inputs.only(".csv", ".tsv", ".txt"), ["image", "question", "answer"]), build)


def llava(inputs: Inputs) -> Samples:
    """LLaVA/ShareGPT: a list (or jsonl) of {image(s) or video, conversations: [{from, value}, …]}, human and gpt in
    turn.

    A message takes as many pictures as it has `<image>` marks; pictures without a mark come first. Marks at the ends of
    a text go; a mark inside it becomes "image N", because the pictures of a turn stand before its text.
    """
    frames = int(inputs.options.get("frames", "8"))

    def files(item: dict[str, object], field: str, where: str) -> list[Picture]:
        names = item.get(field, item.get(f"{field}s"))
        listed = names if isinstance(names, list) else [] if names is None else [names]
        return [picture_under(inputs.images_dir, name, where, field) for name in listed]

    def build(where: str, number: int, item: dict[str, object]) -> Sample:
        pictures = files(item, "image", where)
        for clip in files(item, "video", where):
            assert isinstance(clip.data, Path)
            jpegs = sample_frames(clip.data, frames)
            pictures += [Picture(data, f"{clip.name}.{index}.jpg") for index, data in enumerate(jpegs)]
        system, pairs = _pairs(item.get("conversations", item.get("messages")), where)
        marks = [user.count("<image>") + user.count("<video>") * frames for user, _ in pairs]
        if sum(marks) > len(pictures):
            raise DataError(f"{where}: {sum(marks)} <image> marks; expected as many as pictures ({len(pictures)})")
        marks[0] += len(pictures) - sum(marks)
        turns: list[SampleTurn] = []
        first = 0
        for (user, answer), count in zip(pairs, marks, strict=True):
            text = _numbered(without_markers(user.replace("<video>", "")), first)
            text = f"{system}\n{text}" if system and not turns else text
            turns.append(SampleTurn(tuple(pictures[first : first + count]), text, (answer,)))
            first += count
        return Sample(where, inputs.row_id(number), tuple(turns))

    return each_object(json_items(inputs.only(".json", ".jsonl")), build)


def _pairs(messages: object, where: str) -> tuple[str, list[tuple[str, str]]]:
    """(system text, (question, answer) pairs) of LLaVA messages."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field `conversations`: got {shown(messages)}; expected a list of messages")
    system, texts = "", list[str]()
    for index, message in enumerate(messages):
        field = f"conversations[{index}]"
        kind = ROLES.get(str(message.get("from", message.get("role")))) if isinstance(message, dict) else None
        if kind is None:
            raise DataError(f"{where}: field `{field}.from`: got {shown(message)}; expected human, gpt or system")
        text = some_text(message.get("value", message.get("content")), where, f"{field}.value")
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
    """Marks inside a text as words, numbered over the conversation; a text that was only marks gets a question."""
    number = first
    while "<image>" in text:
        number += 1
        text = text.replace("<image>", f"image {number}", 1)
    return text or "Describe what you see."


def nlvr2_official(inputs: Inputs) -> Samples:
    """NLVR2's dev.json, test1.json: one object a line (identifier, sentence, label), and pairs dev-0-0-img{0,1}.png."""
    prompt = inputs.options.get("prompt", 'For the images shown, is this caption "{sentence}" true?\nAnswer yes or no.')

    def build(where: str, number: int, item: dict[str, object]) -> Sample:
        name = some_text(item.get("identifier"), where, "identifier")
        label = str(item.get("label"))
        if label not in ("True", "False"):
            raise DataError(f"{where}: field `label`: got {shown(label)}; expected True or False")
        files = [f"{name.rpartition('-')[0]}-img{k}.png" for k in (0, 1)]
        pictures = tuple(picture_under(inputs.images_dir, file, where, "identifier") for file in files)
        user = prompt.replace("{sentence}", some_text(item.get("sentence"), where, "sentence"))
        return Sample(where, name, (SampleTurn(pictures, user, ("Yes" if label == "True" else "No",)),))

    return each_object(json_items(inputs.only(".json", ".jsonl")), build)


def hateful_memes_official(inputs: Inputs) -> Samples:
    """Hateful Memes' dev_seen.jsonl, test_seen.jsonl: id, img, label, text, with the img/ folder."""
    prompt = inputs.options.get("prompt", "Is this an offensive meme?\nAnswer yes or no.")

    def build(where: str, number: int, item: dict[str, object]) -> Sample:
        label = item.get("label")
        if label not in (0, 1):
            raise DataError(f"{where}: field `label`: got {shown(label)}; expected 0 or 1")
        picture = picture_under(inputs.images_dir, item.get("img"), where, "img")
        return Sample(where, f"meme-{item.get('id')}", (SampleTurn((picture,), prompt, ("Yes" if label else "No",)),))

    return each_object(json_items(inputs.only(".jsonl", ".json")), build)


def docvqa_official(inputs: Inputs) -> Samples:
    """DocVQA's val_v1.0.json: {"data": [{questionId, question, image, answers}, …]} with the documents/ folder."""
    path = inputs.only(".json")

    def rows() -> Iterator[tuple[str, int, object]]:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, list):
            raise DataError(f"{path}: expected a JSON object with a list `data`")
        yield from ((f"{path.name}: data[{number}]", number, item) for number, item in enumerate(data))

    def build(where: str, number: int, item: dict[str, object]) -> Sample:
        answers = accepted_answers(item.get("answers"), where)
        picture = picture_under(inputs.images_dir, item.get("image"), where, "image")
        user = f"{some_text(item.get('question'), where, 'question')}\nAnswer briefly."
        return Sample(where, f"docvqa-{item.get('questionId', number)}", (SampleTurn((picture,), user, answers),))

    return each_object(rows(), build)


def ucf101(inputs: Inputs) -> Samples:
    """UCF-101-like clips SPLIT/CLASS/*.avi of an archive or folder: clips of one split in order of class and name.

    Frames at arange(0, n, n/8), named CLASS/CLIP.0.jpg …; the class is the answer. The prompt lists the sorted classes
    of all splits, and ids count over train, val, test.
    """
    clips = _clips(inputs)
    order = {split: position for position, split in enumerate(SPLIT_ORDER)}
    keys = sorted(clips, key=lambda key: (order.get(key[0], len(order)), *key))
    chosen = [(number, key) for number, key in enumerate(keys) if key[0] == inputs.split]
    if not chosen:
        raise DataError(
            f"{', '.join(map(str, inputs.files))}: no clips of split {inputs.split!r}; expected SPLIT/CLASS/CLIP.avi, "
            f"got splits {sorted({split for split, _, _ in keys})}"
        )
    prompt = classes_prompt("video", sorted({label for _, label, _ in keys}))
    frames = int(inputs.options.get("frames", "8"))
    decoded = _decoded([clips[key] for _, key in chosen], frames, inputs.workers)
    for (number, key), jpegs in zip(chosen, decoded, strict=True):
        split, label, clip = key
        if clips[key].is_relative_to(inputs.scratch):
            clips[key].unlink(missing_ok=True)
        if isinstance(jpegs, str):
            yield Rejection("/".join(key), jpegs.removeprefix(f"{clips[key]}: "))
            continue
        stem = PurePosixPath(clip).stem
        pictures = tuple(Picture(data, f"{label}/{stem}.{index}.jpg") for index, data in enumerate(jpegs))
        yield Sample("/".join(key), f"{split}-{number:010d}", (SampleTurn(pictures, prompt, (label,)),))
    shutil.rmtree(inputs.scratch, ignore_errors=True)


def _clips(inputs: Inputs) -> dict[tuple[str, str, str], Path]:
    """(split, class, clip name) to file, of archives and folders: a path's last three parts."""
    clips: dict[tuple[str, str, str], Path] = {}

    def add(name: str, path: Path) -> None:
        parts = PurePosixPath(name).parts
        if len(parts) < 3:
            raise DataError(f"{name}: expected SPLIT/CLASS/CLIP, as the path's last folders")
        key = (parts[-3], parts[-2], parts[-1])
        if key in clips:
            raise DataError(f"{name}: split, class and clip are those of {clips[key]}; expected each once")
        clips[key] = path

    for file in inputs.files:
        if file.name.endswith(ARCHIVE_SUFFIXES):
            for name in unpack(file, inputs.scratch, lambda name: name.lower().endswith(VIDEO_SUFFIXES)):
                add(name, inputs.scratch / name)
                if f"/{inputs.split}/" not in f"/{name}":
                    # Clips of other splits only count: ids continue over all of them.
                    (inputs.scratch / name).unlink()
        elif file.suffix.lower() in VIDEO_SUFFIXES:
            add(file.relative_to(inputs.root).as_posix(), file)
    return clips


def _decoded(paths: list[Path], frames: int, workers: int) -> Iterator[list[bytes] | str]:
    """The frames of each clip, in order, or why there are none.

    Processes, not threads: writing JPEG holds the interpreter. A short queue keeps memory flat.
    """
    if workers == 1:
        yield from (_decode_clip(path, frames) for path in paths)
        return
    with process_pool(workers) as pool:
        pending: deque[tuple[Path, Future[list[bytes] | str]]] = deque()
        try:
            for path in paths:
                pending.append((path, pool.submit(_decode_clip, path, frames)))
                if len(pending) > 2 * workers:
                    yield pending.popleft()[1].result()
            while pending:
                yield pending.popleft()[1].result()
        except BrokenProcessPool:
            near = ", ".join(path.name for path, _ in pending)
            raise DataError(f"a process ended while it decoded a clip; --workers 1 tells which (near {near})") from None
        finally:
            for _, future in pending:
                future.cancel()


def _decode_clip(path: Path, frames: int) -> list[bytes] | str:
    try:
        return sample_frames(path, frames)
    except DataError as error:
        return str(error)


FORMATS: dict[str, Callable[[Inputs], Samples]] = {
    "cauldron": cauldron,
    "docvqa_mini": docvqa_mini,
    "ucf101": ucf101,
    "image_folder": image_folder,
    "table": table,
    "llava": llava,
    "nlvr2_official": nlvr2_official,
    "hateful_memes_official": hateful_memes_official,
    "docvqa_official": docvqa_official,
}
