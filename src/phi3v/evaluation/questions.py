"""The questions of a split, the control's swap of pictures, and the batches. None depends on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from phi3v.data.check import in_training
from phi3v.data.conversations import DataError, prompt_text, read_conversations
from phi3v.data.folder import Pictures, split_file

if TYPE_CHECKING:  # the report reads predictions in an environment without torch
    from phi3v.model.image_processing import Phi3VImageProcessor


@dataclass(frozen=True, slots=True)
class Question:
    """The first turn of an example."""

    id: str
    images: tuple[str, ...]
    """Paths as in the jsonl."""
    user: str
    """The user's words, without picture marks."""
    prompt: str
    """What the model reads, up to where the answer starts."""
    answers: tuple[str, ...]
    meta: dict[str, str] = field(default_factory=dict)
    """What the source says of the example."""


def read_questions(data_dir: str | Path, split: str, unlabelled: bool = False) -> list[Question]:
    """A question per example of a split, in its order. unlabelled: answers may be empty.

    Raises DataError: no such split, bad line, an id twice, a missing picture.
    """
    path, pictures = split_file(data_dir, split), Pictures(data_dir)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, example in enumerate(read_conversations(path, unlabelled), 1):
        if example.id in lines:
            raise DataError(
                f"{path}:{number}: field `id`: got {example.id!r}, already on line {lines[example.id]}; expected unique ids"
            )
        lines[example.id] = number
        turn = example.turns[0]
        for image in turn.images:
            pictures.stored_bytes(image, f"{path}:{number}: field `images`")
        questions.append(Question(example.id, turn.images, turn.user, prompt_text(turn), turn.accepted, example.meta))
    return questions


def leaked(pictures: Pictures, questions: Sequence[Question], train_dir: str | Path) -> int | None:
    """Questions with a picture that is, byte for byte, also in the training split of train_dir; None if that has no such split."""
    try:
        path = split_file(train_dir, "train")
    except DataError:
        return None
    paths = {name for question in questions for name in question.images}
    found = in_training(paths, pictures, read_conversations(path), Pictures(train_dir))
    return sum(any(name in found for name in question.images) for question in questions)


def swap_pictures(
    questions: Sequence[Question], digests: dict[str, str], seed: int
) -> tuple[list[Question], list[str]]:
    """The questions with each other's pictures, and the ids of the questions that are left out.

    A seeded permutation among the questions with the same number of pictures. No question gets a picture that it already had,
    compared by content hash, so a page with several questions is not handed back to one of them. Left out are questions
    without pictures and those for which no other pictures remain: they cannot show whether the model uses its pictures.
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
    """A random one-to-one map of the members to donors that `fits` each; members that cannot be mapped are missing from it."""
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
    return {member: donor for member, donor in zip(members, donors, strict=True) if fits(member, donor)}


def prompt_lengths(
    pictures: Pictures, questions: Sequence[Question], image_processor: Phi3VImageProcessor, num_crops: int
) -> list[int]:
    """Tokens of each prompt, pictures included, from headers alone (a byte of text counts as a third of a token)."""
    tokens: dict[str, int] = {}
    for path in {image for question in questions for image in question.images}:
        width, height = pictures.size(path, str(pictures.data_dir))
        tokens[path] = image_processor.tokens_of_picture(width, height, num_crops)
    return [sum(tokens[image] for image in q.images) + len(q.prompt.encode()) // 3 for q in questions]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: a batch too large for memory fails at once, and padding stays small.

    The batches do not depend on the number of processes or on what a restart finds done, so neither do the predictions.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
