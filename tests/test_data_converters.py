"""Every converter, from a small source in its real format to a data folder; and what they refuse."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from data_examples import cauldron_rows, picture_bytes, ucf_archive, write_clip, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v.data import convert, recipe
from phi3v.data.conversations import Conversation, DataError, read_conversations
from phi3v.data.convert import convert_dataset, convert_files, row_slice
from phi3v.data.fetch import fetch
from phi3v.data.formats import FORMATS
from phi3v.data.pictures import frame_indices, sample_frames
from phi3v.data.rows import Inputs, Rejection, Sample, json_rows
from phi3v.settings import Dataset, SettingsError, dataset_key, validate

ROOT = Path(__file__).parents[1]
FIELDS = (
    "image", "images", "video", "conversations", "messages", "from", "role", "value", "content", "identifier", "sentence",
    "label", "img", "id", "questionId", "question", "answers", "data",
)  # fmt: skip
"""What the json formats name."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def converted(
    folder: Path, format_name: str, source: Path, split: str = "train", **options: object
) -> list[Conversation]:
    result = convert_files(format_name, source, folder, split, name="demo", **options)  # type: ignore[arg-type]
    return list(read_conversations(folder / result["splits"][split]["file"]))


def test_cauldron_rows_become_turns_and_keep_their_bytes(tmp_path: Path) -> None:
    rows = cauldron_rows(4, pictures=2, turns=2)
    rows[1]["texts"][0]["user"] = "<image><image>\nIs it so?"
    rows[2]["texts"][0]["user"] = "And so? <image>"
    source = write_parquet(tmp_path / "a.parquet", rows)
    examples = converted(tmp_path / "out", "cauldron", source)
    assert [example.id for example in examples] == [f"demo-train-{row:08d}" for row in range(4)]
    assert [turn.user for turn in examples[0].turns] == ["Question 0.0?", "Question 0.1?"]
    assert examples[0].turns[0].images == ("train/00000/00000000-0.jpg", "train/00000/00000000-1.jpg")
    assert examples[0].turns[1].images == ()
    assert examples[0].turns[1].assistant == "Answer 0.1"
    assert examples[1].turns[0].user == "Is it so?"
    assert examples[2].turns[0].user == "And so?"
    for row, example in zip(rows, examples, strict=True):
        for name, image in zip(example.images, row["images"], strict=True):
            assert (tmp_path / "out" / "images" / name).read_bytes() == image["bytes"]


def test_other_formats_become_png(tmp_path: Path) -> None:
    rows = cauldron_rows(1)
    rows[0]["images"][0]["bytes"] = picture_bytes(1, "BMP")
    example = converted(tmp_path / "out", "cauldron", write_parquet(tmp_path / "a.parquet", rows))[0]
    image = Image.open(tmp_path / "out" / "images" / example.images[0])
    assert image.format == "PNG"
    assert example.images[0].endswith(".png")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(picture_bytes(1, "BMP")))))


def test_mini_docvqa_keeps_all_answers_once(tmp_path: Path) -> None:
    row = {
        "id": "1",
        "image": {"bytes": picture_bytes(1), "path": None},
        "query": {"en": "Total?", "de": "Summe?"},
        "answers": ["$1", "1", "$1"],
    }
    example = converted(tmp_path / "out", "docvqa_mini", write_parquet(tmp_path / "a.parquet", [row]))[0]
    assert example.turns[0].user == "Total?\nAnswer briefly."
    assert example.turns[0].assistant == "$1"
    assert example.turns[0].accepted == ("$1", "1")


def test_rows_are_a_python_slice_and_shards_follow_each_other(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = cauldron_rows(10)
    write_parquet(source / "a.parquet", rows[:6])
    write_parquet(source / "b.parquet", rows[6:])
    assert [row_slice(rows) for rows in (":", "500:", "0:500")] == [slice(0, None), slice(500, None), slice(0, 500)]
    tail = converted(tmp_path / "tail", "cauldron", source, rows="4:8")
    assert [example.turns[0].user for example in tail] == [f"Question {row}.0?" for row in (4, 5, 6, 7)]


def test_ucf101_follows_the_recipe(tmp_path: Path) -> None:
    archive = ucf_archive(tmp_path, {"train": 3, "val": 2, "test": 1})
    examples = converted(tmp_path / "out", "ucf101", archive, "val")
    assert (tmp_path / "out" / "ucf101_val.jsonl").exists()
    # Ids count on: 3 clips x 2 classes of train come first.
    assert [example.id for example in examples] == [f"val-{number:010d}" for number in (6, 7, 8, 9)]
    assert examples[2].turns[0].user == "Classify the video into one of the following classes: Archery, BabyCrawling."
    assert examples[2].turns[0].assistant == "BabyCrawling"
    assert examples[2].images == tuple(f"val/BabyCrawling/v_BabyCrawling_g00_c01.{k}.jpg" for k in range(8))
    clip = tmp_path / "UCF101_subset/val/BabyCrawling/v_BabyCrawling_g00_c01.avi"
    levels = [np.asarray(Image.open(tmp_path / "out" / "images" / name)).mean() for name in examples[2].images]
    assert levels == pytest.approx([20 + 8 * k for k in (0, 2, 5, 7, 10, 12, 15, 17)], abs=5)
    assert [np.asarray(Image.open(io.BytesIO(data))).mean() for data in sample_frames(clip)] == levels


def test_frames_are_the_recipes_arange() -> None:
    for total in range(8, 400):
        assert frame_indices(total, 8) == [int(index) for index in np.arange(0, total, total / 8)][:8]
        assert len(frame_indices(total, 8)) == 8


def test_a_header_that_lies_about_its_frames_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "a.mkv", 20)  # Matroska's header counts no frames
    assert len(sample_frames(clip)) == 8
    assert sample_frames(clip) == sample_frames(write_clip(tmp_path / "a.avi", 20))


def picture_folder(folder: Path) -> Path:
    for number, name in enumerate(["train/cat/1.jpg", "train/cat/2.webp", "train/dog/1.jpg", "val/cat/9.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix]
        path.write_bytes(picture_bytes(number, kind))
    return folder


def test_a_folder_of_classes(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    before = tree(folder)
    out = tmp_path / "out"
    train = converted(out, "image_folder", folder, "train")
    val = converted(out, "image_folder", folder, "val", options={"prompt": "Which of {classes}?"})
    assert [(example.images[0], example.turns[0].assistant) for example in train] == [
        ("train/cat/1.jpg", "cat"), ("train/cat/2.webp.png", "cat"), ("train/dog/1.jpg", "dog"),
    ]  # fmt: skip
    assert train[0].turns[0].user == "Classify the image into one of the following classes: cat, dog."
    assert val[0].turns[0].user == "Which of cat, dog?"
    description = json.loads((out / "dataset.json").read_text())
    assert {split: entry["examples"] for split, entry in description["splits"].items()} == {"train": 3, "val": 1}
    assert tree(folder) == before


def test_a_name_that_becomes_too_long_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pets" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(picture_bytes(1))
    (folder / f"{'x' * 250}.gif").write_bytes(picture_bytes(2, "GIF"))  # .png comes behind it
    with pytest.raises(DataError, match=r"picture name 'train/cat/x+\.\.\.; expected at most 255 bytes"):
        converted(tmp_path / "out", "image_folder", tmp_path / "pets")
    assert len(converted(tmp_path / "out", "image_folder", tmp_path / "pets", on_error="skip")) == 1


def test_a_table(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    table = tmp_path / "my.tsv"
    table.write_text(
        "image\tquestion\tanswer\tanswers\n"
        "train/cat/1.jpg\tWhat is it?\ta cat\tcat|kitten\n"
        "train/cat/1.jpg; val/cat/9.png\tBoth cats?\tyes\t\n"
        "\tTwo and two?\t4\t\n",
        encoding="utf-8-sig",
    )
    one, two, three = converted(
        tmp_path / "out", "table", table, images_dir=folder, options={"prompt_suffix": "\nBriefly."}
    )
    assert one.turns[0].user == "What is it?\nBriefly."
    assert one.turns[0].accepted == ("a cat", "cat", "kitten")
    assert two.images == ("train/train/cat/1.jpg", "train/val/cat/9.png")
    assert three.images == ()
    assert len(tree(tmp_path / "out" / "images")) == 2  # the same picture is stored once
    csv = tmp_path / "my.csv"
    csv.write_text('question,answer,image\n"What, exactly?","a ""cat""",train/cat/1.jpg\n')
    assert converted(tmp_path / "csv", "table", csv, images_dir=folder)[0].turns[0].user == "What, exactly?"
    csv.write_text("image,question,answer,,\ntrain/cat/1.jpg,first?,yes,,\n\n,third?,no,,\n")  # as spreadsheets write
    first, third = converted(tmp_path / "spreadsheet", "table", csv, images_dir=folder)
    assert (first.id[-1], third.id[-1]) == ("0", "2")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("../secret.jpg\tq\ta", "row-less: field `image`: got '../secret.jpg'; expected a path inside"),
        ("/etc/passwd\tq\ta", "expected a relative path"),
        ("out/x.jpg\tq\ta", "a link to a file outside"),
        ("none.jpg\tq\ta", "no such file"),
        ("train/cat/1.jpg\tq\t", "field `answer`: got ''; expected some text"),
        ("train/cat/1.jpg\tq", "2 fields with delimiter '\\t'; expected 3"),
        ("my.tsv\tq\ta", "not a readable picture"),
    ],
)
def test_a_row_of_a_table_that_cannot_be_taken(tmp_path: Path, row: str, expected: str) -> None:
    folder = picture_folder(tmp_path / "pets")
    (tmp_path / "secret.jpg").write_bytes(picture_bytes(9))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jpg").write_bytes(picture_bytes(9))
    (folder / "out").symlink_to(tmp_path / "outside")
    table = folder / "my.tsv"
    table.write_text(f"image\tquestion\tanswer\ntrain/cat/1.jpg\tfine?\tyes\n{row}\n")
    with pytest.raises(DataError) as error:
        converted(tmp_path / "out", "table", table)
    assert "my.tsv:3" in str(error.value)
    assert expected.removeprefix("row-less: ") in str(error.value)
    assert not tree(tmp_path / "out")
    result = convert_files("table", table, tmp_path / "out", "train", on_error="skip")
    assert result["rejected"] == 1
    assert result["splits"]["train"]["examples"] == 1
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 1
    assert rejected[0]["where"] == "my.tsv:3"
    assert expected.removeprefix("row-less: ") in rejected[0]["reason"]


def message(kind: str, text: str) -> dict:
    return {"from": kind, "value": text}


def llava_items(folder: Path) -> list[dict]:
    cat, dog = "train/cat/1.jpg", "train/dog/1.jpg"
    several = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>First?"},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "Is <image> one\0 too?\0"},
        {"role": "assistant", "content": "no"},
    ]
    return [
        {"id": "1", "image": cat, "conversations": [message("human", "<image>\nWhat?"), message("gpt", "A cat.")]},
        {"images": [cat, dog], "messages": several},
        {"video": "clip.avi", "conversations": [message("human", "<video>\nWhat happens?"), message("gpt", "Grey.")]},
        {"conversations": [message("human", "Two and two?"), message("gpt", "4")]},
    ]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_llava(tmp_path: Path, kind: str) -> None:
    folder = picture_folder(tmp_path / "pets")
    write_clip(folder / "clip.avi", 16)
    items = llava_items(folder)
    path = folder / f"data.{kind}"
    path.write_text(json.dumps(items, indent=1) if kind == "json" else "\n".join(map(json.dumps, items)))
    one, two, three, four = converted(tmp_path / "out", "llava", path)
    assert one.turns[0].user == "What?"
    assert one.images == ("train/train/cat/1.jpg",)
    assert (two.turns[0].system, two.turns[0].user, two.turns[1].system) == ("Be brief.", "First?", "")
    assert two.turns[0].images == ("train/train/cat/1.jpg",)
    assert two.turns[1].user == "Is image 2 one\0 too?\0"  # other characters stay as they are
    assert two.turns[1].images == ("train/train/dog/1.jpg",)
    assert len(three.images) == 8
    assert three.turns[0].user == "What happens?"
    assert four.images == ()
    assert four.turns[0].assistant == "4"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"conversations": []}, "field `conversations`: got []"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "expected user and assistant messages in turn"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "expected an answer to every question"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "expected human, gpt or system"),
        (
            {"conversations": [{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "y"}]},
            "2 <image> marks",
        ),
        ({"image": "../x.jpg"}, "expected a path inside the images folder"),
        ({"image": 7}, "expected a string"),
        ({"image": "\ud800.png"}, "expected no lone surrogates"),
        ({"image": "a" * 300}, "File name too long; expected a file in"),
        ({"video": "broken.avi"}, "cannot be decoded"),
    ],
)
def test_llava_items_that_cannot_be_taken(tmp_path: Path, change: dict, expected: str) -> None:
    folder = picture_folder(tmp_path / "pets")
    (folder / "broken.avi").write_bytes(b"RIFF" + bytes(500))
    path = folder / "data.json"
    path.write_text(json.dumps([llava_items(folder)[0] | change]))
    with pytest.raises(DataError, match=r"data\.json: item 0") as error:
        converted(tmp_path / "out", "llava", path)
    assert expected in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["human", "gpt", "<image>", "a.png", "../a.png", "True", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "nlvr2_official", "hateful_memes_official", "docvqa_official"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(item=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_whatever_an_item_is_it_is_taken_or_refused(name: str, item: dict, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture_bytes(1, "PNG"))
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"data": [item]} if name == "docvqa_official" else [item]))
    inputs = Inputs([path], tmp_path, "train", "demo", scratch=tmp_path / "scratch")
    try:
        found = list(FORMATS[name](inputs))
    except DataError as error:
        assert "column" in str(error) or "expected a JSON object with" in str(error)  # noqa: PT017
    else:
        assert all(isinstance(sample, Sample | Rejection) for sample in found)


@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[1 2]", '[{"a": ]', "[1,]", '["\xff"]', "[" * 200_000])
def test_a_broken_json_list_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json: item \d+: "):
        list(json_rows(tmp_path / "a.json", count()))


def test_a_json_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    items = [{"id": number, "text": "ü" * (number % 50)} for number in range(60_000)] + [1.5, "x", None, 12345]
    (tmp_path / "a.json").write_text(json.dumps(items, ensure_ascii=False))
    assert [item for _, _, item in json_rows(tmp_path / "a.json", count())] == items
    (tmp_path / "b.json").write_text(" [ ] ")
    assert list(json_rows(tmp_path / "b.json", count())) == []


def test_official_files(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for name in ("dev-3-0-img0.png", "dev-3-0-img1.png", "img/42.png", "page.png"):
        (tmp_path / name).write_bytes(picture_bytes(1, "PNG"))
    (tmp_path / "dev.json").write_text('{"identifier": "dev-3-0-1", "sentence": "Two dogs.", "label": "False"}\n')
    pair = converted(tmp_path / "a", "nlvr2_official", tmp_path / "dev.json", "val")[0]
    assert pair.id == "dev-3-0-1"
    assert pair.images == ("val/dev-3-0-img0.png", "val/dev-3-0-img1.png")
    assert "Two dogs." in pair.turns[0].user
    assert pair.turns[0].assistant == "No"
    (tmp_path / "dev_seen.jsonl").write_text('{"id": 42, "img": "img/42.png", "label": 1, "text": "x"}\n')
    meme = converted(tmp_path / "b", "hateful_memes_official", tmp_path / "dev_seen.jsonl", "val")[0]
    assert meme.id == "meme-42"
    assert meme.turns[0].assistant == "Yes"
    (tmp_path / "val_v1.0.json").write_text(
        json.dumps({"data": [{"questionId": 7, "question": "Total?", "image": "page.png", "answers": ["$1", "1"]}]})
    )
    page = converted(tmp_path / "c", "docvqa_official", tmp_path / "val_v1.0.json", "val")[0]
    assert page.id == "docvqa-7"
    assert page.turns[0].accepted == ("$1", "1")
    assert page.turns[0].user.endswith("\nAnswer briefly.")
    (tmp_path / "dev.json").write_text('{"identifier": "dev-3-0-1", "sentence": "Two dogs.", "label": "maybe"}\n')
    with pytest.raises(DataError, match=r"dev\.json:1: field `label`: got 'maybe'; expected True or False"):
        converted(tmp_path / "d", "nlvr2_official", tmp_path / "dev.json", "val")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": None}, "field `images`: got None"),
        ({"images": []}, "field `images`: got []"),
        ({"images": [{"bytes": None, "path": "x"}]}, "field `images[0].bytes`: got None"),
        ({"images": [{"bytes": b"junk", "path": None}]}, "not a readable picture"),
        ({"images": [{"bytes": picture_bytes(1)[:-20], "path": None}]}, "truncated"),
        ({"texts": None}, "field `texts`: got None"),
        ({"texts": [{"user": None, "assistant": "x", "source": ""}]}, "field `texts[0].user`: got None"),
        ({"texts": [{"user": "q", "assistant": " ", "source": ""}]}, "field `texts[0].assistant`: got ' '"),
        ({"texts": [{"user": "q <|end|>", "assistant": "x", "source": ""}]}, "no control token"),
    ],
)
def test_a_cauldron_row_that_cannot_be_taken(tmp_path: Path, change: dict, expected: str) -> None:
    rows = cauldron_rows(3)
    rows[1] |= change
    source = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError) as error:
        converted(tmp_path / "out", "cauldron", source)
    assert "a.parquet: row 1" in str(error.value)
    assert expected in str(error.value)
    assert len(converted(tmp_path / "out", "cauldron", source, on_error="skip")) == 2


def test_parquet_that_is_none_or_lacks_columns(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        converted(tmp_path / "out", "cauldron", tmp_path / "bad.parquet")
    write_parquet(tmp_path / "other.parquet", [{"image": 1}])
    with pytest.raises(DataError, match=r"column `images`: missing; expected images, texts; got image"):
        converted(tmp_path / "out", "cauldron", tmp_path / "other.parquet")
    whole = write_parquet(tmp_path / "cut.parquet", cauldron_rows(5)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        converted(tmp_path / "out", "cauldron", tmp_path / "cut.parquet")


def hostile(kind: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(
        {"dots": "UCF/../../../evil.avi", "absolute": "/tmp/evil.avi"}.get(kind, "UCF/train/A/evil.avi")
    )
    types = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    member.type = types.get(kind, tarfile.REGTYPE)
    member.linkname = "/etc/passwd" if kind.endswith("link") else ""
    return member


@pytest.mark.parametrize("kind", ["dots", "absolute", "symlink", "hardlink", "device", "fifo"])
def test_a_hostile_archive_is_refused_and_touches_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    clip = write_clip(tmp_path / "clip.avi", 20)
    path = tmp_path / "a" / "bad.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(clip, "UCF/train/A/fine.avi")
        archive.addfile(hostile(kind), io.BytesIO(b""))
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"bad\.tar\.gz: got member .*evil"):
        converted(tmp_path / "a" / "out", "ucf101", path)
    assert tree(tmp_path) == before
    assert not Path("/tmp/evil.avi").exists()


def test_damaged_archives_and_clips(tmp_path: Path) -> None:
    archive = ucf_archive(tmp_path, {"train": 2})
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged tar archive"):
        converted(tmp_path / "out", "ucf101", tmp_path / "cut.tar.gz")
    with pytest.raises(DataError, match=r"no clips of split 'val', only splits \['train'\]"):
        converted(tmp_path / "out", "ucf101", archive, "val")
    folder = tmp_path / "clips" / "train" / "A"
    write_clip(folder / "short.avi", 5)
    write_clip(folder / "fine.avi", 9)
    (folder / "junk.avi").write_bytes(b"junk")
    (folder / "cut.avi").write_bytes((folder / "fine.avi").read_bytes()[:700])
    result = convert_files("ucf101", tmp_path / "clips", tmp_path / "out", "train", on_error="skip", name="x")
    assert result["splits"]["train"]["examples"] == 1
    reasons = {
        Path(item["where"]).name: item["reason"] for item in map(json.loads, (tmp_path / "out/rejected.jsonl").open())
    }
    assert reasons["short.avi"] == "got 5 frames; expected at least 8"
    assert "cannot be decoded" in reasons["junk.avi"]
    assert set(reasons) == {"short.avi", "junk.avi", "cut.avi"}


def test_a_clip_that_ends_its_decoder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = ucf_archive(tmp_path, {"train": 2})
    monkeypatch.setattr(recipe, "sample_frames", lambda *_: os._exit(7))
    # A fork inherits the function above.
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(recipe, "process_pool", lambda workers: ProcessPoolExecutor(workers, forked))
    with pytest.raises(DataError, match=r"a process crashed while decoding a clip"):
        converted(tmp_path / "out", "ucf101", archive, workers=2)
    assert not tree(tmp_path / "out")


def test_processes_end_with_a_killed_parent() -> None:
    code = (
        "import os, time\n"
        "from phi3v.data.processes import process_pool\n"
        "with process_pool(2) as pool:\n"
        "    print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().split()
        parent.kill()
        # The pipe ends only when nobody holds it any more.
        os.set_blocking(parent.stdout.fileno(), False)
        end = time.monotonic() + 20
        while parent.stdout.buffer.raw.read(1) is None:  # type: ignore[attr-defined]
            assert time.monotonic() < end, "a process outlived its parent"
            time.sleep(0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_clips_of_every_suffix_are_taken_and_other_files_named(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "clips/train/A"
    for name in ("a.avi", "b.m4v", "c.MP4", "d.ts", "e.3gp"):
        write_clip(folder / name.lower(), 9).rename(folder / name)
    (folder / "notes.txt").write_text("x")
    (folder / "._a.avi").write_bytes(b"Mac")
    source = tmp_path / "clips"
    if packed:
        source = tmp_path / "clips.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "clips", "clips")
    result = convert_files("ucf101", source, tmp_path / "out", "train", name="x")
    assert result["splits"]["train"]["examples"] == 5 and result["splits"]["train"]["untaken"] == 1
    (line,) = map(json.loads, (tmp_path / "out/rejected.jsonl").open())
    assert line["where"].endswith("train/A/notes.txt") and line["reason"].startswith(
        "not a clip; expected one of .avi, .mp4"
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_clips_come_out_the_same_however_many_are_decoded_at_a_time(tmp_path: Path, workers: int) -> None:
    archive = ucf_archive(tmp_path, {"train": 4, "val": 1})
    converted(tmp_path / "two", "ucf101", archive, workers=2)
    converted(tmp_path / "other", "ucf101", archive, workers=workers)
    assert tree(tmp_path / "other") == tree(tmp_path / "two")


def test_large_and_small_pictures_of_rows_keep_their_order_and_faults(tmp_path: Path) -> None:
    rows = cauldron_rows(12, pictures=2)
    for number, row in enumerate(rows):
        row["images"][number % 2]["bytes"] = picture_bytes(number, "PNG", (200, 150))
    rows[3]["images"][0]["bytes"] = rows[3]["images"][0]["bytes"][:99]
    large = rows[5]["images"][1]["bytes"]
    rows[5]["images"][1]["bytes"] = large[:-30]
    assert len(large) > convert.SMALL_BYTES
    source = write_parquet(tmp_path / "a.parquet", rows)
    for workers in (1, 4):
        examples = converted(tmp_path / str(workers), "cauldron", source, workers=workers, on_error="skip")
        assert [example.id for example in examples] == [
            f"demo-train-{row:08d}" for row in range(12) if row not in (3, 5)
        ]
        for example in examples:
            stored = [(tmp_path / str(workers) / "images" / name).read_bytes() for name in example.images]
            assert stored == [image["bytes"] for image in rows[int(example.id[-8:])]["images"]]
    assert tree(tmp_path / "1") == tree(tmp_path / "4")


DATASET = {
    "title": "T", "metric": "anls", "turns": "draw",
    "splits": {
        "train": {"url": "a.parquet", "format": "cauldron", "rows": "2:"},
        "val": {"url": "a.parquet", "format": "cauldron", "rows": "0:2", "options": {"turns": "first"}},
    },
}  # fmt: skip


def test_an_entry_from_fetch_to_folder_is_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", cauldron_rows(6))
    dataset = Dataset.model_validate(DATASET)
    fetch([(split.url, split.revision) for split in dataset.splits.values()], "out/source")
    convert_dataset("demo", dataset, "out/source", "out")
    first = tree(tmp_path / "out")
    description = json.loads(first["dataset.json"])
    assert description["turns"] == "draw"
    assert description["num_crops"] == 16
    assert {split: entry["examples"] for split, entry in description["splits"].items()} == {"train": 4, "val": 2}
    assert all(len(example.turns) == 1 for example in read_conversations("out/val.jsonl"))
    assert all(len(example.turns) == 2 for example in read_conversations("out/train.jsonl"))
    (tmp_path / "out" / "dataset.json").unlink()
    convert_dataset("demo", dataset, "out/source", "out")
    assert tree(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("change", "converts"),
    [
        ({"metrics": ["anls", "cer", "my.py:score"], "max_new_tokens": 9, "num_crops": 4, "title": "U"}, False),
        ({"group_by": "shop"}, True),
        ({"turns": "all"}, True),
        ({"on_error": "skip"}, True),
    ],
)
def test_what_evaluation_is_told_does_not_repeat_a_conversion(change: dict[str, object], converts: bool) -> None:
    plain, other = (Dataset.model_validate({**DATASET, **values}) for values in ({}, change))
    assert (plain.conversion_entry != other.conversion_entry) == converts


def test_what_an_entry_says_of_bad_rows_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = cauldron_rows(8, pictures=2)
    rows[4]["texts"] = None
    rows[6]["images"][1]["bytes"] = b"junk"
    write_parquet(tmp_path / "a.parquet", rows)
    plain = Dataset.model_validate(DATASET)
    fetch([(split.url, split.revision) for split in plain.splits.values()], "source")
    with pytest.raises(DataError, match="row 4"):
        convert_dataset("demo", plain, "source", "out")
    asked = Dataset.model_validate({**DATASET, "on_error": "skip"})
    assert dataset_key("demo", asked) != dataset_key("demo", plain)
    convert_dataset("demo", asked, "source", "out")
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["rejected"] == 2
    assert [description["splits"][split]["rejected"] for split in ("train", "val")] == [2, 0]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [item["where"] for item in rejected] == ["a.parquet: row 4", "a.parquet: row 6"]
    # The first picture of row 6 was fine; it goes with its row.
    assert description["splits"]["train"]["images"] == 8
    assert not list((tmp_path / "out" / "images").rglob("00000006*"))
    # The script does what the entry says, and the command line has the last word.
    (tmp_path / "datasets.yaml").write_text(json.dumps({"demo": {**DATASET, "on_error": "skip"}}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = (sys.executable, str(ROOT / "scripts" / "convert.py"), "--datasets", "datasets.yaml", "--dataset", "demo")
    where = ("--source_dir", "source", "--output_dir", "typed")
    typed = subprocess.run([*script, *where], env=environment, capture_output=True, text=True)
    assert typed.returncode == 0 and "2 rejected" in typed.stderr, typed.stderr
    assert tree(tmp_path / "typed") == tree(tmp_path / "out")
    stopped = subprocess.run([*script, *where, "--on-error", "stop"], env=environment, capture_output=True, text=True)
    assert stopped.returncode == 2 and "row 4" in stopped.stderr
    with pytest.raises(DataError, match="row 4"):
        convert_dataset("demo", asked, "source", "again", on_error="stop")


def test_rejected_rows_of_a_split_are_counted_once(tmp_path: Path) -> None:
    rows = cauldron_rows(6)
    rows[1]["texts"] = None
    source = write_parquet(tmp_path / "a.parquet", rows)
    for split in ("train", "val", "train"):
        result = convert_files("cauldron", source, tmp_path / "out", split, on_error="skip")
    assert result["rejected"] == 2
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2


def test_pictures_of_an_evaluation_that_train_too_are_counted(tmp_path: Path) -> None:
    rows = cauldron_rows(10, pictures=2)
    rows[7]["images"] = [rows[0]["images"][1], rows[7]["images"][0]]
    rows[8]["images"] = [rows[3]["images"][0], rows[3]["images"][1]]
    source = write_parquet(tmp_path / "a.parquet", rows)
    alone = convert_files("cauldron", source, tmp_path / "out", "val", rows="6:")
    assert alone["leakage"] == {}  # nothing to leak from
    both = convert_files("cauldron", source, tmp_path / "out", "train", rows=":6")
    assert both["leakage"] == {"val": {"examples": 2, "of": 4, "pictures": 3}}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["leakage"] == both["leakage"]
    assert converted(tmp_path / "clean", "cauldron", source, "train", rows=":6")
    clean = convert_files("cauldron", source, tmp_path / "clean", "val", rows="9:")
    assert clean["leakage"] == {"val": {"examples": 0, "of": 1, "pictures": 0}}


def test_an_unknown_format_is_named() -> None:
    splits = {split: {"url": "x", "format": "webdataset"} for split in ("train", "val")}
    with pytest.raises(
        SettingsError, match=r"field `splits.train.format`: got 'webdataset': .*'cauldron', 'docvqa_mini'"
    ):
        validate(Dataset, {**DATASET, "splits": splits}, "config/datasets.yaml: entry `demo`")


def test_every_converter_can_be_named() -> None:
    named = Dataset.model_json_schema()["$defs"]["Split"]["properties"]["format"]["enum"]
    assert set(named) == set(FORMATS)


def test_a_failure_midway_leaves_the_old_folder(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", cauldron_rows(3))
    converted(tmp_path / "out", "cauldron", good)
    before = tree(tmp_path / "out")
    rows = cauldron_rows(40)
    rows[35]["texts"] = None
    with pytest.raises(DataError, match="row 35"):
        converted(tmp_path / "out", "cauldron", write_parquet(tmp_path / "bad.parquet", rows))
    assert tree(tmp_path / "out") == before


def test_a_full_disk_midway_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(8))
    converted(tmp_path / "out", "cauldron", source)
    before = tree(tmp_path / "out")
    written = 0

    def full(*arguments: object) -> list[str]:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return ["train/x.jpg"]

    monkeypatch.setattr(convert.SplitWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        converted(tmp_path / "out", "cauldron", source)
    assert tree(tmp_path / "out") == before


def test_ones_own_files_in_the_output_folder_are_not_replaced(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(2))
    (tmp_path / "mine" / "images" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="images/train: exists, but the converter did not write it"):
        converted(tmp_path / "mine", "cauldron", source)
    converted(tmp_path / "mine", "cauldron", source, "val")
    assert (tmp_path / "mine" / "images" / "train").is_dir()


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(3000))
    code = "import sys; from phi3v.data.convert import convert_files; from pathlib import Path;" \
        "convert_files('cauldron', Path(sys.argv[1]), sys.argv[2], 'train')"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "out")], env=environment)
    images = tmp_path / "out" / ".converting" / "images" / "train"
    while process.poll() is None and not images.exists():
        pass
    process.kill()
    assert process.wait() != 0, "the conversion ended before it could be killed"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".converting"]
    assert len(converted(tmp_path / "out", "cauldron", source)) == 3000
    assert not (tmp_path / "out" / ".converting").exists()


def test_the_command_line_names_what_is_wrong(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "convert.py")
        return subprocess.run(
            [sys.executable, script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    (tmp_path / "my.tsv").write_text("image\tquestion\tanswer\n\tTwo and two?\t4\n")
    done = run("--format", "table", "--input", "my.tsv", "--split", "train", "--metric", "cer", "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert "train: 1 example, 0 pictures, 0 rejected" in done.stderr
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (description["name"], description["metric"]) == ("out", "cer")
    wrong = run("--format", "table", "--input", "none.tsv", "--output_dir", "out")
    assert wrong.returncode == 2
    assert "--input: none.tsv: no such file" in wrong.stderr
    assert run("--output_dir", "out").returncode == 2
