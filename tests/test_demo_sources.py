"""The demo's source files: the formats, the same bytes from the same seed, balance, and no picture in two splits."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from phi3v.demo import tasks
from phi3v.demo.sources import SIZES, avi_bytes, make_sources, resolve_sizes, write_digits

SMALL = {
    "docvqa_train": 40,
    "docvqa_mini_train": 30,
    "docvqa_test": 20,
    "hateful_memes": 200,
    "nlvr2": 120,
    "ucf101_train": 5,
    "ucf101_val": 2,
    "ucf101_test": 1,
    "mixture_train": 60,
    "mixture_val": 6,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder, 3, SMALL)
    return folder


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def cauldron(sources: Path, name: str) -> list[dict]:
    return rows(sources / "the_cauldron" / name / "train-00000-of-00001.parquet")


def members(sources: Path) -> dict[str, bytes]:
    with tarfile.open(sources / "ucf101-subset" / "UCF101_subset.tar.gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_same_seed_same_bytes_other_seed_other_pictures(sources: Path, tmp_path: Path) -> None:
    again, other = make_sources(tmp_path / "again", 3, SMALL), make_sources(tmp_path / "other", 4, SMALL)
    assert len(again) == 8
    for path, different in zip(again, other, strict=True):
        original = sources / path.relative_to(tmp_path / "again")
        assert path.read_bytes() == original.read_bytes(), path.name
        assert different.read_bytes() != original.read_bytes(), path.name


def test_no_picture_occurs_twice(sources: Path) -> None:
    digests: Counter = Counter()
    for path in sources.rglob("*.parquet"):
        for row in rows(path):
            for image in row.get("images") or [row["image"]]:
                digests[hashlib.sha256(image["bytes"]).hexdigest()] += 1
    for data in members(sources).values():
        digests[hashlib.sha256(data).hexdigest()] += 1
    assert sum(digests.values()) > 500
    assert max(digests.values()) == 1


@pytest.mark.parametrize(
    ("name", "images", "turns"), [("docvqa", 1, {1, 2}), ("hateful_memes", 1, {1}), ("nlvr2", 2, {2})]
)
def test_cauldron_rows(sources: Path, name: str, images: int, turns: set[int]) -> None:
    found = cauldron(sources, name)
    assert len(found) == SMALL.get(name, SMALL["docvqa_train"])
    assert {len(row["texts"]) for row in found} == turns
    for row in found:
        assert len(row["images"]) == images
        for image in row["images"]:
            assert set(image) == {"bytes", "path"}
            Image.open(io.BytesIO(image["bytes"])).load()
        for text in row["texts"]:
            assert text["source"] == name
            assert text["user"].strip()
            assert text["assistant"].strip()


def test_mini_docvqa_rows(sources: Path) -> None:
    for split, number in (("train", 30), ("test", 20)):
        found = rows(sources / "docvqa_1200_examples" / "data" / f"{split}-00000-of-00001.parquet")
        assert len(found) == number
        assert len({row["id"] for row in found}) == number
        values = {value for field in tasks.SLIP_FIELDS.values() for value in field}
        for row in found:
            assert set(row) == {"id", "image", "query", "answers"}
            assert row["query"]["en"] in tasks.SLIP_QUESTIONS.values()
            assert row["answers"][0] in values


@pytest.mark.parametrize("name", ["hateful_memes", "nlvr2"])
def test_answers_are_balanced(name: str) -> None:
    """Whoever always says yes is right in half of the rows, whatever the question's words are."""
    make = {"hateful_memes": tasks.hateful_memes_row, "nlvr2": tasks.nlvr2_row}[name]
    drawn = [make(tasks.rng_of(1, name, index)).turns[0] for index in range(2000)]
    assert 0.45 < sum(answer == "Yes." for _, answer in drawn) / len(drawn) < 0.55
    by_question: dict[str, list[bool]] = {}
    for question, answer in drawn:
        by_question.setdefault(question, []).append(answer == "Yes.")
    for question, answers in by_question.items():
        # 5 standard deviations of a fair coin.
        assert abs(sum(answers) / len(answers) - 0.5) < 5 * 0.5 / len(answers) ** 0.5, question


def test_a_meme_needs_word_and_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hateful exactly when a mean word stands beside a face."""
    seen: list[tuple[str, str]] = []
    draw = tasks.meme

    def spy(rng, figure, first, second):
        seen.append((figure, second))
        return draw(rng, figure, first, second)

    monkeypatch.setattr(tasks, "meme", spy)
    combinations = Counter()
    for index in range(400):
        row = tasks.hateful_memes_row(tasks.rng_of(2, "meme", index))
        figure, word = seen[-1]
        mean = word in tasks.MEAN_WORDS
        assert (row.turns[0][1] == "Yes.") == (mean and figure == "face")
        combinations[mean, figure] += 1
    assert len(combinations) == 4
    assert min(combinations.values()) > 400 / 6 * 0.6


def test_statements_say_what_the_pictures_show(monkeypatch: pytest.MonkeyPatch) -> None:
    cards: list[tuple[str, str]] = []
    draw = tasks.figure_card

    def spy(rng, kind, colour):
        cards.append((colour, kind))
        return draw(rng, kind, colour)

    monkeypatch.setattr(tasks, "figure_card", spy)
    for index in range(300):
        cards.clear()
        row = tasks.nlvr2_row(tasks.rng_of(2, "pair", index))
        assert len(row.pictures) == len(cards) == 2
        for question, answer in row.turns:
            said = re.match(r"One of the images shows (?:something|a) (\w+)\.", question).group(1)
            assert (answer == "Yes.") == any(said in card for card in cards), question


def test_ucf101_archive(sources: Path) -> None:
    import av

    found = members(sources)
    assert len(found) == 10 * (5 + 2 + 1)
    groups: dict[str, set[str]] = {}
    for name, data in found.items():
        split, label, group = re.fullmatch(
            r"UCF101_subset/(train|val|test)/(\w+)/v_\2_g(\d\d)_c\d\d\.avi", name
        ).groups()
        assert label in tasks.UCF_CLASSES
        groups.setdefault(split, set()).add(group)
        with av.open(io.BytesIO(data)) as clip:
            assert sum(1 for _ in clip.decode(video=0)) == 16
    assert not groups["train"] & groups["val"]
    assert not groups["val"] & groups["test"]


@pytest.mark.parametrize("name", list(tasks.UCF_CLASSES))
def test_a_clip_shows_its_class(name: str) -> None:
    """Colour and direction survive the video codec: the ball's centre moves as the class says."""
    import av

    colour, direction = tasks.UCF_CLASSES[name]
    frames = tasks.clip_frames(tasks.rng_of(5, name, 0), name, 16)
    with av.open(io.BytesIO(avi_bytes(frames))) as clip:
        decoded = [frame.to_image() for frame in clip.decode(video=0)]

    def centre(picture: Image.Image) -> tuple[float, float]:
        target = tasks.COLOURS[colour]
        ball = [
            (x, y)
            for x in range(0, picture.width, 2)
            for y in range(0, picture.height, 2)
            if sum(abs(a - b) for a, b in zip(picture.getpixel((x, y)), target, strict=True)) < 120
        ]
        assert len(ball) > 50
        return sum(x for x, _ in ball) / len(ball), sum(y for _, y in ball) / len(ball)

    (x0, y0), (x1, y1) = centre(decoded[0]), centre(decoded[-1])
    moved, still = (x1 - x0, y1 - y0) if direction == "right" else (y1 - y0, x1 - x0)
    assert moved > 20
    assert abs(still) < 3


def test_letters_fit_their_cells() -> None:
    """A letter inks its own cell only, and no two letters look alike."""
    from PIL import ImageDraw

    looks = set()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    for letter in letters:
        picture = Image.new("L", (3 * tasks.CELL, 3 * tasks.CELL), 255)
        tasks.write(ImageDraw.Draw(picture), tasks.CELL, tasks.CELL, letter, 0)
        left, top, right, bottom = Image.eval(picture, lambda value: 255 - value).getbbox()
        assert left >= 14
        assert top >= 14
        assert right <= 28
        assert bottom <= 28
        looks.add(picture.tobytes())
    assert len(looks) == len(letters)


def test_every_word_fits_its_place() -> None:
    for name, values in tasks.SLIP_FIELDS.items():
        assert len(name) <= 3
        assert all(len(value) <= 4 for value in values)
        assert len(set(values)) == 8
    words = (*tasks.MEAN_WORDS, *tasks.KIND_WORDS, *tasks.MEME_OPENINGS)
    assert all(len(word) <= 4 for word in words)
    assert not set(tasks.MEAN_WORDS) & set(tasks.KIND_WORDS)


@pytest.mark.parametrize(("sizes", "message"), [({"docvqa": 5}, "'docvqa' is unknown"), ({"nlvr2": 0}, "nlvr2 is 0")])
def test_wrong_sizes_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sizes(sizes)
    assert resolve_sizes({}) == SIZES


def test_digits_are_the_real_scans(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    tables = write_digits(tmp_path, seed=0)
    counts, seen = {}, set()
    for table in tables:
        with open(table, encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file, delimiter="\t"))
        counts[table.stem] = Counter(row["answer"] for row in found)
        for row in found:
            split, label, name = row["image"].split("/")
            index = int(name.removesuffix(".png"))
            assert split == table.stem
            assert label == row["answer"] == str(scans.target[index])
            seen.add(index)
            picture = Image.open(tmp_path / row["image"])
            assert picture.size == (8, 8)
            assert picture.mode == "L"
            darkest = min(picture.tobytes())
            assert darkest == round(255 - scans.images[index].max() * 255 / 16)
    assert seen == set(range(1797))
    assert 390 <= sum(counts["val"].values()) <= 410
    assert max(counts["val"].values()) - min(counts["val"].values()) <= 3
    with pytest.raises(ValueError, match="held_out: got 1797"):
        write_digits(tmp_path, held_out=1797)
