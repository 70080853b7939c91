"""The demo's source files: what the hub serves, small and synthetic, in the same formats and folders.

    make_sources("results/demo-sources", seed=0, sizes={"docvqa_train": 600})

writes below that folder
    the_cauldron/{docvqa,hateful_memes,nlvr2}/train-00000-of-00001.parquet
        images [{bytes, path}], texts [{user, assistant, source}]
    docvqa_1200_examples/data/{train,test}-00000-of-00001.parquet
        id, image {bytes, path}, query {en}, answers
    ucf101-subset/UCF101_subset.tar.gz
        UCF101_subset/{train,val,test}/CLASS/v_CLASS_gNN_cNN.avi
    mixture/{train,val}-00000-of-00001.parquet
        like the_cauldron: what the tiny base is pre-trained on

The same seed and sizes give the same bytes (with the same versions of Pillow, PyArrow and PyAV). No picture occurs
twice in all files, so nothing evaluated was ever trained on.

    write_digits("results/demo-sources/digits", seed=0)

writes 1,797 real scans that scikit-learn ships, in the two layouts of users' own data: pictures as
{train,val}/DIGIT/NNNN.png (8 x 8 grey pixels) for the format `image_folder`, and train.tsv, val.tsv with the columns
image, question, answer for the format `table`. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998 (its test part).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from PIL import Image

from phi3v.demo import tasks
from phi3v.demo.tasks import jpeg_bytes, png_bytes

if TYPE_CHECKING:
    import pyarrow

SIZES: dict[str, int] = {
    "docvqa_train": 1600, "docvqa_mini_train": 1000, "docvqa_test": 200, "hateful_memes": 1800, "nlvr2": 1500,
    "ucf101_train": 30, "ucf101_val": 20, "ucf101_test": 6, "mixture_train": 7200, "mixture_val": 100,
}  # fmt: skip
"""Rows of each source file; of ucf101: clips of each class."""

CLIP_FRAMES = 16
"""Frames of a clip; the converter takes every second one."""

DIGIT_QUESTION = "Which digit is written here?"
HELD_OUT = 400
"""Scanned digits of the split `val`."""

SHARD = "{}-00000-of-00001.parquet"

Row = dict[str, object]
Encoder = Callable[[Image.Image], bytes]


class _Unique:
    """Draws rows until their pictures are new, so that no picture is in two files or twice in one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seen: set[bytes] = set()

    def draw(self, task: str, index: int, make: Callable[[Random], tasks.TaskRow]) -> tasks.TaskRow:
        """The first row of (seed, task, index, attempt) none of whose pictures was drawn before."""
        for attempt in range(100):
            row = make(tasks.rng_of(self.seed, f"{task}/{attempt}", index))
            digests = [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in row.pictures]
            if len(set(digests)) == len(digests) and self.seen.isdisjoint(digests):
                self.seen.update(digests)
                return row
        raise ValueError(f"{task}: row {index}: 100 draws gave no new picture; expected fewer rows or a richer task")


def _cauldron_row(row: tasks.TaskRow, source: str, encode: Encoder) -> Row:
    images = [{"bytes": encode(picture), "path": None} for picture in row.pictures]
    texts = [{"user": user, "assistant": assistant, "source": source} for user, assistant in row.turns]
    return {"images": images, "texts": texts}


def _mini_row(row: tasks.TaskRow, identity: str) -> Row:
    (question, answer), *_ = row.turns
    image = {"bytes": png_bytes(row.pictures[0]), "path": None}
    return {"id": identity, "image": image, "query": {"en": question}, "answers": [answer, answer.capitalize()]}


def _schemas() -> tuple[pyarrow.Schema, pyarrow.Schema]:
    """Columns of the_cauldron and of the mini DocVQA set."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")])
    query = pa.struct([("en", pa.string())])
    return (
        pa.schema([("images", pa.list_(image)), ("texts", pa.list_(text))]),
        pa.schema([("id", pa.string()), ("image", image), ("query", query), ("answers", pa.list_(pa.string()))]),
    )


def _write_parquet(path: Path, rows: Iterator[Row], schema: pyarrow.Schema) -> Path:
    """Write rows in groups of 500; the file appears under its name only when it is whole."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with pyarrow.parquet.ParquetWriter(unfinished, schema, compression="snappy") as writer:
        while group := list(islice(rows, 500)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    os.replace(unfinished, path)
    return path


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

                def make(rng: Random, name: str = name) -> tasks.TaskRow:
                    return tasks.TaskRow(tuple(tasks.clip_frames(rng, name, CLIP_FRAMES)), ())

                row = unique.draw(f"ucf101/{split}/{name}", clip, make)
                stem = f"v_{name}_g{group:02d}_c{clip % 4 + 1:02d}"
                yield f"UCF101_subset/{split}/{name}/{stem}.avi", avi_bytes(list(row.pictures))


def _write_archive(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
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
    return path


def resolve_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """SIZES updated by the given ones. Raises ValueError: an unknown name, or a number below 1."""
    for name, number in sizes.items():
        if name not in SIZES:
            raise ValueError(f"sizes: {name!r} is unknown; expected one of {', '.join(SIZES)}")
        if number < 1:
            raise ValueError(f"sizes: {name} is {number}; expected at least 1")
    return {**SIZES, **sizes}


def make_sources(folder: str | Path, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[Path]:
    """Write the module's source files below `folder` and return them in the order in which they were written.

    sizes: rows by the names of `SIZES`; names left out keep their default. Raises ValueError as resolve_sizes does.
    """
    folder = Path(folder)
    number = resolve_sizes(sizes or {})
    unique = _Unique(seed)
    cauldron_schema, mini_schema = _schemas()

    def cauldron(name: str, make: Callable[[Random], tasks.TaskRow], encode: Encoder = png_bytes) -> Path:
        rows = range(number["docvqa_train" if name == "docvqa" else name])
        drawn = (_cauldron_row(unique.draw(name, index, make), name, encode) for index in rows)
        return _write_parquet(folder / "the_cauldron" / name / SHARD.format("train"), drawn, cauldron_schema)

    def mini(split: str, rows: int) -> Path:
        drawn = (_mini_row(unique.draw(split, index, tasks.slip_row), f"{split}_{index}") for index in range(rows))
        return _write_parquet(folder / "docvqa_1200_examples/data" / SHARD.format(split), drawn, mini_schema)

    def mixture(split: str) -> Path:
        makers = tasks.MIXTURE
        name = f"mixture_{split}"
        drawn = (
            _cauldron_row(unique.draw(name, index, makers[index % len(makers)]), "mixture", png_bytes)
            for index in range(number[name])
        )
        return _write_parquet(folder / "mixture" / SHARD.format(split), drawn, cauldron_schema)

    clips = {split: number[f"ucf101_{split}"] for split in ("train", "val", "test")}
    return [
        cauldron("docvqa", tasks.docvqa_row),
        cauldron("hateful_memes", tasks.hateful_memes_row),
        cauldron("nlvr2", tasks.nlvr2_row, jpeg_bytes),
        mini("train", number["docvqa_mini_train"]),
        mini("test", number["docvqa_test"]),
        _write_archive(folder / "ucf101-subset" / "UCF101_subset.tar.gz", _clips(unique, clips)),
        mixture("train"),
        mixture("val"),
    ]


def write_digits(folder: str | Path, seed: int = 0, held_out: int = HELD_OUT) -> list[Path]:
    """Write the scans as PNG files and both tables; returns the tables.

    held_out: scans of `val`, drawn by `seed` with the same share of each digit; the others go to `train`. Raises
    ValueError if a split would be empty.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    if not 10 <= held_out <= len(scans.target) - 10:
        raise ValueError(
            f"held_out: got {held_out}; expected 10 to {len(scans.target) - 10} of {len(scans.target)} scans"
        )
    order = list(range(len(scans.target)))
    Random(f"{seed}/digits").shuffle(order)
    # Every digit's share is the same in both splits: take each digit's scans in turn.
    by_digit = [[index for index in order if scans.target[index] == digit] for digit in range(10)]
    share = held_out / len(order)
    val = {index for indices in by_digit for index in indices[: round(share * len(indices))]}
    folder = Path(folder)
    tables = []
    for split in ("train", "val"):
        rows = []
        for index in sorted(val if split == "val" else set(order) - val):
            name = f"{split}/{scans.target[index]}/{index:04d}.png"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Ink is 0 … 16 in the data set; dark ink on light paper, as it was written.
            grey = (255 - scans.images[index] * 255 / 16).round().astype("uint8")
            path.write_bytes(png_bytes(Image.fromarray(grey)))
            rows.append((name, DIGIT_QUESTION, str(scans.target[index])))
        table = folder / f"{split}.tsv"
        with open(table, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(("image", "question", "answer"))
            writer.writerows(rows)
        tables.append(table)
    return tables
