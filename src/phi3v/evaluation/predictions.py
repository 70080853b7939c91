"""Predictions on disk: appended during a pass, merged in the dataset's order when the pass is complete, and scored.

During a pass each process appends to PASS/partial/FINGERPRINT.RANK.jsonl, a batch at a time, with fsync. A restart reads the parts of
every process that have its own fingerprint (model, data, settings, code) and continues; it removes any other part.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from phi3v.data.conversations import DataError
from phi3v.evaluation import metrics, statistics
from phi3v.evaluation.questions import Question
from phi3v.provenance.manifest import write_atomically, write_json


class Draft(TypedDict):
    """A line of a part: an answer before it is scored."""

    id: str
    prediction: str
    tokens: int
    choice: float | None


class Record(TypedDict):
    """A line of predictions.jsonl."""

    id: str
    prompt: str
    images: list[str]
    answers: list[str]
    prediction: str
    score: float
    p_yes: NotRequired[float]


class Figure(TypedDict):
    """A metric, 0-100, with its interval."""

    score: float
    interval: list[float]


class Summary(TypedDict):
    """metrics.json of a pass."""

    metric: str
    score: float
    n: int
    interval: list[float]
    more: dict[str, Figure | metrics.Confusion]
    """Further metrics that the examples allow."""
    left_out: NotRequired[int]
    leaked: NotRequired[int | None]


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
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                found[record["id"]] = record
        return found

    def trim(self) -> None:
        """Cut a half-written last line off this process' part, so that appending starts on a fresh line."""
        if self.path.is_file() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def append(self, drafts: Iterable[Draft]) -> None:
        """Add the answers of one batch; they are on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(_lines(drafts).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def drop_others(self) -> None:
        """Remove parts that belong to another model, dataset, setting or code."""
        for path in self.folder.glob("*.jsonl"):
            if not path.name.startswith(f"{self.fingerprint}."):
                path.unlink()

    def remove(self) -> None:
        """Remove all parts, once the pass is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _lines(records: Iterable[Draft] | Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def merge(questions: Sequence[Question], drafts: dict[str, Draft], metric: str) -> list[Record]:
    """One record per question, in their order, scored. Raises DataError when an answer is missing."""
    score = metrics.SCORES[metric]
    records: list[Record] = []
    for question in questions:
        draft = drafts.get(question.id)
        if draft is None:
            raise DataError(f"predictions: id {question.id!r}: no answer was generated; expected one for every example")
        record: Record = {
            "id": question.id,
            "prompt": question.user,
            "images": list(question.images),
            "answers": list(question.answers),
            "prediction": draft["prediction"],
            "score": round(score(draft["prediction"], question.answers), 6),
        }
        if draft["choice"] is not None:
            record["p_yes"] = draft["choice"]
        records.append(record)
    return records


def summarise(records: Sequence[Record], metric: str, seed: int) -> Summary:
    """metrics.json of a pass."""
    scores = [record["score"] for record in records]
    figure = _figure(metrics.mean_score(scores), statistics.interval_of(metric, scores, seed))
    more = _official_anls(records, seed) if metric == "anls" else _of_classes(records, seed)
    return {"metric": metric, "score": figure["score"], "n": len(scores), "interval": figure["interval"], "more": more}


def _official_anls(records: Sequence[Record], seed: int) -> dict[str, Figure | metrics.Confusion]:
    scores = [metrics.official_anls(record["prediction"], record["answers"]) for record in records]
    return {"official_anls": _figure(metrics.mean_score(scores), statistics.bootstrap(scores, seed))}


def _of_classes(records: Sequence[Record], seed: int) -> dict[str, Figure | metrics.Confusion]:
    """AUROC of yes/no answers, NLVR2's consistency, and a confusion table: each where the examples define it."""
    more: dict[str, Figure | metrics.Confusion] = {}
    truths = [metrics.normalise(record["answers"][0]) for record in records]
    if set(truths) == {"yes", "no"} and all("p_yes" in record for record in records):
        positive, shares = [truth == "yes" for truth in truths], [record["p_yes"] for record in records]
        interval = statistics.bootstrap_paired(metrics.auroc, positive, shares, seed)
        more["auroc"] = _figure(metrics.auroc(positive, shares), interval)
    try:
        sentences = [metrics.nlvr2_sentence(record["id"]) for record in records]
    except ValueError:
        sentences = []
    if sentences and (distinct := len(set(sentences))) < len(sentences):
        share = metrics.consistency(sentences, [record["score"] == 1 for record in records])
        more["consistency"] = _figure(share, statistics.wilson(round(share / 100 * distinct), distinct))
    if 2 < len(set(truths)) <= 50:
        more["confusion"] = metrics.confusion([r["answers"][0] for r in records], [r["prediction"] for r in records])
    return more


def _figure(score: float, interval: statistics.Interval) -> Figure:
    return {"score": round(score, 4), "interval": [round(bound, 4) for bound in interval]}


def write_pass(folder: Path, records: Sequence[Record], summary: Summary, timing: dict[str, object]) -> None:
    """predictions.jsonl, metrics.json, and last timing.json, the only one that differs from run to run."""
    write_atomically(folder / "predictions.jsonl", _lines(records))
    write_json(folder / "metrics.json", summary)
    write_json(folder / "timing.json", timing)


def finished(folder: Path, fingerprint: str) -> bool:
    """Whether the pass is complete and came from the same fingerprint."""
    try:
        timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
        same = timing["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and all((folder / name).is_file() for name in ("predictions.jsonl", "metrics.json"))


def scored_lines(path: Path) -> Iterator[tuple[str, float]]:
    """Id and score of each line of a predictions.jsonl, one at a time.

    Raises DataError naming file, line, field and value: not JSON, an id missing or given twice, no accepted answers, a score that is NaN or
    outside 0-1, no line at all.
    """
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                identifier, score = _scored(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            if identifier in seen:
                raise DataError(
                    f"{path}:{number}: field `id`: got {identifier!r}, which an earlier line has; expected unique ids"
                )
            seen.add(identifier)
            yield identifier, score
    if not seen:
        raise DataError(f"{path}: empty; expected one prediction per line")


def _scored(line: bytes) -> tuple[str, float]:
    """(id, score) of a line of a predictions.jsonl. Raises ValueError."""
    try:
        record: dict[str, object] = json.loads(line)
        identifier, score, answers = record["id"], record["score"], record["answers"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a JSON object ({error}); expected id, prompt, answers, prediction, score") from None
    except KeyError as error:
        raise ValueError(f"field `{error.args[0]}`: missing; expected id, prompt, answers, prediction, score") from None
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"field `id`: got {identifier!r}; expected a string")
    if not answers:
        raise ValueError(f"field `answers`: got {answers!r}; expected at least one accepted answer")
    if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score) or not 0 <= score <= 1:
        raise ValueError(f"field `score`: got {score!r}; expected a number 0-1")
    return identifier, float(score)
