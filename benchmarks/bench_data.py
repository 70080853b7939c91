"""Measure the data room on this machine: rates by the clock and per second of processor time, and peak memory.

    python benchmarks/bench_data.py validate 200000        # lines/s of scripts/validate.py's levels "shape" and "paths"
    python benchmarks/bench_data.py decode 2000            # pictures/s of level "images", pages of 1700 x 2200
    python benchmarks/bench_data.py convert 10000 14       # parquet rows with JPEG pictures of so many kB
    python benchmarks/bench_data.py convert 1000 600 PNG   # the same with PNG pictures
    python benchmarks/bench_data.py table 100000           # rows of a table; llava: of a json; folder: files of classes
    python benchmarks/bench_data.py read 200000            # rows of csv and jsonl: our readers, and `datasets` streaming
    python benchmarks/bench_data.py load 1000000           # start-up and memory of ConversationDataset
    python benchmarks/bench_data.py lengths 100000         # lengths(): first time, on one core and on all, and again
    python benchmarks/bench_data.py clips 100              # UCF-101-like clips/s beside decoding alone
    python benchmarks/bench_data.py padding DATA_DIR MODEL_DIR   # share of padding of a data folder, by kind of batch

Run it with nothing else on the machine; files go to TMPDIR.
"""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from phi3v.data.conversations import Conversation, Turn, format_line

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def memory() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def measured(what: str, count: int) -> Iterator[None]:
    clock, processor = time.perf_counter(), sum(os.times()[:4])
    yield
    clock, processor = time.perf_counter() - clock, sum(os.times()[:4]) - processor
    print(
        f"{what}: {count / max(processor, 0.01):,.0f}/s of a core, {count / clock:,.0f}/s by the clock, "
        f"{processor:.2f} s of a core in all, peak {memory():.0f} MiB",
        flush=True,
    )


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """A jsonl of the examples."""
    with open(path, "wb") as file:
        file.writelines(map(format_line, conversations))


def line(number: int) -> Conversation:
    image = f"train/{number // 1000:05d}/{number:08d}-0.jpg"
    turn = Turn((image,), "What is the total amount on the invoice?\nAnswer briefly.", f"${number}.00")
    return Conversation(f"docvqa-train-{number:08d}", "docvqa", (turn,))


def validate(folder: Path, lines: int) -> None:
    from phi3v.data.check import validate_folder

    write_conversations(folder / "train.jsonl", (line(number) for number in range(lines)))
    for start in range(0, lines, 1000):
        (folder / f"images/train/{start // 1000:05d}").mkdir(parents=True)
        for number in range(start, min(start + 1000, lines)):
            (folder / f"images/train/{start // 1000:05d}/{number:08d}-0.jpg").touch()
    for level in ("shape", "paths"):
        with measured(f"validate --level {level}, lines", lines):
            assert validate_folder(folder, level)[1].total == 0  # type: ignore[arg-type]


def decode(folder: Path, pages: int) -> None:
    from phi3v.data.check import validate_folder

    page = noisy_page()
    (folder / "images/train/00000").mkdir(parents=True)
    write_conversations(
        folder / "train.jsonl",
        (Conversation(f"d-{k}", "d", (Turn((f"train/00000/{k}.png",), "Q?", "A"),)) for k in range(pages)),
    )
    for number in range(pages):
        (folder / f"images/train/00000/{number}.png").write_bytes(page)
    for workers in (1, os.cpu_count() or 1):
        with measured(f"validate --level images with {workers} processes, pages of {len(page) / 1000:.0f} kB", pages):
            validate_folder(folder, workers=workers)


def noisy_page() -> bytes:
    """A PNG of 1700 x 2200 in grey with about as many bytes as a scanned page."""
    import numpy as np

    rng = np.random.default_rng(0)
    page = np.full((2200, 1700), 255, np.uint8)
    ink = rng.random((2200, 1700)) < 0.07
    page[ink] = rng.integers(0, 256, int(ink.sum()), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "PNG")
    return buffer.getvalue()


def convert(folder: Path, rows: int, kilobytes: int, kind: str = "JPEG") -> None:
    import pyarrow
    import pyarrow.parquet
    from data_examples import picture_bytes

    from phi3v.data.convert import convert_files

    side = int((kilobytes * (900 if kind == "JPEG" else 333)) ** 0.5)
    pictures = [picture_bytes(seed, kind, (side, side)) for seed in range(20)]
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
    (folder / "floor").mkdir()
    with measured(f"floor: bytes of {mean:.1f} kB in memory to files, pictures", rows):
        for number in range(rows):
            with open(folder / f"floor/{number}.jpg", "xb") as file:
                file.write(pictures[number % 20])
    shutil.rmtree(folder / "floor")
    (folder / "floor").mkdir()
    with measured("floor: pictures out of the parquet file to files, nothing checked, pictures", rows):
        number = 0
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(32, columns=["images"], use_threads=False):
            for row in batch.to_pylist():
                with open(folder / f"floor/{number}.jpg", "xb") as file:
                    file.write(row["images"][0]["bytes"])
                number += 1
    shutil.rmtree(folder / "floor")
    with measured(f"convert {rows} parquet rows with {kind} pictures of {mean:.1f} kB, rows", rows):
        convert_files("cauldron", source, folder / "out", "train")


def table(folder: Path, rows: int) -> None:
    from phi3v.data.convert import convert_files

    make_pictures(folder)
    with open(folder / "my.tsv", "w") as file:
        file.write("image\tquestion\tanswer\n")
        file.writelines(f"p/{number % 1000}.jpg\tWhich number is {number}?\t{number}\n" for number in range(rows))
    with measured(f"convert {rows} rows of a table, rows", rows):
        convert_files("table", folder / "my.tsv", folder / "out", "train")


def read(folder: Path, rows: int) -> None:
    """Each reader in a process of its own, for its memory."""
    texts = [f"p/{n % 1000}.jpg|Which number, in words, is {n}?|{n:07d}|2020-01-{1 + n % 28:02d}" for n in range(rows)]
    names = ("image", "question", "answer", "day")
    with open(folder / "my.csv", "w", newline="") as table, open(folder / "my.jsonl", "w") as lines:
        writer = csv.writer(table)
        writer.writerow(names)
        for text in texts:
            writer.writerow(text.split("|"))
            lines.write(json.dumps(dict(zip(names, text.split("|"), strict=True))) + "\n")
    for kind in ("csv", "jsonl"):
        for reader in ("own", "datasets", "datasets texts"):
            code = f"import bench_data; bench_data.read_one('{folder}/my.{kind}', '{reader}', {rows})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def read_one(path: str, reader: str, rows: int) -> None:
    """All rows of a file; checks that the texts come out as they were written."""
    with measured(f"{Path(path).suffix} by {reader}, start included, rows", rows):
        found: Iterable[dict[str, object]]
        if reader == "own":
            from phi3v.data.rows import Inputs, read_rows

            found = (row for _, _, row in read_rows(Inputs([Path(path)], Path(path).parent, "train", "x")))  # type: ignore[misc]
        else:
            from datasets import Features, Value, load_dataset

            # Without the columns' types, given before, texts become numbers and dates.
            texts = Features(dict.fromkeys(("image", "question", "answer", "day"), Value("string")))
            kind = "csv" if path.endswith("csv") else "json"
            given = texts if reader.endswith("texts") else None
            found = load_dataset(kind, data_files=path, split="train", streaming=True, features=given)
        count = wrong = 0
        for row in found:
            wrong += row["answer"] != f"{count:07d}" or row["day"] != f"2020-01-{1 + count % 28:02d}"
            count += 1
    assert count == rows
    print(f"  rows with another text than written: {wrong}", flush=True)


def llava(folder: Path, rows: int) -> None:
    from phi3v.data.convert import convert_files

    make_pictures(folder)
    with open(folder / "my.json", "w") as file:
        for number in range(rows):
            talk = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": str(number)}]
            item = {"id": str(number), "image": f"p/{number % 1000}.jpg", "conversations": talk}
            file.write(("[" if not number else ",\n") + json.dumps(item))
        file.write("]")
    with measured(f"convert {rows} items of a LLaVA json, rows", rows):
        convert_files("llava", folder / "my.json", folder / "out", "train")


def class_folder(folder: Path, rows: int) -> None:
    from phi3v.data.convert import convert_files

    make_pictures(folder)
    for number in range(rows):
        path = folder / f"classes/c{number % 100}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f"p/{number % 1000}.jpg", path)
    with measured(f"convert {rows} files of classes, rows", rows):
        convert_files("image_folder", folder / "classes", folder / "out", "train")


def make_pictures(folder: Path) -> None:
    """A thousand small pictures."""
    from data_examples import picture_bytes

    (folder / "p").mkdir()
    for number in range(1000):
        (folder / f"p/{number}.jpg").write_bytes(picture_bytes(number % 20))


def load(folder: Path, lines: int) -> None:
    from phi3v.data.dataset import ConversationDataset

    write_conversations(folder / "train.jsonl", (line(number) for number in range(lines)))
    processor = SimpleNamespace(image_processor=SimpleNamespace(num_crops=4), tokenizer=None)
    before = memory()
    with measured(f"start on {lines} examples, examples", lines):
        dataset = ConversationDataset(folder, "train", processor)
    print(f"memory: {before:.0f} MiB before (imports), {memory():.0f} MiB after")
    with measured("read and check a record, records", 20_000):
        for number in range(20_000):
            dataset.selected(number * 7919 % lines)


def count_lengths(folder: Path, rows: int) -> None:
    from phi3v.data.dataset import ConversationDataset
    from phi3v.data.lengths import count, lengths
    from phi3v.demo.tiny import train_tokenizer
    from phi3v.model.image_processing import Phi3VImageProcessor
    from phi3v.model.processing import Phi3VProcessor

    (folder / "images/p").mkdir(parents=True)
    page = noisy_page()
    for number in range(1000):
        (folder / f"images/p/{number}.png").write_bytes(page)
    words = "What is the total amount on the invoice? Answer briefly."
    tokenizer = train_tokenizer([f"{words} ${number}.00" for number in range(3000)], 1000)
    (folder / "dataset.json").write_text(
        json.dumps({"source": {}, "num_crops": 16, "splits": {"train": {"file": "train.jsonl"}}})
    )
    turns = (Turn((f"p/{number % 1000}.png",), f"{number}: {words}", f"${number}.00") for number in range(rows))
    write_conversations(
        folder / "train.jsonl", (Conversation(f"d-{number}", "d", (turn,)) for number, turn in enumerate(turns))
    )
    dataset = ConversationDataset(folder, "train", Phi3VProcessor(Phi3VImageProcessor(), tokenizer))
    with measured("lengths on one core, examples", rows):
        count(dataset)
    with measured(f"lengths on {os.cpu_count()} cores, examples", rows):
        first = lengths(dataset)
    with measured("lengths again, examples", rows):
        assert lengths(dataset) == first


def padding_share(token_lengths: list[int], batches: list[list[int]]) -> float:
    """Share of padding in right-padded batches of examples (indices into token_lengths)."""
    real = sum(token_lengths[index] for batch in batches for index in batch)
    padded = sum(len(batch) * max(token_lengths[index] for index in batch) for batch in batches if batch)
    return 1 - real / padded


def padding(folder: Path, data_dir: str, model_dir: str) -> None:
    from phi3v.data.dataset import ConversationDataset
    from phi3v.data.lengths import lengths
    from phi3v.model.processing import Phi3VProcessor
    from phi3v.training.batches import BatchPlan

    dataset = ConversationDataset(data_dir, "train", Phi3VProcessor.from_pretrained(model_dir))
    tokens = lengths(dataset)
    print(f"{data_dir}: {len(tokens)} examples of {min(tokens)} to {max(tokens)} tokens")
    plan = {
        "examples": len(tokens),
        "batch_size": 64,
        "micro_batch_size": 8,
        "processes": 2,
        "seed": 42,
        "lengths": tokens,
    }
    for grouping in ("fixed", "length"):
        batches = [
            [pick.index for pick in micro]
            for rank in (0, 1)
            for micro in BatchPlan(**plan, grouping=grouping).epoch(0, rank)  # type: ignore[arg-type]
        ]
        print(f"{grouping}: {padding_share(tokens, batches):.2%} padding in micro-batches of 8")
    budget = 8 * max(tokens)
    packed = BatchPlan(**plan, grouping="packed", max_tokens=budget)  # type: ignore[arg-type]
    packs = [micro for rank in (0, 1) for micro in packed.epoch(0, rank)]
    full = sum(tokens) / (budget * len(packs))
    print(f"packed: no padding; {len(packs)} packs are {full:.1%} full of {budget} tokens")


def moving_clip(path: Path, frames: int) -> None:
    """A clip of 320 x 240 at 25 frames a second, as MPEG-4 of about 300 kB for 7 s: UCF-101's kind."""
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    small = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(small).resize((960, 640), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 400_000
        for k in range(frames):
            left, top = 3 * k % 600, 2 * k % 390
            view = np.ascontiguousarray(scene[top : top + 240, left : left + 320])
            for packet in stream.encode(av.VideoFrame.from_ndarray(view)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def clips(folder: Path, count: int) -> None:
    import av

    from phi3v.data.convert import convert_files

    for number in range(8):
        moving_clip(folder / f"eight/{number}.avi", 180)
    for number in range(count):
        path = folder / f"clips/train/Archery/v_{number:03d}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"eight/{number % 8}.avi", path)
    paths = sorted((folder / "clips").rglob("*.avi"))
    print(f"clips of 180 frames of 320 x 240, {paths[0].stat().st_size / 1000:.0f} kB")

    def all_frames(path: Path) -> None:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            for _ in container.decode(video=0):
                pass

    with measured("decode with PyAV alone, one thread, clips", count):
        for path in paths:
            all_frames(path)
    with measured("decode with PyAV alone, two threads, clips", count), ThreadPoolExecutor(2) as pool:
        list(pool.map(all_frames, paths))
    for workers in (1, 2):
        with measured(f"convert the clips, --workers {workers}, clips", count):
            convert_files("ucf101", folder / "clips", folder / f"out{workers}", "train", workers=workers)


def main() -> None:
    actions = {
        "validate": validate, "decode": decode, "convert": convert, "table": table, "read": read, "llava": llava,
        "folder": class_folder, "load": load, "lengths": count_lengths, "clips": clips, "padding": padding,
    }  # fmt: skip
    if len(sys.argv) < 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        given = [int(value) if value.isdigit() else value for value in sys.argv[2:]]
        actions[sys.argv[1]](Path(folder), *given)  # type: ignore[operator]


if __name__ == "__main__":
    main()
