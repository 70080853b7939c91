"""Result files of a run, read and checked: what each row's folders hold, and what is wrong or missing.

Nothing here stops a report: what cannot be read becomes a named problem of its row. Scores of a million predictions are read one row at
a time and reduced to their comparison and a few shown examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from phi3v.data.conversations import DataError
from phi3v.evaluation import statistics
from phi3v.evaluation.predictions import ScoredLine, scored_lines
from phi3v.provenance.manifest import ResultError, read_json, scrub

SHOWN_EXAMPLES = 12
CURVE_POINTS = 300
LOG_LINES = 15


@dataclass
class Pass:
    """One evaluation pass of a row."""

    metric: str
    score: float
    n: int
    interval: tuple[float, float]
    more: dict[str, Any]
    timing: dict[str, Any]
    manifest: dict[str, Any]
    ids: np.ndarray
    """Digests of the example ids, in the file's order."""
    scores: np.ndarray
    examples: list[dict[str, Any]]
    """Records shown in the report, wrong and right ones."""
    left_out: int = 0
    leaked: int | None = None
    """Examples with a picture that was trained on."""


@dataclass
class Work:
    """One job's folder: train, evaluate or speed."""

    folder: Path
    manifest: dict[str, Any] | None
    log: Path | None
    log_tail: list[str]

    @property
    def seconds(self) -> float | None:
        return None if self.manifest is None else self.manifest.get("seconds")


@dataclass
class AccuracyResult:
    """Everything a row of the accuracy table produced."""

    train: Work
    evaluate: Work
    baseline: Work
    official_work: Work
    """The evaluation on the authors' own split."""
    passes: dict[str, Pass] = field(default_factory=dict)
    official: Pass | None = None
    """After training, on the authors' own split."""
    official_problem: str = ""
    gain: statistics.Comparison | None = None
    """After minus before."""
    looking: statistics.Comparison | None = None
    """After minus control: what the pictures are worth."""
    settings: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class SpeedResult:
    """Everything a row of the speed table produced."""

    work: Work
    speed: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def number(values: dict[str, Any], name: str, path: Path, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number of a result file. Raises ResultError."""
    value = values.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ResultError(f"{path}: field `{name}`: got {value!r}; expected a number {low:g} to {high:g}")
    return float(value)


def read_work(folder: Path, log: Path, problems: list[str]) -> Work:
    """Manifest and log of a job's folder, either may be missing."""
    manifest = None
    if (folder / "manifest.json").is_file():
        try:
            manifest = read_json(folder / "manifest.json")
        except ResultError as error:
            problems.append(str(error))
    tail: list[str] = []
    if log.is_file() and manifest is None:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode("utf-8", errors="replace").replace("\r", "\n")
        tail = [scrub(line)[:300] for line in text.splitlines() if line.strip()][-LOG_LINES:]
    return Work(folder, manifest, log if log.is_file() else None, tail)


def read_curve(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, thinned to CURVE_POINTS; a half-written last line is passed over."""
    if not path.is_file():
        return []
    points = []
    lines = path.read_bytes().splitlines(keepends=True)
    for at, line in enumerate(lines, 1):
        if at == len(lines) and not line.endswith(b"\n"):
            break
        try:
            point = json.loads(line)
            if "loss" in point:
                points.append({key: value if _finite(value) else None for key, value in point.items()})
        except (ValueError, TypeError) as error:
            problems.append(f"{path}:{at}: not a JSON object ({error}); expected step, loss, …")
            return points
    if len(points) > CURVE_POINTS:
        keep = np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).astype(int))
        points = [points[i] for i in keep]
    return points


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


class _Sample:
    """The records whose ids hash lowest, right and wrong ones apart: every row of a dataset tends to show the same examples."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[bool, list[tuple[int, bytes]]] = {True: [], False: []}

    def offer(self, line: ScoredLine) -> None:
        side = self.kept[line.score >= 0.5]
        key = zlib.crc32(line.id.encode())
        if len(side) < self.size or key < side[-1][0]:
            side.append((key, line.raw))
            side.sort()
            del side[self.size :]

    def records(self) -> list[dict[str, Any]]:
        half = self.size // 2
        wrong, right = self.kept[False], self.kept[True]
        take_wrong = max(half, self.size - len(right))
        take_right = max(half, self.size - len(wrong))
        return [json.loads(raw) for _, raw in [*wrong[:take_wrong], *right[:take_right]]][: self.size]


def read_pass(folder: Path, manifest: dict[str, Any], expected: Callable[[dict[str, Any]], str | None]) -> Pass:
    """One pass' metrics and predictions, checked against each other.

    expected: what is wrong with the manifest's settings for this row, or None. Raises ResultError or DataError with the file and field.
    """
    path = folder / "metrics.json"
    metrics = read_json(path)
    wrong = expected(manifest.get("settings", {}))
    if wrong:
        raise ResultError(f"{folder.parent / 'manifest.json'}: {wrong}")
    score = number(metrics, "score", path, 0, 100)
    n = int(number(metrics, "n", path, 1))
    bounds = metrics.get("interval")
    if (
        not isinstance(bounds, list)
        or len(bounds) != 2
        or not all(isinstance(b, int | float) and math.isfinite(b) for b in bounds)
    ):
        raise ResultError(f"{path}: field `interval`: got {bounds!r}; expected [low, high]")
    sample = _Sample(SHOWN_EXAMPLES)
    ids, scores = [], []
    for line in scored_lines(folder / "predictions.jsonl"):
        ids.append(hash_id(line.id))
        scores.append(line.score)
        sample.offer(line)
    if len(scores) != n:
        raise ResultError(
            f"{path}: field `n`: got {n}, predictions.jsonl has {len(scores)} lines; expected equal numbers"
        )
    mean = 100 * math.fsum(scores) / n
    if abs(mean - score) > 0.01:
        raise ResultError(
            f"{path}: field `score`: got {score}, the predictions beside it give {mean:.4f}; is it of another run?"
        )
    timing = read_json(folder / "timing.json") if (folder / "timing.json").is_file() else {}
    return Pass(
        str(metrics.get("metric", "")), score, n, (float(bounds[0]), float(bounds[1])), metrics.get("more") or {}, timing, manifest,
        np.asarray(ids, dtype=np.uint64), np.asarray(scores), sample.records(), int(metrics.get("left_out") or 0), metrics.get("leaked"),
    )  # fmt: skip


def hash_id(identifier: str) -> int:
    """64 bits of an id, enough to pair examples without keeping their names."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "big")


def compare(left: Pass, right: Pass, seed: int) -> statistics.Comparison:
    """Left minus right over the examples that both have. Raises ResultError when there are none."""
    _, at_left, at_right = np.intersect1d(left.ids, right.ids, assume_unique=True, return_indices=True)
    if not at_left.size:
        raise ResultError("the two passes share no example id; expected the same examples")
    # Sorted by id above: the order, and so the interval, does not depend on the files' order.
    return statistics.paired(left.scores[at_left], right.scores[at_right], seed)


def mean_over_seeds(passes: list[Pass]) -> Pass:
    """One pass whose score of each example is its mean over the seeds; the first seed's examples are shown.

    The interval covers both the examples and the seeds: `statistics.interval_over_seeds`. Raises ResultError unless all seeds answered the
    same examples.
    """
    first = passes[0]
    orders = [np.argsort(one.ids, kind="stable") for one in passes]
    if any(not np.array_equal(one.ids[order], first.ids[orders[0]]) for one, order in zip(passes, orders, strict=True)):
        raise ResultError("the seeds answered different examples; expected the same ids in each")
    each = np.stack([one.scores[order] for one, order in zip(passes, orders, strict=True)])  # [seeds, n], by id
    scores = each.mean(axis=0)
    interval = statistics.interval_over_seeds(scores, [one.score for one in passes])
    return replace(
        first, score=100 * float(scores.mean()), interval=interval, ids=first.ids[orders[0]], scores=scores, more=_mean_more(passes),
        leaked=first.leaked, timing={},
    )  # fmt: skip


def _mean_more(passes: list[Pass]) -> dict[str, Any]:
    """Means of the further metrics that every seed has; their intervals are not combined."""
    names = [name for name in passes[0].more if all("score" in (one.more.get(name) or {}) for one in passes)]
    return {
        name: {"score": sum(one.more[name]["score"] for one in passes) / len(passes), "interval": None}
        for name in names
    }


def read_accuracy(
    results: Path, row: str, baseline: str, dataset: str, seed: int, baselines: dict[str, Any], official: str = ""
) -> AccuracyResult:
    """A row's folders under `results`.

    baselines: cache of passes before training, which rows share. official: dataset with the authors' own split.
    """
    problems: list[str] = []
    official_problems: list[str] = []
    official_log = results / "logs" / "evaluate" / "official" / f"{row}.log"
    found = AccuracyResult(
        read_work(results / "train" / row, results / "logs" / "train" / f"{row}.log", problems),
        read_work(results / "evaluate" / row, results / "logs" / "evaluate" / f"{row}.log", problems),
        read_work(
            results / "evaluate" / "base" / baseline,
            results / "logs" / "evaluate" / "base" / f"{baseline}.log",
            problems,
        ),
        read_work(results / "evaluate" / "official" / row, official_log, official_problems),
        problems=problems,
        official_problem="; ".join(official_problems),
    )

    def is_ours(settings: dict[str, Any], data: str = dataset) -> str | None:
        if settings.get("row") not in (None, "", row):
            return f"field `settings.row`: got {settings['row']!r}; expected {row!r}: a result of another row"
        if settings.get("dataset") not in (None, "", data):
            return f"field `settings.dataset`: got {settings['dataset']!r}; expected {data!r}: a result of other data"
        return None

    if found.baseline.manifest is not None:
        if baseline not in baselines:
            try:
                baselines[baseline] = read_pass(found.baseline.folder / "before", found.baseline.manifest, is_ours)
            except (ResultError, DataError, OSError) as error:
                baselines[baseline] = str(error)
        before = baselines[baseline]
        if isinstance(before, Pass):
            found.passes["before"] = before
        else:
            problems.append(before)
    if found.evaluate.manifest is not None:
        for name in ("after", "control"):
            folder = found.evaluate.folder / name
            if not folder.is_dir() and name == "control":
                continue
            try:
                found.passes[name] = read_pass(folder, found.evaluate.manifest, is_ours)
            except (ResultError, DataError, OSError) as error:
                problems.append(str(error))
    if official and found.official_work.manifest is not None:
        try:
            found.official = read_pass(
                found.official_work.folder / "after",
                found.official_work.manifest,
                lambda settings: is_ours(settings, official),
            )
        except (ResultError, DataError, OSError) as error:
            found.official_problem = str(error)
    compare_passes(found, seed)
    for name, target in (("settings.json", "settings"), ("observed.json", "observed"), ("census.json", "census")):
        path = found.train.folder / name
        if path.is_file():
            try:
                setattr(found, target, read_json(path))
            except ResultError as error:
                problems.append(str(error))
    found.curve = read_curve(found.train.folder / "metrics.jsonl", problems)
    return found


def compare_passes(found: AccuracyResult, seed: int) -> None:
    """Fill in `gain` and `looking` from the passes that are there."""
    after = found.passes.get("after")
    for name, target in (("before", "gain"), ("control", "looking")):
        other = found.passes.get(name)
        if after is not None and other is not None:
            try:
                setattr(found, target, compare(after, other, seed))
            except ResultError as error:
                found.problems.append(f"{found.evaluate.folder / name}: {error}")


def read_speed(results: Path, row: str) -> SpeedResult:
    """A speed row's folder."""
    problems: list[str] = []
    found = SpeedResult(
        read_work(results / "speed" / row, results / "logs" / "speed" / f"{row}.log", problems), problems=problems
    )
    if found.work.manifest is None:
        return found
    path = found.work.folder / "speed.json"
    try:
        speed = read_json(path)
        if speed.get("row") not in (None, row):
            raise ResultError(f"{path}: field `row`: got {speed['row']!r}; expected {row!r}: a result of another row")
        for name in ("images_per_second", "tokens_per_second", "step_seconds"):
            number(speed, name, path, 0)
        found.speed = speed
    except ResultError as error:
        problems.append(str(error))
    return found
