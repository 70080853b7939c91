"""Formats of the recipe's own sources: the_cauldron, the mini DocVQA, UCF-101, and the official validation splits.

Their JSONL content, ids and picture names follow the recipe. Digests of published results depend on every byte.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path, PurePosixPath

from phi3v.data.conversations import DataError, quoted
from phi3v.data.pictures import sample_frames
from phi3v.data.processes import process_pool, read_ahead
from phi3v.data.rows import (
    Inputs,
    Picture,
    Rejection,
    Row,
    Rows,
    Sample,
    SampleTurn,
    each_row,
    is_junk,
    json_rows,
    parquet_rows,
    picture_under,
    some_text,
    unpack,
)

Samples = Iterator[Sample | Rejection]
"""Output of a format: its rows in order, including those that cannot be converted."""

VIDEO_SUFFIXES = (
    ".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".wmv", ".asf", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".ogg",
    ".3gp", ".gif", ".ivf", ".mxf",
)  # fmt: skip
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

SPLIT_ORDER = ("train", "val", "test")
"""Order of the splits for numbering clips."""


def classes_prompt(kind: str, classes: list[str]) -> str:
    """The recipe's prompt for clips, also used for pictures."""
    return f"Classify the {kind} into one of the following classes: {', '.join(classes)}."


def without_markers(text: str) -> str:
    """The text without `<image>` marks at its ends, because pictures come before the text in the JSONL format."""
    return re.sub(r"^(?:<image>\s*)+|(?:\s*<image>)+$", "", text.strip())


def _parquet(inputs: Inputs, columns: list[str]) -> Rows:
    """Rows of all files, with continuous numbers."""
    numbers = itertools.count()
    return itertools.chain.from_iterable(parquet_rows(path, numbers, columns) for path in inputs.files)


def _picture(value: object, where: str, field: str) -> Picture:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{where}: field `{field}.bytes`: got {quoted(data)}; expected the picture's encoded bytes")
    return Picture(data)


def docvqa_mini(inputs: Inputs) -> Samples:
    """The mini DocVQA set: `image` {bytes, path}, `query` {en, …}, `answers`. All answers are accepted, the first
    trains."""

    def build(where: str, number: int, row: Row) -> Sample:
        query, answers = row["query"], row["answers"]
        question = some_text(query.get("en") if isinstance(query, dict) else query, where, "query.en")
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{where}: field `answers`: got {quoted(answers)}; expected a list of accepted answers")
        texts = dict.fromkeys(some_text(answer, where, f"answers[{k}]") for k, answer in enumerate(answers))
        turn = SampleTurn((_picture(row["image"], where, "image"),), f"{question}\nAnswer briefly.", tuple(texts))
        return Sample(where, inputs.row_id(number), (turn,))

    return each_row(_parquet(inputs, ["image", "query", "answers"]), build)


def cauldron(inputs: Inputs) -> Samples:
    """the_cauldron: `images` (list of {bytes, path}) and `texts` (list of {user, assistant, source}).

    All questions of a row become turns. The pictures belong to the first turn.
    """

    def build(where: str, number: int, row: Row) -> Sample:
        images, texts = row["images"], row["texts"]
        if not isinstance(images, list) or not images:
            raise DataError(f"{where}: field `images`: got {quoted(images)}; expected a list of pictures")
        if not isinstance(texts, list) or not texts:
            raise DataError(f"{where}: field `texts`: got {quoted(texts)}; expected a list of questions and answers")
        pictures = tuple(_picture(image, where, f"images[{index}]") for index, image in enumerate(images))
        turns = []
        for index, text in enumerate(texts):
            if not isinstance(text, dict):
                raise DataError(f"{where}: field `texts[{index}]`: got {quoted(text)}; expected user and assistant")
            user = without_markers(some_text(text.get("user"), where, f"texts[{index}].user"))
            answer = some_text(text.get("assistant"), where, f"texts[{index}].assistant")
            turns.append(SampleTurn(() if index else pictures, user, (answer,)))
        return Sample(where, inputs.row_id(number), tuple(turns))

    return each_row(_parquet(inputs, ["images", "texts"]), build)


def nlvr2_official(inputs: Inputs) -> Samples:
    """NLVR2's dev.json, test1.json: one object per line (identifier, sentence, label), pictures
    dev-0-0-img{0,1}.png."""
    prompt = inputs.options.prompt or 'For the images shown, is this caption "{sentence}" true?\nAnswer yes or no.'

    def build(where: str, number: int, item: Row) -> Sample:
        name = some_text(item.get("identifier"), where, "identifier")
        label = str(item.get("label"))
        if label not in ("True", "False"):
            raise DataError(f"{where}: field `label`: got {quoted(label)}; expected True or False")
        files = [f"{name.rpartition('-')[0]}-img{k}.png" for k in (0, 1)]
        pictures = tuple(picture_under(inputs.images_dir, file, where, "identifier") for file in files)
        user = prompt.replace("{sentence}", some_text(item.get("sentence"), where, "sentence"))
        return Sample(where, name, (SampleTurn(pictures, user, ("Yes" if label == "True" else "No",)),))

    return each_row(json_rows(inputs.only(".json", ".jsonl"), itertools.count()), build)


def hateful_memes_official(inputs: Inputs) -> Samples:
    """Hateful Memes' dev_seen.jsonl, test_seen.jsonl: id, img, label, text, with the img/ folder."""
    prompt = inputs.options.prompt or "Is this an offensive meme?\nAnswer yes or no."

    def build(where: str, number: int, item: Row) -> Sample:
        label = item.get("label")
        if label not in (0, 1):
            raise DataError(f"{where}: field `label`: got {quoted(label)}; expected 0 or 1")
        picture = picture_under(inputs.images_dir, item.get("img"), where, "img")
        return Sample(where, f"meme-{item.get('id')}", (SampleTurn((picture,), prompt, ("Yes" if label else "No",)),))

    return each_row(json_rows(inputs.only(".jsonl", ".json"), itertools.count()), build)


def ucf101(inputs: Inputs) -> Samples:
    """Clips SPLIT/CLASS/*.avi in an archive or folder, as in UCF-101: those of one split, ordered by class and name.

    Frames at arange(0, n, n/8) become pictures CLASS/CLIP.0.jpg …, and the class is the answer. The prompt lists the
    sorted classes of all splits. Ids count over train, val, test.
    """
    clips = _clips(inputs)
    order = {split: position for position, split in enumerate(SPLIT_ORDER)}
    keys = sorted(clips, key=lambda key: (order.get(key[0], len(order)), *key))
    chosen = [(number, key) for number, key in enumerate(keys) if key[0] == inputs.split]
    if not chosen:
        raise DataError(
            f"{', '.join(map(str, inputs.files))}: got no clips of split {inputs.split!r}, only splits "
            f"{sorted({split for split, _, _ in keys})}; expected SPLIT/CLASS/CLIP.avi"
        )
    prompt = classes_prompt("video", sorted({label for _, label, _ in keys}))
    decoded = _decoded([clips[key] for _, key in chosen], inputs.options.frames, inputs.workers)
    for (number, key), jpegs in zip(chosen, decoded, strict=True):
        split, label, clip = key
        if clips[key].is_relative_to(inputs.scratch):
            clips[key].unlink(missing_ok=True)
        if isinstance(jpegs, str):
            yield Rejection("/".join(key), jpegs.removeprefix(f"{clips[key]}: "))
            continue
        stem = PurePosixPath(clip).stem
        pictures = tuple(Picture(data, f"{label}/{stem}.{index}.jpg", decoded=True) for index, data in enumerate(jpegs))
        yield Sample("/".join(key), f"{split}-{number:010d}", (SampleTurn(pictures, prompt, (label,)),))
    shutil.rmtree(inputs.scratch, ignore_errors=True)


def _clips(inputs: Inputs) -> dict[tuple[str, str, str], Path]:
    """(split, class, clip name) to file, from archives and folders. These are the last three parts of a path."""
    clips: dict[tuple[str, str, str], Path] = {}

    def is_clip(name: str) -> bool:
        if is_junk(PurePosixPath(name)):
            return False
        if not (known := name.lower().endswith(VIDEO_SUFFIXES)):
            inputs.untaken[name] = f"not a clip; expected one of {', '.join(VIDEO_SUFFIXES)}"
        return known

    def add(name: str, path: Path) -> None:
        parts = PurePosixPath(name).parts
        if len(parts) < 3:
            raise DataError(f"{name}: expected a path that ends in SPLIT/CLASS/CLIP")
        key = (parts[-3], parts[-2], parts[-1])
        if key in clips:
            raise DataError(f"{name}: has the same split, class and name as {clips[key]}; expected unique names")
        clips[key] = path

    for file in inputs.files:
        if file.name.endswith(ARCHIVE_SUFFIXES):
            for name in unpack(file, inputs.scratch, is_clip):
                add(name, inputs.scratch / name)
                if f"/{inputs.split}/" not in f"/{name}":
                    # Clips of other splits are only counted, because ids continue over all splits.
                    (inputs.scratch / name).unlink()
        elif is_clip(name := file.relative_to(inputs.root).as_posix()):
            add(name, file)
    return clips


def _decoded(paths: list[Path], frames: int, workers: int) -> Iterator[list[bytes] | str]:
    """The frames of each clip in order, or an error text. Uses processes, because writing JPEG holds the GIL."""
    decode, path = partial(_decode_clip, frames=frames), paths[0]
    if workers == 1:
        yield from map(decode, paths)
        return
    with process_pool(workers) as pool:
        try:
            for path, clip in read_ahead(pool, decode, paths, 2 * workers):  # noqa: B007
                yield clip.result()
        except BrokenProcessPool:
            raise DataError(
                f"a process crashed while decoding a clip near {path.name}; find the clip with --workers 1"
            ) from None


def _decode_clip(path: Path, frames: int) -> list[bytes] | str:
    try:
        return sample_frames(path, frames)
    except DataError as error:
        return str(error)


FORMATS: dict[str, Callable[[Inputs], Samples]] = {
    "cauldron": cauldron,
    "docvqa_mini": docvqa_mini,
    "ucf101": ucf101,
    "nlvr2_official": nlvr2_official,
    "hateful_memes_official": hateful_memes_official,
}
