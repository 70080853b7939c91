"""Measure the data room on this machine: rates per second of processor time (and of the clock), and peak memory.

    python tests/measure_data.py validate 200000      # lines/s of scripts/validate.py's levels "shape" and "paths"
    python tests/measure_data.py convert 10000 22     # rows of parquet with pictures of so many kB
    python tests/measure_data.py load 1000000         # start-up and memory of ConversationDataset
    python tests/measure_data.py clips 40             # UCF-101-like clips/s beside decoding alone

Processor time is what a core needs; on a machine that does nothing else it is close to the clock's.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from data_examples import picture_bytes, write_clip

from phi3v.data.conversations import Conversation, Turn, write_conversations


def memory() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def measured(what: str, count: int) -> Iterator[None]:
    clock, processor = time.perf_counter(), time.process_time()
    yield
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(
        f"{what}: {count / processor:,.0f}/s of a core, {count / clock:,.0f}/s by the clock, "
        f"{processor:.2f} s of a core in all, peak {memory():.0f} MiB",
        flush=True,
    )


def line(number: int) -> Conversation:
    image = f"train/{number // 1000:05d}/{number:08d}-0.jpg"
    turn = Turn((image,), "What is the total amount on the invoice?\nAnswer briefly.", f"${number}.00")
    return Conversation(f"docvqa-train-{number:08d}", "docvqa", (turn,))


def validate(folder: Path, lines: int) -> None:
    from phi3v.data.validation import validate_folder

    write_conversations(folder / "train.jsonl", (line(number) for number in range(lines)))
    for start in range(0, lines, 1000):
        (folder / f"images/train/{start // 1000:05d}").mkdir(parents=True)
        for number in range(start, min(start + 1000, lines)):
            (folder / f"images/train/{start // 1000:05d}/{number:08d}-0.jpg").touch()
    for level in ("shape", "paths"):
        with measured(f"validate --level {level}, lines", lines):
            assert validate_folder(folder, level)[1].total == 0  # type: ignore[arg-type]


def convert(folder: Path, rows: int, kilobytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    from phi3v.data.conversion import convert_files

    side = int((kilobytes * 900) ** 0.5)
    pictures = [picture_bytes(seed, "JPEG", (side, side)) for seed in range(20)]
    text = [{"user": "Question?", "assistant": "Yes.", "source": "x"}] * 2
    source = folder / "a.parquet"
    writer = None
    for start in range(0, rows, 500):
        numbers = range(start, min(start + 500, rows))
        part = [{"images": [{"bytes": pictures[k % 20], "path": ""}], "texts": text} for k in numbers]
        table = pyarrow.Table.from_pylist(part)
        writer = writer or pyarrow.parquet.ParquetWriter(source, table.schema, compression="none")
        writer.write_table(table)
    assert writer is not None
    writer.close()
    mean = sum(map(len, pictures)) / 20000
    with measured(f"copy pictures of {mean:.1f} kB to files (the floor), pictures", min(rows, 5000)):
        for number in range(min(rows, 5000)):
            with open(folder / f"{number}.jpg", "xb") as file:
                file.write(pictures[number % 20])
    with measured(f"convert {rows} parquet rows with pictures of {mean:.1f} kB, rows", rows):
        convert_files("cauldron", source, folder / "out", "train")


def load(folder: Path, lines: int) -> None:
    from phi3v.data.loading import ConversationDataset

    write_conversations(folder / "train.jsonl", (line(number) for number in range(lines)))
    processor = SimpleNamespace(image_processor=SimpleNamespace(num_crops=4), tokenizer=None)
    before = memory()
    with measured(f"start on {lines} examples, examples", lines):
        dataset = ConversationDataset(folder, "train", processor)
    print(f"memory: {before:.0f} MiB before (imports), {memory():.0f} MiB after")
    with measured("read and check a record, records", 20_000):
        for number in range(20_000):
            dataset.selected(number * 7919 % lines)


def clips(folder: Path, count: int) -> None:
    import av

    from phi3v.data.conversion import convert_files

    for number in range(count):
        write_clip(folder / f"clips/train/Archery/v_{number:03d}.avi", 180, codec="mpeg4", size=(320, 240))
    paths = sorted((folder / "clips").rglob("*.avi"))
    with measured("decode clips of 180 frames of 320 x 240 with PyAV alone, clips", count):
        for path in paths:
            with av.open(str(path)) as container:
                container.streams.video[0].thread_count = 1
                for _ in container.decode(video=0):
                    pass
    with measured("convert the clips, clips", count):
        convert_files("ucf101", folder / "clips", folder / "out", "train", workers=2)


def main() -> None:
    actions = {"validate": validate, "convert": convert, "load": load, "clips": clips}
    if len(sys.argv) < 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        actions[sys.argv[1]](Path(folder), *map(int, sys.argv[2:]))


if __name__ == "__main__":
    main()
