"""Converter of UCF-101-like video archives: SPLIT/CLASS/*.avi, eight frames a clip, the class as the answer."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

from phi3v.data.archives import unpack
from phi3v.data.conversations import DataError
from phi3v.data.processes import process_pool
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

    def build(number: int, key: tuple[str, str, str], jpegs: list[bytes] | str) -> Sample | Rejection:
        split, label, clip = key
        where = "/".join(key)
        path = clips[key]
        if path.is_relative_to(inputs.scratch):
            path.unlink(missing_ok=True)
        if isinstance(jpegs, str):
            return Rejection(where, jpegs.removeprefix(f"{path}: "))
        stem = PurePosixPath(clip).stem
        pictures = tuple(Picture(data, f"{label}/{stem}.{index}.jpg") for index, data in enumerate(jpegs))
        return Sample(where, f"{split}-{number:010d}", (SampleTurn(pictures, prompt, (label,)),))

    chosen = [(number, key) for number, key in enumerate(keys) if key[0] == inputs.split]
    decoded = _decoded([clips[key] for _, key in chosen], frames, inputs.workers)
    for (number, key), jpegs in zip(chosen, decoded, strict=True):
        yield build(number, key, jpegs)
    shutil.rmtree(inputs.scratch, ignore_errors=True)


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
