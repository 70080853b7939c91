"""The demo's source files: what the hub serves, small and synthetic, in the same formats and folders.

    make_sources("results/demo-sources", seed=0, sizes={"docvqa_train": 600})

writes, below that folder,
    the_cauldron/{docvqa,hateful_memes,nlvr2}/train-00000-of-00001.parquet
        images [{bytes, path}], texts [{user, assistant, source}]
    docvqa_1200_examples/data/{train,test}-00000-of-00001.parquet
        id, image {bytes, path}, query {en}, answers
    ucf101-subset/UCF101_subset.tar.gz
        UCF101_subset/{train,val,test}/CLASS/v_CLASS_gNN_cNN.avi
    mixture/{train,val}-00000-of-00001.parquet
        like the_cauldron: what the tiny base is pre-trained on

The same seed and sizes give the same bytes (with the same versions of Pillow, PyArrow and PyAV), and no picture occurs
twice in all of them, so nothing evaluated was ever trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from phi3v.data import demo_tasks as tasks
from phi3v.data.demo_pictures import jpeg_bytes, png_bytes
from phi3v.data.demo_tasks import TaskRow

SIZES: dict[str, int] = {
    "docvqa_train": 1600,
    "docvqa_mini_train": 1000,
    "docvqa_test": 200,
    "hateful_memes": 2300,
    "nlvr2": 2300,
    "ucf101_train": 30,
    "ucf101_val": 20,
    "ucf101_test": 6,
    "mixture_train": 8000,
    "mixture_val": 100,
}
"""Rows of each source file; of ucf101: clips of each class."""

CLIP_FRAMES = 16
"""Frames of a clip; the converter takes every second one."""

Row = dict[str, Any]


class _Unique:
    """Draws rows until their pictures are new, so that no picture is in two files or twice in one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seen: set[bytes] = set()

    def draw(self, task: str, index: int, make: Callable[[Random], TaskRow]) -> TaskRow:
        """The first row of (seed, task, index, attempt) none of whose pictures was drawn before."""
        for attempt in range(100):
            row = make(tasks.rng_of(self.seed, f"{task}/{attempt}", index))
            digests = [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in row.pictures]
            if len(set(digests)) == len(digests) and self.seen.isdisjoint(digests):
                self.seen.update(digests)
                return row
        raise ValueError(f"{task}: row {index}: 100 draws gave no new picture, expected fewer rows or a richer task")


def _cauldron_row(row: TaskRow, source: str, encode: Callable[[Image.Image], bytes]) -> Row:
    images = [{"bytes": encode(picture), "path": None} for picture in row.pictures]
    texts = [{"user": user, "assistant": assistant, "source": source} for user, assistant in row.turns]
    return {"images": images, "texts": texts}


def _mini_row(row: TaskRow, identity: str) -> Row:
    (question, answer), *_ = row.turns
    image = {"bytes": png_bytes(row.pictures[0]), "path": None}
    return {"id": identity, "image": image, "query": {"en": question}, "answers": [answer, answer.capitalize()]}


def _write_parquet(path: Path, rows: Iterable[Row], columns: Any) -> None:
    """Write rows in groups of 500; the file appears under its name only when it is whole."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with pyarrow.parquet.ParquetWriter(unfinished, columns, compression="snappy") as writer:
        group: list[Row] = []
        for row in rows:
            group.append(row)
            if len(group) == 500:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=columns))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=columns))
    os.replace(unfinished, path)


def _cauldron_columns() -> Any:
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    return pa.schema([("images", pa.list_(image)), ("texts", pa.list_(text))])


def _mini_columns() -> Any:
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    query = pa.struct([("en", pa.string())])
    return pa.schema([("id", pa.string()), ("image", image), ("query", query), ("answers", pa.list_(pa.string()))])


def avi_bytes(frames: list[Image.Image], rate: int = 8) -> bytes:
    """The frames as an AVI file (MPEG-4 part 2, as UCF-101's clips are XviD), `rate` frames a second."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"qscale": "3", "flags": "+qscale+bitexact"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def _clips(unique: _Unique, clips: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """(path in the archive, AVI bytes); the groups g01, g02 … of UCF-101 are never shared by two splits."""
    group = 0
    for split, number in clips.items():
        for clip in range(number):
            group += clip % 4 == 0
            for name in tasks.UCF_CLASSES:

                def make(rng: Random, name: str = name) -> TaskRow:
                    return TaskRow(tuple(tasks.clip_frames(rng, name, CLIP_FRAMES)), ())

                row = unique.draw(f"ucf101/{split}/{name}", clip, make)
                stem = f"v_{name}_g{group:02d}_c{clip % 4 + 1:02d}"
                yield f"UCF101_subset/{split}/{name}/{stem}.avi", avi_bytes(list(row.pictures))


def _write_archive(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar.gz without times, owners or names of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with (
        open(unfinished, "wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    os.replace(unfinished, path)


def resolve_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """All sizes, the given ones in place of the defaults.

    Raises:
        ValueError: a name that is no size, or a number below 1.
    """
    for name, number in sizes.items():
        if name not in SIZES:
            raise ValueError(f"sizes: {name!r} is unknown, expected some of {', '.join(SIZES)}")
        if number < 1:
            raise ValueError(f"sizes: {name} is {number}, expected at least 1")
    return {**SIZES, **sizes}


def make_sources(folder: str | Path, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[Path]:
    """Write all source files of the module's list below `folder`.

    Args:
        sizes: rows by the names of `SIZES`; names left out keep their default.

    Returns:
        The files, in the order in which they were written.

    Raises:
        ValueError: an unknown size or a number below 1.
    """
    folder = Path(folder)
    number = resolve_sizes(sizes or {})
    unique = _Unique(seed)
    files: list[Path] = []

    def cauldron(path: str, task: str, rows: int, make: Callable[[Random], TaskRow], encode=png_bytes) -> None:
        drawn = (_cauldron_row(unique.draw(task, index, make), task, encode) for index in range(rows))
        _write_parquet(folder / path, drawn, _cauldron_columns())
        files.append(folder / path)

    def mini(path: str, task: str, rows: int) -> None:
        drawn = (_mini_row(unique.draw(task, index, tasks.slip_row), f"{task}_{index}") for index in range(rows))
        _write_parquet(folder / path, drawn, _mini_columns())
        files.append(folder / path)

    def mixture(path: str, task: str, rows: int) -> None:
        drawn = (
            _cauldron_row(unique.draw(task, index, tasks.MIXTURE[index % len(tasks.MIXTURE)]), "mixture", png_bytes)
            for index in range(rows)
        )
        _write_parquet(folder / path, drawn, _cauldron_columns())
        files.append(folder / path)

    shard = "train-00000-of-00001.parquet"
    cauldron(f"the_cauldron/docvqa/{shard}", "docvqa", number["docvqa_train"], tasks.docvqa_row)
    cauldron(f"the_cauldron/hateful_memes/{shard}", "hateful_memes", number["hateful_memes"], tasks.hateful_memes_row)
    cauldron(f"the_cauldron/nlvr2/{shard}", "nlvr2", number["nlvr2"], tasks.nlvr2_row, jpeg_bytes)
    mini("docvqa_1200_examples/data/train-00000-of-00001.parquet", "train", number["docvqa_mini_train"])
    mini("docvqa_1200_examples/data/test-00000-of-00001.parquet", "test", number["docvqa_test"])
    archive = folder / "ucf101-subset" / "UCF101_subset.tar.gz"
    _write_archive(archive, _clips(unique, {split: number[f"ucf101_{split}"] for split in ("train", "val", "test")}))
    files.append(archive)
    mixture("mixture/train-00000-of-00001.parquet", "mixture_train", number["mixture_train"])
    mixture("mixture/val-00000-of-00001.parquet", "mixture_val", number["mixture_val"])
    return files
