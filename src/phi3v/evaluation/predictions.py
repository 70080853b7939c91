"""Predictions on disk: appended batch by batch during a pass, and read again by a restart and by the report.

During a pass each process appends to PASS/partial/FINGERPRINT.RANK.jsonl, with fsync. A restart reads the parts of every process that have
its own fingerprint (model, data, settings, code) and continues; it removes any other part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from phi3v.data.conversations import DataError


class Draft(TypedDict):
    """A line of a part: an answer before it is scored."""

    id: str
    prediction: str
    tokens: int
    choice: float | None
    probability: float
    cut: NotRequired[bool]
    """The answer reached max_new_tokens."""


class Record(TypedDict):
    """A line of predictions.jsonl."""

    id: str
    prompt: str
    images: list[str]
    answers: list[str]
    prediction: str
    score: float
    """By the main metric."""
    p_yes: NotRequired[float]
    cut: NotRequired[bool]
    """Set if the answer reached max_new_tokens."""
    scores: NotRequired[dict[str, float]]
    """By further metrics."""
    meta: NotRequired[dict[str, str]]
    """What the source says of the example."""


class Partial:
    """The parts of one pass.

    folder: the pass' folder. fingerprint: what the answers depend on. rank: number of this process.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int) -> None:
        self.folder, self.fingerprint = folder / "partial", fingerprint
        self.path = self.folder / f"{fingerprint}.{rank}.jsonl"

    def read(self) -> dict[str, Draft]:
        """Answers by example id; skips a line that a killed process left half written."""
        found: dict[str, Draft] = {}
        for path in sorted(self.folder.glob(f"{self.fingerprint}.*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    found[record["id"]] = record
        return found

    def trim(self) -> None:
        """Cut a half-written last line off this process' part, so that appending starts on a fresh line."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, drafts: Iterable[Draft]) -> None:
        """Add the answers of one batch; they are on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json_lines(drafts).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def drop_others(self) -> None:
        """Remove parts that belong to another model, dataset, setting or code."""
        for path in self.folder.glob("*.jsonl"):
            if not path.name.startswith(f"{self.fingerprint}."):
                path.unlink()


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as the text of a jsonl."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def scored_lines(path: Path) -> Iterator[tuple[str, float]]:
    """Id and score of each line of a predictions.jsonl, one at a time.

    Raises DataError naming file, line, field and value: not JSON, an id missing or given twice, no accepted answers, a score that is NaN or
    outside 0-1, no line at all.
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
                    f"{path}:{number}: not a JSON object ({error}); expected id, answers, score …"
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
