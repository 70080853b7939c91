"""The columns of accuracy.tsv, speed.tsv and report.json, and the grouping and wording of both tables' lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from phi3v.evaluation.statistics import Comparison
from phi3v.planning.memory import GB
from phi3v.provenance.manifest import ResultError, read_json
from phi3v.reporting.join import AccuracyLine, AnyLine, SpeedLine, Tables
from phi3v.reporting.results import Pass, Speed

METHODS = {"full": "full", "frozen": "vision frozen", "lora": "LoRA", "qlora": "QLoRA"}
DTYPES = ["bf16", "fp16", "fp32"]
OFFICIAL_METRICS = ("official_anls", "consistency", "auroc")
"""Metrics of the datasets' authors, which metrics.json contains in addition to the recipe's metric."""

LineT = TypeVar("LineT", bound=AnyLine)
PartT = TypeVar("PartT")
Cell = str | float | None
Column = tuple[str, Callable[[LineT], Cell]]
Figure = tuple[str, float, Sequence[float] | None]
"""(metric, score, interval)."""


def official_figures(line: AccuracyLine) -> list[Figure]:
    """The figures on the authors' own split, starting with their metric. [] if it is not done."""
    found = line.passes.get("official")
    if found is None:
        return []
    ours: Figure = (found.metric, found.score, found.interval)
    for name in OFFICIAL_METRICS:
        further = found.more.get(name, {})
        if "score" in further:
            return [(name, further["score"], further.get("interval")), ours]
    return [ours]


def requested(line: AnyLine) -> str:
    """Dtype and attention kernel that the table requests."""
    return f"{line.row.dtype}, {attention(line)}"


def attention(line: AnyLine) -> str:
    """The attention kernel that the table requests."""
    return "flash" if line.row.flash_attention else "eager"


def chosen(line: SpeedLine) -> str:
    """Micro-batch and recomputation of a row that accompanies a published one. Empty for a published row."""
    if not line.row.accompanies:
        return ""
    size, every = line.observed.batch_size_per_gpu, line.observed.recompute_every
    if size is None or every is None:
        return f"ours: micro-batch {line.row.micro_batch_size}, recompute {plain(line.row.gradient_checkpointing)}"
    return f"ours: micro-batch {size}, recompute {'none' if not every else 'all' if every == 1 else f'1 of {every}'}"


def departures(line: AnyLine) -> str:
    """All fields that the run changed, with the table's value."""
    return "; ".join(f"{name} {plain(old)} -> {plain(new)}" for name, (old, new) in line.departures.items())


def plain(value: object) -> str:
    """A setting as users write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ",".join(plain(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of(part: Callable[[LineT], PartT | None], get: Callable[[PartT], Cell]) -> Callable[[LineT], Cell]:
    """A cell from a part of the line. Empty if the part does not exist."""

    def cell(line: LineT) -> Cell:
        found = part(line)
        return None if found is None else get(found)

    return cell


def _pass(name: str, get: Callable[[Pass], Cell]) -> Callable[[AccuracyLine], Cell]:
    return _of(lambda line: line.passes.get(name), get)


def _further(name: str) -> Callable[[AccuracyLine], Cell]:
    return _pass("after", lambda after: after.more.get(name, {}).get("score"))


def _minus(name: str) -> list[Column[AccuracyLine]]:
    """The columns of the score after training minus the score of another pass."""
    parts: list[tuple[str, Callable[[Comparison], Cell]]] = [
        ("", lambda found: found.difference),
        ("_low", lambda found: found.interval[0]),
        ("_high", lambda found: found.interval[1]),
        ("_p", lambda found: found.p),
    ]
    return [(f"after_minus_{name}{end}", _of(lambda line: line.after_minus.get(name), get)) for end, get in parts]


def _first_official(get: Callable[[Figure], Cell]) -> Callable[[AccuracyLine], Cell]:
    return _of(lambda line: next(iter(official_figures(line)), None), get)


def _speed(get: Callable[[Speed], Cell]) -> Callable[[SpeedLine], Cell]:
    return _of(lambda line: line.speed, get)


def _in_gb(size: float | None) -> float | None:
    return size / GB if size else None


ROW_COLUMNS: list[Column[AnyLine]] = [
    ("row", lambda r: r.row.row),
    ("model", lambda r: r.row.model),
    ("dataset", lambda r: r.row.dataset),
    ("method", lambda r: r.row.method),
    ("dtype", lambda r: r.row.dtype),
]
DIFFERENCE_COLUMNS: list[Column[AnyLine]] = [
    ("not_distinguished_from", lambda r: " ".join(r.same_as)),
    ("departures", departures),
]
STATE_COLUMNS: list[Column[AnyLine]] = [
    ("status", lambda r: r.state.status),
    ("reason", lambda r: r.state.reason),
    ("note", lambda r: r.row.note),
]

ACCURACY_COLUMNS: list[Column[AccuracyLine]] = [
    *ROW_COLUMNS,
    ("metric", _pass("after", lambda after: after.metric)),
    ("before", lambda r: r.score("before")),
    ("after", lambda r: r.score("after")),
    ("control", lambda r: r.score("control")),
    ("n", _pass("after", lambda after: after.n)),
    ("cut", _pass("after", lambda after: after.cut)),
    ("published", lambda r: r.row.published),
    ("after_low", _pass("after", lambda after: after.interval[0])),
    ("after_high", _pass("after", lambda after: after.interval[1])),
    *_minus("before"),
    *_minus("control"),
    ("after_minus_published", lambda r: r.verdict.against.difference if r.verdict.against else None),
    ("verdict", lambda r: r.verdict.text),
    ("verdict_reason", lambda r: r.verdict.reason),
    ("official_anls", _further("official_anls")),
    ("auroc", _further("auroc")),
    ("consistency", _further("consistency")),
    ("leaked", _pass("after", lambda after: after.leaked)),
    ("official_split", lambda r: r.official.status),
    ("official_metric", _first_official(lambda figure: figure[0])),
    ("official_score", _first_official(lambda figure: figure[1])),
    ("official_low", _first_official(lambda figure: figure[2][0] if figure[2] else None)),
    ("official_high", _first_official(lambda figure: figure[2][1] if figure[2] else None)),
    (
        "official_accuracy",
        _pass("official", lambda official: official.score if official.metric == "accuracy" else None),
    ),
    ("official_n", _pass("official", lambda official: official.n)),
    ("official_leaked", _pass("official", lambda official: official.leaked)),
    ("seeds", lambda r: " ".join(str(job.job.seed) for job in r.jobs if job.job)),
    ("after_of_each_seed", lambda r: " ".join(f"{score:.2f}" for score in r.seed_scores)),
    ("after_sd_over_seeds", lambda r: r.spread["sd"] if r.spread else None),
    ("origin", lambda r: r.row.origin),
    ("source", lambda r: r.row.source),
    ("asked_attention", attention),
    ("observed_dtype", lambda r: r.observed.activation_dtype),
    ("observed_attention", lambda r: r.observed.attention_decoder),
    ("linear4bit_layers", lambda r: r.observed.linear4bit_layers),
    ("linear4bit_bytes", lambda r: r.observed.linear4bit_bytes),
    *DIFFERENCE_COLUMNS,
    *STATE_COLUMNS,
]

# Only in report.json, because accuracy.tsv has the same bytes when a run is repeated.
ACCURACY_TIMES: list[Column[AccuracyLine]] = [
    ("train_seconds", lambda r: r.train_seconds),
    ("evaluate_seconds", lambda r: r.evaluate.seconds),
    ("gpu_hours", lambda r: r.device_hours),
]

SPEED_COLUMNS: list[Column[SpeedLine]] = [
    *ROW_COLUMNS,
    ("flash_attention", lambda r: plain(r.row.flash_attention)),
    ("hardware", lambda r: r.row.hardware),
    ("nodes", lambda r: r.row.nodes),
    ("gpus", lambda r: r.gpus),
    ("images_per_second", lambda r: r.rate),
    ("published_images_per_second", lambda r: r.row.published_images_per_second),
    ("speedup", lambda r: r.speedup),
    ("published_speedup", lambda r: r.row.published_speedup),
    ("tokens_per_second", _speed(lambda speed: speed.tokens_per_second)),
    ("tokens_per_second_per_device", lambda r: r.tokens_each),
    ("step_seconds", _speed(lambda speed: speed.step_seconds)),
    ("images_per_second_low", lambda r: r.spread["low"] if r.spread else None),
    ("images_per_second_high", lambda r: r.spread["high"] if r.spread else None),
    ("mfu", _speed(lambda speed: speed.mfu)),
    ("hfu", _speed(lambda speed: speed.hfu)),
    ("peak_memory_gb", _speed(lambda speed: _in_gb(speed.peak_memory_bytes))),
    ("reserved_memory_gb", _speed(lambda speed: _in_gb(speed.reserved_memory_bytes))),
    ("context_memory_gb", _speed(lambda speed: _in_gb(speed.context_memory_bytes))),
    ("published_memory_gb", lambda r: r.row.published_memory_gb),
    ("accompanies", lambda r: r.row.accompanies),
    ("batch_size_per_gpu", lambda r: r.observed.batch_size_per_gpu),
    ("recompute_every", lambda r: r.observed.recompute_every),
    ("processes", _speed(lambda speed: speed.world_size)),
    ("device", _speed(lambda speed: speed.device)),
    ("stand_in", _speed(lambda speed: None if speed.stand_in is None else plain(speed.stand_in))),
    ("verdict", lambda r: r.verdict.text),
    ("verdict_reason", lambda r: r.verdict.reason),
    ("observed_dtype", lambda r: r.observed.activation_dtype),
    ("observed_attention", lambda r: r.observed.attention_decoder),
    *DIFFERENCE_COLUMNS,
    ("seconds", lambda r: r.work.seconds),
    *STATE_COLUMNS,
]


def as_records(lines: Sequence[LineT], columns: Sequence[Column[LineT]]) -> list[dict[str, Cell]]:
    """The lines as plain values, one dict per line. NaN and infinity become None."""
    records = [{name: get(line) for name, get in columns} for line in lines]
    return [{name: value if is_finite(value) else None for name, value in record.items()} for record in records]


def is_finite(value: Cell) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def as_tsv(records: list[dict[str, Cell]], columns: Sequence[Column[LineT]]) -> str:
    """Tab-separated text with a header. Numbers have at most four decimals; a missing value is an empty cell."""
    out = ["\t".join(name for name, _ in columns)]
    out += ["\t".join(_cell(record[name]) for name, _ in columns) for record in records]
    return "\n".join(out) + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return " ".join(str(value).split())


def by_dataset_and_model(lines: Sequence[AccuracyLine]) -> dict[tuple[str, str], list[AccuracyLine]]:
    """Lines by (dataset, model) in order of first occurrence, and within a group in the recipe's order of methods and
    dtypes."""
    groups: dict[tuple[str, str], list[AccuracyLine]] = {}
    for line in lines:
        groups.setdefault((line.row.dataset, line.row.model), []).append(line)
    for group in groups.values():
        group.sort(key=lambda line: (list(METHODS).index(line.row.method), DTYPES.index(line.row.dtype)))
    return groups


def by_hardware(lines: list[SpeedLine]) -> dict[str, list[SpeedLine]]:
    """Lines by the published hardware."""
    groups: dict[str, list[SpeedLine]] = {}
    for line in lines:
        groups.setdefault(line.row.hardware, []).append(line)
    return groups


PLAN_COLUMNS = ["row", "plan", "hours planned", "hours measured", "images/s planned", "images/s measured"]
PLAN_COLUMNS += ["allocated GB planned", "allocated GB measured"]


def plan(tables: Tables, results: Path) -> list[list[Cell]]:
    """The plan (results/NAME/plan/plan.json) and the measurements, in PLAN_COLUMNS. Empty if there is no plan.

    A row's hours are those of one seed's job: training and the three passes, including the one before training.
    """
    try:
        planned = {entry["row"]: entry for entry in read_json(results / "plan" / "plan.json")["rows"]}
    except (ResultError, KeyError, TypeError):
        return []
    found: list[list[Cell]] = []
    for line in tables.jobs:
        if line.row.row in planned:
            entry = planned[line.row.row]
            seconds, rate, peak = _measured(line)
            hours, allocated = seconds / 3600 if seconds else None, peak / GB if peak else None
            cells = [line.row.row, entry.get("status"), entry.get("hours"), hours, entry.get("images_per_second"), rate]
            found.append([*cells, entry.get("allocated_gb"), allocated])
    return found


def _measured(line: AnyLine) -> tuple[float | None, float | None, float | None]:
    """(seconds, images/s, bytes at the peak) of a job. The rate of a training job is the median over its steps."""
    if isinstance(line, SpeedLine):
        return line.work.seconds, line.rate, line.speed.peak_memory_bytes if line.speed else None
    parts = [work.seconds for work in (line.baseline, line.train, line.evaluate)]
    present = [part for part in parts if part is not None]
    rates = sorted(rate for point in line.training.curve if (rate := point.get("images_per_second")))
    median = rates[len(rates) // 2] if rates else None
    return sum(present) if len(present) == len(parts) else None, median, line.observed.peak_memory_bytes
