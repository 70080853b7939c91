"""Questions of a split, and their answers on disk.

Batches, and the control's swap of pictures, depend only on the data, not on the number of processes. During a pass,
each process appends to PASS/partial/FINGERPRINT.RANK.jsonl and calls fsync. A restart reads the parts of all processes
that have its fingerprint (model, data, settings) and resumes. It removes all other parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

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
    """Paths as in the JSONL file."""
    user: str
    """The user's text, without picture marks."""
    prompt: str
    """The model's input up to the start of the answer."""
    answers: tuple[str, ...]
    meta: dict[str, str] = field(default_factory=dict)
    """Attributes of the example in the source."""


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
                f"{path}:{number}: field `id`: got {example.id!r}, already on line {lines[example.id]}; expected "
                "unique ids"
            )
        lines[example.id] = number
        turn = example.turns[0]
        for image in turn.images:
            pictures.stored_bytes(image, f"{path}:{number}: field `images`")
        questions.append(Question(example.id, turn.images, turn.user, prompt_text(turn), turn.accepted, example.meta))
    return questions


def leaked(pictures: Pictures, questions: Sequence[Question], train_dir: str | Path) -> int | None:
    """Number of questions with a picture that is also in train_dir's training split (same bytes). None without that
    split."""
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
    """The questions with swapped pictures, and the ids of the questions that are left out.

    Permutes the pictures by seed among questions with the same number of pictures. No question keeps any of its own
    pictures, compared by content hash, so several questions about one page do not swap that page. Questions without
    pictures, or for which no other pictures remain, are left out, because they cannot show whether the model uses its
    pictures.
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
    """A random one-to-one map of the members to donors for which `fits` is true. Members without a donor are missing
    from it."""
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
    """Tokens of each prompt including pictures, from picture headers alone (a byte of text counts as a third of a
    token)."""
    tokens: dict[str, int] = {}
    for path in {image for question in questions for image in question.images}:
        width, height = pictures.size(path, str(pictures.data_dir))
        tokens[path] = image_processor.tokens_of_picture(width, height, num_crops)
    return [sum(tokens[image] for image in q.images) + len(q.prompt.encode()) // 3 for q in questions]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a batch that is too large fails at once.

    The batches depend neither on the number of processes nor on finished answers, so neither do the predictions.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer, before scoring."""

    prediction: str
    tokens: int
    """Generated tokens, including the one that ended the answer."""
    probability: float
    """Geometric mean of the token probabilities."""
    cut: bool = False
    """Whether it reached max_new_tokens before it ended."""
    choice: float | None = None
    """P(positive) / (P(positive) + P(negative)) of the first token."""


class Record(TypedDict):
    """A line of predictions.jsonl."""

    id: str
    prompt: str
    images: list[str]
    answers: list[str]
    prediction: str
    score: float
    """Score by the main metric."""
    p_yes: NotRequired[float]
    cut: NotRequired[bool]
    """Present if the answer reached max_new_tokens."""
    scores: NotRequired[dict[str, float]]
    """Scores by further metrics."""
    meta: NotRequired[dict[str, str]]
    """Attributes of the example in the source."""


class Partial:
    """The parts of one pass.

    folder: folder of the pass. fingerprint: digest of everything that the answers depend on. rank: number of this
    process.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int) -> None:
        self.folder, self.fingerprint = folder / "partial", fingerprint
        self.path = self.folder / f"{fingerprint}.{rank}.jsonl"

    def read(self) -> dict[str, Answer]:
        """Answers by example id. Skips an incomplete line of a killed process."""
        found: dict[str, Answer] = {}
        for path in sorted(self.folder.glob(f"{self.fingerprint}.*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    name = record.pop("id")
                    found[name] = Answer(**record)
        return found

    def trim(self) -> None:
        """Removes an incomplete last line from this process's part, so that appending starts on a new line."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, batch: Iterable[tuple[Question, Answer]]) -> None:
        """Appends the answers of one batch. They are on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json_lines({"id": question.id, **asdict(answer)} for question, answer in batch).encode())
            file.flush()
            os.fsync(file.fileno())

    def drop_others(self) -> None:
        """Removes parts of another model, dataset or setting."""
        for path in self.folder.glob("*.jsonl"):
            if not path.name.startswith(f"{self.fingerprint}."):
                path.unlink()


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as the text of a JSONL file."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def scored_lines(path: Path) -> Iterator[tuple[str, float]]:
    """Id and score of each line of a predictions.jsonl, one at a time.

    Raises DataError that names file, line, field and value: invalid JSON, a missing or repeated id, no accepted
    answers, a score that is NaN or outside 0-1, or an empty file.
    """
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                identifier, score, answers = record["id"], record["score"], record["answers"]
            except KeyError as error:
                raise DataError(f"{path}:{number}: field `{error.args[0]}`: missing; expected a value") from None
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: not a JSON object ({error}); expected an object with id, answers, score …"
                ) from None
            problem = ""
            if not isinstance(identifier, str) or not identifier:
                problem = f"field `id`: got {identifier!r}; expected a string"
            elif identifier in seen:
                problem = f"field `id`: got {identifier!r}, which an earlier line has; expected unique ids"
            elif not answers:
                problem = f"field `answers`: got {answers!r}; expected at least one accepted answer"
            elif isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                problem = f"field `score`: got {score!r}; expected a number 0-1"
            if problem:
                raise DataError(f"{path}:{number}: {problem}")
            seen.add(identifier)
            yield identifier, float(score)
    if not seen:
        raise DataError(f"{path}: empty; expected one prediction per line")
