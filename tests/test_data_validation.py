"""scripts/validate.py: everything that is wrong is listed with file:line:field, and counted when it is too much to
list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_examples import cauldron_rows, picture_bytes, write_parquet

from phi3v.data.check import KEPT_OF_A_KIND, Level, validate_folder
from phi3v.data.conversations import Conversation, DataError, Turn, format_line
from phi3v.data.convert import convert_files

ROOT = Path(__file__).parents[1]


def example(number: int, image: str = "", split: str = "train") -> Conversation:
    return Conversation(f"{split}-{number}", "s", (Turn((image,) if image else (), "What?", "This"),))


def folder(path: Path, **splits: list[Conversation | bytes]) -> Path:
    """A data folder with these lines; pictures are made for the paths `N.png` that the examples name."""
    (path / "images").mkdir(parents=True)
    for split, lines in splits.items():
        data = [line if isinstance(line, bytes) else format_line(line) for line in lines]
        (path / f"{split}.jsonl").write_bytes(b"".join(data))
        for line in lines:
            for image in line.images if isinstance(line, Conversation) else ():
                if image.removesuffix(".png").isdigit():
                    (path / "images" / image).write_bytes(picture_bytes(int(image.removesuffix(".png")), "PNG"))
    return path


def problems(path: Path, level: Level = "images") -> list[str]:
    return list(validate_folder(path, level)[1].lines())


def test_a_converted_folder_is_fine(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(6, pictures=2))
    for split, rows in (("train", "0:4"), ("val", "4:6")):
        convert_files("cauldron", source, tmp_path / "out", split, rows=rows)
    checks, found, shared = validate_folder(tmp_path / "out", "images", workers=2)
    assert list(found.lines()) == []
    assert shared == {}
    assert {split: (check.examples, len(check.pictures)) for split, check in checks.items()} == {
        "train": (4, 8),
        "val": (2, 4),
    }


def test_a_picture_that_changed_after_the_conversion_is_named(tmp_path: Path) -> None:
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.jpg").write_bytes(picture_bytes(number))
    (tmp_path / "mine.tsv").write_text(
        "image\tquestion\tanswer\n" + "".join(f"{n}.jpg\tWhich?\t{n}\n" for n in range(3))
    )
    convert_files("table", tmp_path / "mine.tsv", tmp_path / "out", "val", images_dir=pictures)
    check = ["sha256sum", "--check", "--quiet", "val.sha256"]
    assert subprocess.run(check, cwd=tmp_path / "out").returncode == 0
    # Saving over the original in place does not reach the converted data.
    with open(pictures / "1.jpg", "r+b") as file:
        file.write(picture_bytes(7))
    assert problems(tmp_path / "out") == []
    (tmp_path / "out/images/val/1.jpg").write_bytes(picture_bytes(7))
    found = problems(tmp_path / "out")
    assert len(found) == 1 and "val.sha256: 1 picture changed since the conversion: 'val/1.jpg'" in found[0]
    assert problems(tmp_path / "out", "paths") == []


def test_every_wrong_line_is_named_in_whatever_way_it_is_wrong(tmp_path: Path) -> None:
    lines: list[Conversation | bytes] = [
        example(0),
        b'{"id": "x", "id": "y", "source": "s", "conversations": [{"images": [], "user": "u", "assistant": "a"}]}\n',
        b"not json\n",
        example(0),
        b"\xff\xfe\n",
        b'{"id": "r", "source": "s", "conversations": [{"images": [], "user": "u", "assistant": ""}]}\n',
        b"\xef\xbb\xbf" + format_line(example(7)),
        format_line(example(8)).replace(b"\n", b"\r\n"),
        b'{"source":"s","id":"other order","conversations":[{"assistant":"a","user":"u <b>"}]}\n',
        format_line(example(9)).rstrip(b"\n"),
    ]
    found = problems(folder(tmp_path / "d", train=lines), "shape")
    assert [line.split(": ")[0].rpartition("/")[2] for line in found] == [
        f"train.jsonl:{n}" for n in (2, 3, 4, 5, 6, 7, 8)
    ]
    text = "\n".join(found)
    for expected in (
        "appears twice",
        "not JSON",
        "field `id`: got 'train-0'",
        "is not UTF-8",
        "assistant`: got ''",
        "mark",
    ):
        assert expected in text


def test_line_numbers_hold_over_large_files(tmp_path: Path) -> None:
    lines: list[Conversation | bytes] = [example(number) for number in range(40_000)]
    lines[31_234] = b"{}\n"
    assert [
        line.split(": ")[0].rpartition(":")[2] for line in problems(folder(tmp_path / "d", train=lines), "shape")
    ] == ["31235"]


def test_an_overlong_line_is_skipped_in_pieces(tmp_path: Path) -> None:
    long = b'{"id": "' + b"x" * (9 * 2**20) + b'"}\n'
    found = problems(folder(tmp_path / "d", train=[example(0), long, example(1), b"{}\n"]), "shape")
    assert len(found) == 2
    assert "train.jsonl:2: more than" in found[0]
    assert "train.jsonl:4:" in found[1]


def test_many_of_a_kind_are_counted(tmp_path: Path) -> None:
    lines = [example(number, f"missing/{number}.png") for number in range(100)]
    found = problems(folder(tmp_path / "d", train=lines))
    assert len(found) == KEPT_OF_A_KIND + 1
    assert found[-1] == "… 80 more: image: no such file"
    assert found[3].startswith("train.jsonl:4: image 'missing/3.png': no such file")


def test_ids_are_unique_over_all_splits(tmp_path: Path) -> None:
    assert (
        "field `id`: got 'a-1'"
        in problems(folder(tmp_path / "d", train=[example(1, split="a")], val=[example(1, split="a")]))[0]
    )


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture_bytes(1, "PNG"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").write_bytes(picture_bytes(1, "PNG"))
    data = folder(
        tmp_path / "d",
        train=[
            example(0, "5.png"),
            example(1, "link.png"),
            example(2, "inside.png"),
            example(3, "out/x.png"),
            example(4, "sub"),
        ],
    )
    (data / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "images" / "inside.png").symlink_to("5.png")
    (data / "images" / "out").symlink_to(tmp_path / "outside")
    (data / "images" / "sub").mkdir()
    found = problems(data)
    assert ["link.png" in found[0], "out/x.png" in found[1], "not a file" in found[2]] == [True] * 3
    assert len(found) == 3


def test_pictures_that_do_not_decode_or_are_too_thin(tmp_path: Path) -> None:
    data = folder(tmp_path / "d", train=[example(0, "1.png"), example(1, "2.png"), example(2, "3.png")])
    (data / "images" / "1.png").write_bytes(picture_bytes(1, "PNG")[:-30])
    (data / "images" / "2.png").write_bytes(picture_bytes(1, "PNG", (1000, 1)))
    found = problems(data)
    assert "train.jsonl:1: image '1.png': cannot be decoded" in found[0]
    assert "train.jsonl:2: image '2.png': 1000 x 1 pixels; expected sides within" in found[1]
    assert len(list(validate_folder(data, "images", tile_size=1000)[1].lines())) == len(found) - 1


def test_a_picture_in_two_splits_is_a_leak_even_when_encoded_anew(tmp_path: Path) -> None:
    data = folder(
        tmp_path / "d", train=[example(0, "1.png")], val=[example(1, "2.png", "val"), example(2, "3.png", "val")]
    )
    (data / "images" / "2.png").write_bytes(picture_bytes(1, "BMP"))
    _, found, shared = validate_folder(data)
    assert shared == {"train and val": 1}
    assert list(found.lines()) == ["val.jsonl:1: image '2.png': the same pixels as '1.png' of split train"]


def test_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        script = str(ROOT / "scripts" / "validate.py")
        return subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)

    data = folder(tmp_path / "d", train=[example(0, "1.png")], val=[example(1, "1.png", "val")])
    done = run(str(data))
    assert done.returncode == 1
    assert "the same pixels" in done.stdout
    assert "train and val: 1 picture in common" in done.stderr
    assert run(str(data), "--allow-leaks").returncode == 0
    assert run(str(tmp_path / "none")).returncode == 2


def test_folders_without_data_and_descriptions_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no JSONL file"):
        validate_folder(tmp_path / "empty")
    data = folder(tmp_path / "d", train=[example(0)])
    (data / "dataset.json").write_text(
        json.dumps({"splits": {"train": {"file": "train.jsonl", "examples": 2}, "val": {"file": "val.jsonl"}}})
    )
    assert [line.rpartition("/")[2] for line in problems(data)] == [
        "train.jsonl: 1 lines; expected 2, the number in dataset.json",
        "val.jsonl: missing, but dataset.json lists it as split val; convert the data again",
    ]
    (data / "dataset.json").write_text('{"splits": {"train": {"file": "../x.jsonl"}}}')
    with pytest.raises(DataError, match="not a dataset description"):
        validate_folder(data)
