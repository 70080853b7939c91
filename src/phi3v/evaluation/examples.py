"""What is asked: the first turn of each example, the control's swap of pictures, and the batches, the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from PIL import Image

from phi3v.data.conversations import DataError, Turn, prompt_text, read_conversations
from phi3v.data.folder import describe, split_file
from phi3v.data.leakage import in_training
from phi3v.data.pictures import Pictures, pictures_of


@dataclass(frozen=True, slots=True)
class Question:
    """One example as it is asked."""

    id: str
    images: tuple[str, ...]
    """Paths relative to DIR/images."""
    user: str
    """The user's words, without picture marks."""
    prompt: str
    """What the model reads, up to where the answer starts."""
    answers: tuple[str, ...]


def read_questions(data_dir: str | Path, split: str) -> list[Question]:
    """The first turn of every example of a split, in its order. Raises DataError: no such split, bad line, an id twice, a missing picture."""
    folder = Path(data_dir)
    path = split_file(folder, split)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, example in enumerate(read_conversations(path), 1):
        if example.id in lines:
            raise DataError(
                f"{path}:{number}: field `id`: got {example.id!r}, already on line {lines[example.id]}; expected unique ids"
            )
        lines[example.id] = number
        turn: Turn = example.turns[0]
        for image in turn.images:
            if not (folder / "images" / image).is_file():
                raise DataError(
                    f"{path}:{number}: field `images`: {folder / 'images' / image}: no such file; expected a picture"
                )
        questions.append(Question(example.id, turn.images, turn.user, prompt_text(turn), turn.accepted))
    return questions


def content_digests(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Path to digest of its bytes, for every picture of the questions: equal pictures under two names have one digest."""
    paths = {image for question in questions for image in question.images}
    return {path: hashlib.sha256((folder / "images" / path).read_bytes()).hexdigest() for path in sorted(paths)}


def leaked(data_dir: str | Path, questions: Sequence[Question], train_dir: str | Path) -> int | None:
    """Questions of which a picture, byte for byte, is also in the training split of train_dir; None where that has none."""
    folder, other = Path(data_dir), Path(train_dir)
    try:
        path = split_file(other, "train")
    except DataError:
        return None
    theirs = pictures_of(other, describe(other).get("splits", {}).get("train", {}))
    paths = {name for question in questions for name in question.images}
    found = in_training(paths, Pictures(folder), read_conversations(path), theirs)
    return sum(any(name in found for name in question.images) for question in questions)


def swap_pictures(
    questions: Sequence[Question], digests: dict[str, str], seed: int
) -> tuple[list[Question], list[str]]:
    """The questions with each other's pictures, and the ids that are left out.

    A seeded permutation among the questions with as many pictures in which no question gets any picture that it had itself (by content,
    so a page with several questions is not handed back to one of them). Questions without pictures, and those for which no
    other pictures are left, are left out: they cannot tell whether the model looks.
    """
    rng = Random(f"control/{seed}")
    groups: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(len(question.images), []).append(index)
    own = [frozenset(digests[image] for image in question.images) for question in questions]
    donor: dict[int, int] = {}
    for size, members in sorted(groups.items()):
        if size:
            donor.update(_derange(members, lambda i, j: own[i].isdisjoint(own[j]), rng))
    swapped = [replace(questions[i], images=questions[donor[i]].images) for i in sorted(donor)]
    return swapped, [question.id for i, question in enumerate(questions) if i not in donor]


def _derange(members: list[int], fits: Callable[[int, int], bool], rng: Random) -> dict[int, int]:
    """A random one-to-one map of the members to donors that `fits` each; members that cannot be placed are missing from it."""
    donors = members[:]
    rng.shuffle(donors)
    order = list(range(len(members)))
    for place, member in enumerate(members):
        if fits(member, donors[place]):
            continue
        rng.shuffle(order)
        for other in order:
            if fits(member, donors[other]) and fits(members[other], donors[place]):
                donors[place], donors[other] = donors[other], donors[place]
                break
    return {member: gift for member, gift in zip(members, donors, strict=True) if fits(member, gift)}


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first: what runs out of memory does so at once, and padding stays small.

    The batches do not depend on the number of processes or on what a restart finds done, so neither do the predictions.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompt_lengths(folder: Path, questions: Sequence[Question], processor: object, num_crops: int) -> list[int]:
    """Tokens of each prompt, pictures included, from headers alone (a byte of text counted as a third of a token)."""
    tokens: dict[str, int] = {}
    for path in {image for question in questions for image in question.images}:
        with Image.open(folder / "images" / path) as image:
            tokens[path] = processor.image_processor.tokens_of_picture(*image.size, num_crops)  # type: ignore[attr-defined]
    return [sum(tokens[image] for image in q.images) + len(q.prompt.encode()) // 3 for q in questions]
