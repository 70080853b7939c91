"""Predictions on disk: appended while a pass runs, merged in the dataset's order when it is whole, and scored.

While a pass runs each process appends to PASS/partial/FINGERPRINT.RANK.jsonl, a batch at a time, fsynced. A restart reads the parts of
every process whose fingerprint (model, data, settings, code) is its own, and goes on; any other part is removed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.conversations import DataError
from phi3v.evaluation import metrics, statistics
from phi3v.evaluation.examples import Question
from phi3v.provenance.manifest import write_atomically, write_json

PARTIAL = "partial"


class Partial:
    """The parts of one pass.

    folder: the pass' folder. fingerprint: what the answers depend on. rank: number of this process.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int) -> None:
        self.folder, self.fingerprint = folder / PARTIAL, fingerprint
        self.path = self.folder / f"{fingerprint}.{rank}.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """Answers found, by example id; a line that a killed process left half written is passed over."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.fingerprint}.*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                found[record["id"]] = record
        return found

    def mend(self) -> None:
        """Cut a half-written last line off this process' part, so that appending starts on a fresh line."""
        if self.path.is_file() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add the answers of one batch; they are on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(lines.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def drop_others(self) -> None:
        """Remove parts that belong to another model, dataset, setting or code."""
        for path in self.folder.glob("*.jsonl"):
            if not path.name.startswith(f"{self.fingerprint}."):
                path.unlink()

    def remove(self) -> None:
        """Remove all parts, once the pass is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)


def merge(questions: Sequence[Question], answers: dict[str, dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One record per question, in their order, scored. Raises DataError when an answer is missing."""
    score = metrics.SCORES[metric]
    records = []
    for question in questions:
        found = answers.get(question.id)
        if found is None:
            raise DataError(f"predictions: id {question.id!r}: no answer was generated; expected one for every example")
        record = {
            "id": question.id,
            "prompt": question.user,
            "images": list(question.images),
            "answers": list(question.answers),
            "prediction": found["prediction"],
            "score": round(score(found["prediction"], question.answers), 6),
        }
        if found.get("choice") is not None:
            record["p_yes"] = found["choice"]
        records.append(record)
    return records


def summarise(records: Sequence[dict[str, Any]], metric: str, seed: int) -> dict[str, Any]:
    """metrics.json of a pass: {"metric", "score" 0-100, "n", "interval", "more": further metrics that the examples allow}."""
    scores = [record["score"] for record in records]
    low, high = statistics.interval_of(metric, scores, seed)
    return {
        "metric": metric,
        "score": round(metrics.mean_score(scores), 4),
        "n": len(scores),
        "interval": [round(low, 4), round(high, 4)],
        "more": further_metrics(records, metric, seed),
    }


def further_metrics(records: Sequence[dict[str, Any]], metric: str, seed: int) -> dict[str, Any]:
    """The official counterparts, where they are defined: ANLS as DocVQA's server has it, AUROC, NLVR2's consistency, confusion."""
    more: dict[str, Any] = {}
    if metric == "anls":
        official = [metrics.official_anls(record["prediction"], record["answers"]) for record in records]
        more["official_anls"] = _figure(metrics.mean_score(official), statistics.bootstrap(official, seed))
        return more
    truths = [metrics.normalise(record["answers"][0]) for record in records]
    if set(truths) == {"yes", "no"} and all("p_yes" in record for record in records):
        positive = [truth == "yes" for truth in truths]
        shares = [record["p_yes"] for record in records]
        interval = statistics.bootstrap_of(
            lambda pick: metrics.auroc([positive[i] for i in pick], [shares[i] for i in pick]),
            len(shares),
            seed,
            resamples=500,
        )
        more["auroc"] = _figure(metrics.auroc(positive, shares), interval)
    try:
        sentences = [metrics.nlvr2_sentence(record["id"]) for record in records]
    except ValueError:
        sentences = []
    if sentences and len(set(sentences)) < len(sentences):
        share = metrics.consistency(sentences, [record["score"] == 1 for record in records])
        distinct = len(set(sentences))
        more["consistency"] = _figure(share, statistics.wilson(round(share / 100 * distinct), distinct))
    if 2 < len(set(truths)) <= 50:
        more["confusion"] = metrics.confusion([r["answers"][0] for r in records], [r["prediction"] for r in records])
    return more


def _figure(score: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"score": round(score, 4), "interval": [round(bound, 4) for bound in interval] if interval else None}


def write_pass(
    folder: Path, records: Sequence[dict[str, Any]], summary: dict[str, Any], timing: dict[str, Any]
) -> None:
    """predictions.jsonl, metrics.json, and last timing.json, which alone differs from run to run."""
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_atomically(folder / "predictions.jsonl", lines)
    write_json(folder / "metrics.json", summary)
    write_json(folder / "timing.json", timing)


def finished(folder: Path, fingerprint: str) -> bool:
    """Whether the pass is whole and came from the same fingerprint."""
    try:
        timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
        return (
            timing["fingerprint"] == fingerprint
            and (folder / "predictions.jsonl").is_file()
            and (folder / "metrics.json").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, slots=True)
class ScoredLine:
    """A line of a predictions.jsonl."""

    id: str
    score: float
    raw: bytes


def scored_lines(path: Path) -> Iterator[ScoredLine]:
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
            except (ValueError, TypeError, KeyError) as error:
                what = (
                    f"field `{error.args[0]}`: missing"
                    if isinstance(error, KeyError)
                    else f"not a JSON object ({error})"
                )
                raise DataError(f"{path}:{number}: {what}; expected id, prompt, answers, prediction, score") from None
            if not isinstance(identifier, str) or not identifier:
                raise DataError(f"{path}:{number}: field `id`: got {identifier!r}; expected a string")
            if identifier in seen:
                raise DataError(
                    f"{path}:{number}: field `id`: got {identifier!r}, which an earlier line has; expected unique ids"
                )
            if not answers:
                raise DataError(
                    f"{path}:{number}: field `answers`: got {answers!r}; expected at least one accepted answer"
                )
            if (
                isinstance(score, bool)
                or not isinstance(score, int | float)
                or math.isnan(score)
                or not 0 <= score <= 1
            ):
                raise DataError(f"{path}:{number}: field `score`: got {score!r}; expected a number 0-1")
            seen.add(identifier)
            yield ScoredLine(identifier, float(score), line)
    if not seen:
        raise DataError(f"{path}: empty; expected one prediction a line")
