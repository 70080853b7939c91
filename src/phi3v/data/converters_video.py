"""Converter of UCF-101-like video archives: SPLIT/CLASS/*.avi, eight frames a clip, the class as the answer."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from phi3v.data.archives import unpack
from phi3v.data.conversations import DataError
from phi3v.data.samples import Inputs, Picture, Rejection, Sample, SampleTurn
from phi3v.data.video import sample_frames

SPLIT_ORDER = ("train", "val", "test")
"""Ids count on over the splits in this order."""

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm")


def video_prompt(classes: list[str]) -> str:
    """The recipe's prompt."""
    return f"Classify the video into one of the following classes: {', '.join(classes)}."


def _clips(inputs: Inputs) -> dict[tuple[str, str, str], Path]:
    """(split, class, clip name) to file, of an archive or a folder; a path's last folders say split and class."""
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
        if file.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
            split = f"/{inputs.split}/"

            def wanted(name: str, split: str = split) -> bool:
                return name.lower().endswith(VIDEO_SUFFIXES)

            for name in unpack(file, inputs.scratch, wanted):
                add(name, inputs.scratch / name)
                if split not in f"/{name}":
                    # Clips of other splits only count: ids go on over all of them.
                    (inputs.scratch / name).unlink()
        elif file.suffix.lower() in VIDEO_SUFFIXES:
            add(file.relative_to(inputs.root).as_posix(), file)
    return clips


def ucf101(inputs: Inputs) -> Iterator[Sample | Rejection]:
    """Clips of one split in order of class and name. Frames at arange(0, n, n/8), named CLASS/CLIP.0.jpg …; the prompt
    lists the sorted classes of all splits; ids count on over train, val, test."""
    clips = _clips(inputs)
    order = {split: position for position, split in enumerate(SPLIT_ORDER)}
    keys = sorted(clips, key=lambda key: (order.get(key[0], len(order)), *key))
    splits = {split for split, _, _ in keys}
    if inputs.split not in splits:
        raise DataError(
            f"{', '.join(map(str, inputs.files))}: no clips of split {inputs.split!r}; expected SPLIT/CLASS/CLIP.avi, "
            f"got splits {sorted(splits)}"
        )
    prompt = video_prompt(sorted({name for _, name, _ in keys}))
    frames = int(inputs.option("frames", "8"))

    def build(number: int, key: tuple[str, str, str]) -> Sample | Rejection:
        split, label, clip = key
        where = "/".join(key)
        path = clips[key]
        try:
            stem = PurePosixPath(clip).stem
            jpegs = sample_frames(path, frames)
            pictures = tuple(Picture(data, f"{label}/{stem}.{index}.jpg") for index, data in enumerate(jpegs))
            return Sample(where, f"{split}-{number:010d}", (SampleTurn(pictures, prompt, (label,)),))
        except DataError as error:
            return Rejection(where, str(error).removeprefix(f"{path}: "))
        finally:
            if path.is_relative_to(inputs.scratch):
                path.unlink(missing_ok=True)

    # Threads: decoding and JPEG writing both leave the interpreter; a short queue keeps memory flat.
    with ThreadPoolExecutor(inputs.workers) as pool:
        pending: deque[Future[Sample | Rejection]] = deque()
        try:
            for number, key in enumerate(keys):
                if key[0] != inputs.split:
                    continue
                pending.append(pool.submit(build, number, key))
                if len(pending) > 2 * inputs.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
    shutil.rmtree(inputs.scratch, ignore_errors=True)
