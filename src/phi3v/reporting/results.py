"""Reads and checks the result files of a run: contents of each row's folders, and missing or damaged files.

An unreadable file does not stop a report, but becomes a problem of its row. Scores are read one prediction at a time
and reduced to their comparison and a few examples, so that a million predictions fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from phi3v.data.conversations import DataError
from phi3v.evaluation import statistics
from phi3v.evaluation.questions import Record, scored_lines
from phi3v.provenance.manifest import Manifest, ResultError, read_json, scrub
from phi3v.settings import Dataset, SettingsError, dataset_key, validate

EXAMPLES_PER_ROW = 12
CURVE_POINTS = 300
LOG_LINES = 15
EXAMPLE_REJECTIONS = 10
T = TypeVar("T")
P = ParamSpec("P")
Point = dict[str, float | None]
"""One line of metrics.jsonl: step, epoch, loss, learning_rate, images_per_second …"""
Further = dict[str, dict[str, Any]]
"""Further metrics by name, each {"score", "interval"}, and the confusion matrix {"classes", "counts"}."""
Rate = Annotated[float, Field(ge=0)]


class ResultFile(BaseModel):
    """The fields of a job's file that the report reads. None: unknown."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Group(ResultFile):
    """The metric over a group of examples."""

    score: float = Field(ge=0, le=100)
    n: int = Field(ge=1)
    interval: tuple[float, float]


class Metrics(ResultFile):
    """metrics.json of an evaluation pass."""

    metric: str = ""
    score: float = Field(ge=0, le=100)
    n: int = Field(ge=1)
    interval: tuple[float, float]
    more: Further = {}
    groups: dict[str, Group] = {}
    cut: int = 0
    leaked: int | None = None


class Observed(ResultFile):
    """What a job ran with: observed.json, or part of speed.json."""

    activation_dtype: str | None = None
    attention_decoder: str | None = None
    attention_vision: str | None = None
    linear4bit_layers: int | None = None
    linear4bit_bytes: int | None = None
    zero_stage: int | None = None
    world_size: int | None = None
    nodes: int | None = None
    batch_size_per_gpu: int | None = None
    recompute_every: int | None = None
    peak_memory_bytes: float | None = None

    @property
    def code(self) -> str | None:
        """What identifies the code that ran, or None if unknown."""
        how = {"linear4bit_bytes", "batch_size_per_gpu", "recompute_every", "peak_memory_bytes"}
        return self.model_dump_json(exclude=how) if self.activation_dtype else None


class Window(ResultFile):
    """One timed window of a speed row."""

    images_per_second: float


class Speed(ResultFile):
    """speed.json."""

    images_per_second: Rate
    tokens_per_second: Rate
    step_seconds: Rate
    spread: float = 0.0
    """Fastest minus slowest window, divided by the median."""
    repeats: list[Window] = []
    world_size: int | None = None
    device: str | None = None
    stand_in: bool | None = None
    mfu: float | None = None
    hfu: float | None = None
    peak_source: str | None = None
    peak_memory_bytes: float | None = None
    reserved_memory_bytes: float | None = None
    context_memory_bytes: float | None = None
    fingerprint: dict[str, object] = {}


@dataclass
class Pass:
    """One evaluation pass of a row."""

    metric: str
    score: float
    n: int
    interval: tuple[float, float]
    more: Further
    groups: dict[str, Group]
    """Figures by value of the dataset's `group_by`."""
    cut: int
    """Answers that reached max_new_tokens."""
    leaked: int | None
    """Examples with a picture that is also in the training split."""
    ids: np.ndarray
    """Digests of the example ids, in the file's order."""
    scores: np.ndarray
    examples: list[Record]
    """Examples for the report, wrong and right ones."""


@dataclass(frozen=True)
class Work:
    """One job's folder: train, evaluate or speed."""

    folder: Path = Path()
    manifest: Manifest | None = None
    log: Path | None = None
    log_tail: Sequence[str] = ()

    @property
    def seconds(self) -> float | None:
        return None if self.manifest is None else self.manifest.get("seconds")


@dataclass
class Training:
    """Files of a training job besides its weights: settings.json, observed.json, census.json, lines of
    metrics.jsonl."""

    settings: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)


def attempt(problems: list[str], read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
    """The result of `read`. After an error, None, and the message is added to `problems`."""
    try:
        return read(*arguments, **options)
    except (ResultError, DataError, SettingsError, OSError) as error:
        problems.append(str(error))
        return None


def read_if_present(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object. None if the file is missing, or damaged and therefore a problem."""
    return attempt(problems, read_json, path) if path.is_file() else None


def read_work(folder: Path, log: Path, problems: list[str]) -> Work:
    """Manifest and log of a job's folder. Either can be missing."""
    manifest = cast(Manifest | None, read_if_present(folder / "manifest.json", problems))
    tail: list[str] = []
    if log.is_file() and manifest is None:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode("utf-8", errors="replace").replace("\r", "\n")
        tail = [scrub(line)[:300] for line in text.splitlines() if line.strip()][-LOG_LINES:]
    return Work(folder, manifest, log if log.is_file() else None, tail)


def read_training(folder: Path, problems: list[str]) -> Training:
    """Settings, observations, census and curve of a training job. Each can be missing."""
    settings, observed, census = (
        read_if_present(folder / f"{name}.json", problems) or {} for name in ("settings", "observed", "census")
    )
    return Training(settings, observed, census, read_curve(folder / "metrics.jsonl", problems))


def read_curve(path: Path, problems: list[str]) -> list[Point]:
    """Lines of a metrics.jsonl, thinned to CURVE_POINTS. Ignores an incomplete last line."""
    if not path.is_file():
        return []
    points: list[Point] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for at, line in enumerate(lines, 1):
        if at == len(lines) and not line.endswith(b"\n"):
            break
        try:
            point = json.loads(line)
            if "loss" in point:
                lost = {key for key, value in point.items() if isinstance(value, float) and not math.isfinite(value)}
                points.append({key: None if key in lost else value for key, value in point.items()})
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{path}:{at}: not a JSON object ({error}); expected step, loss, …")
            return points
    if len(points) > CURVE_POINTS:
        keep = np.unique(np.linspace(0, len(points) - 1, CURVE_POINTS).astype(int))
        points = [points[i] for i in keep]
    return points


def read_pass(folder: Path) -> Pass:
    """Metrics and predictions of a pass, checked against each other. Raises ResultError or DataError with file and
    field."""
    path = folder / "metrics.json"
    metrics = validate(Metrics, read_json(path), str(path))
    predictions = folder / "predictions.jsonl"
    ids, orders, scores = [], [], []
    for identifier, score in scored_lines(predictions):
        # 64 bits of an id are sufficient to pair examples, and save memory.
        ids.append(int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "big"))
        orders.append(zlib.crc32(identifier.encode()))
        scores.append(score)
    if len(scores) != metrics.n:
        seen = f"predictions.jsonl has {len(scores)} lines; expected equal numbers"
        raise ResultError(f"{path}: field `n`: got {metrics.n}, {seen}")
    mean = 100 * math.fsum(scores) / metrics.n
    if abs(mean - metrics.score) > 0.01:
        seen = f"but predictions.jsonl gives {mean:.4f}; evaluate this row again"
        raise ResultError(f"{path}: field `score`: got {metrics.score}, {seen}")
    examples = _examples(predictions, np.asarray(orders), np.asarray(scores))
    return Pass(**dict(metrics), ids=np.asarray(ids, dtype=np.uint64), scores=np.asarray(scores), examples=examples)


def _examples(path: Path, orders: np.ndarray, scores: np.ndarray) -> list[Record]:
    """Wrong and right answers, half of each if possible, in a fixed order, so that rows tend to show the same
    examples."""
    first = np.argsort(orders, kind="stable")
    wrong, right = first[scores[first] < 0.5], first[scores[first] >= 0.5]
    half = EXAMPLES_PER_ROW // 2
    chosen = [*wrong[: max(half, EXAMPLES_PER_ROW - len(right))], *right[: max(half, EXAMPLES_PER_ROW - len(wrong))]]
    wanted = {int(at) for at in chosen}
    with path.open("rb") as file:
        lines = {at: line for at, line in enumerate(file) if at in wanted}
    return [json.loads(lines[at]) for at in chosen[:EXAMPLES_PER_ROW]]


def check_owner(work: Work, row: str, dataset: str) -> None:
    """Raises ResultError if a folder's manifest belongs to another row or dataset."""
    settings = (work.manifest or {}).get("settings", {})
    for name, expected, of in (("row", row, "another row"), ("dataset", dataset, "other data")):
        if settings.get(name) not in (None, "", expected):
            raise ResultError(
                f"{work.folder / 'manifest.json'}: field `settings.{name}`: got {settings[name]!r}; expected "
                f"{expected!r}; "
                f"this result belongs to {of}"
            )


def compare(left: Pass, right: Pass, seed: int) -> statistics.Comparison:
    """Left minus right over the common examples. Raises ResultError if there are none."""
    _, at_left, at_right = np.intersect1d(left.ids, right.ids, assume_unique=True, return_indices=True)
    if not at_left.size:
        raise ResultError("the two passes share no example id; expected the same examples")
    # Sorted by id, so that the interval does not depend on the order of the files.
    return statistics.paired(left.scores[at_left], right.scores[at_right], seed)


def mean_over_seeds(passes: list[Pass]) -> Pass:
    """A pass whose score of each example is the mean over the seeds. Its example answers are the first seed's.

    The interval covers both the examples and the seeds: `statistics.interval_over_seeds`. Raises ResultError unless all
    seeds answered the same examples.
    """
    first = passes[0]
    orders = [np.argsort(one.ids, kind="stable") for one in passes]
    if any(not np.array_equal(one.ids[order], first.ids[orders[0]]) for one, order in zip(passes, orders, strict=True)):
        raise ResultError("the seeds answered different examples; expected the same ids in each")
    each = np.stack([one.scores[order] for one, order in zip(passes, orders, strict=True)])  # [seeds, n], by id
    scores = each.mean(axis=0)
    more: Further = {}
    for name in first.more:
        further = [one.more[name]["score"] for one in passes if "score" in one.more.get(name, {})]
        if len(further) == len(passes):  # intervals of further metrics cannot be combined
            more[name] = {"score": sum(further) / len(passes), "interval": None}
    interval = statistics.interval_over_seeds(scores, [one.score for one in passes])
    score = 100 * float(scores.mean())
    ids, cut = first.ids[orders[0]], max(one.cut for one in passes)
    return replace(first, score=score, interval=interval, ids=ids, scores=scores, more=more, cut=cut, groups={})


@dataclass
class DataSection:
    """A dataset: contents of dataset.json and statistics.json, or the reason why they are missing."""

    name: str
    entry: Dataset
    rows: int
    """Number of the run's rows that use it. 0: an official split."""
    problem: str
    facts: dict[str, Any]
    """dataset.json."""
    statistics: dict[str, dict[str, Any]]
    rejections: list[str]
    """The first rejected source rows, each with its reason."""

    def of(self, name: str) -> dict[str, dict[str, Any]]:
        """A field of dataset.json by split: splits, leakage, source."""
        return _objects(self.facts.get(name))


def data_folder(name: str, entry: Dataset, results: Path) -> Path:
    """Folder of a converted dataset. results: results/NAME."""
    return results.parent / "data" / dataset_key(name, entry)


def read_dataset(name: str, entry: Dataset, rows: int, results: Path) -> DataSection:
    """Facts about a dataset from its data folder. rows: number of the run's rows that use it."""
    folder = data_folder(name, entry, results)
    problems: list[str] = []
    facts = read_if_present(folder / "dataset.json", problems)
    if facts is None and not problems:
        missing = entry.missing_source()
        problems.append("not converted yet" if rows or missing is None else f"not present: {missing}")
    counted = read_if_present(folder / "statistics.json", problems)
    rejected = _rejections(folder / "rejected.jsonl")
    return DataSection(name, entry, rows, problems[-1] if problems else "", facts or {}, _objects(counted), rejected)


def _objects(value: object) -> dict[str, dict[str, Any]]:
    """The members of an object that are objects."""
    return {key: item for key, item in value.items() if isinstance(item, dict)} if isinstance(value, dict) else {}


def _rejections(path: Path) -> list[str]:
    found: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line, _ in zip(file, range(EXAMPLE_REJECTIONS), strict=False):
                try:
                    item = json.loads(line)
                    found.append(f"{item.get('split', '')}: {item.get('where', '')}: {item.get('reason', '')}"[:300])
                except (ValueError, AttributeError):
                    found.append(line.strip()[:300])
    return found
