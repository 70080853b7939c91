"""Computes metrics.json of a pass, and scores predictions again by other metrics or by the user's own functions."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from phi3v.data.conversations import DataError
from phi3v.evaluation import statistics
from phi3v.evaluation.metrics import (
    BINARY,
    Confusion,
    auroc,
    auroc_of_places,
    character_edits,
    confusion,
    consistency,
    json_fields,
    json_leaves,
    json_object,
    normalise,
    score,
    word_edits,
)
from phi3v.evaluation.questions import Record, json_lines
from phi3v.provenance.manifest import read_json, write_atomically, write_json, write_manifest
from phi3v.settings import ScoreSettings


class Figure(TypedDict):
    """A metric, 0-100, with its interval."""

    score: float
    interval: list[float]


class Field(TypedDict):
    """Metrics of a field of JSON answers, 0-100."""

    accuracy: float
    """Share of examples with the field for which all values are right."""
    f1: float
    n: int
    """Number of examples whose answer has the field."""


class Fields(TypedDict):
    """Metrics of JSON answers by field."""

    invalid: int
    """Number of predictions that are not a JSON object."""
    fields: dict[str, Field]


class Group(Figure):
    """The metric over a group of examples."""

    n: int


class Summary(TypedDict):
    """metrics.json of a pass."""

    metric: str
    score: float
    n: int
    interval: list[float]
    more: dict[str, Figure | Confusion | Fields]
    """Further metrics: the requested ones, and those that the examples allow."""
    cut: NotRequired[int]
    """Number of answers that reached max_new_tokens. Missing if there are none."""
    groups: NotRequired[dict[str, Group]]
    left_out: NotRequired[int]
    leaked: NotRequired[int | None]


def figure(metric: str, scores: Sequence[float], seed: int) -> Figure:
    """Mean of 0-1 scores, as 0-100: Wilson's interval if answers are right or wrong, a bootstrap for graded ones."""
    binary = metric.partition("@")[0] in BINARY or (":" in metric and set(scores) <= {0.0, 1.0})
    right = math.fsum(scores)
    interval = statistics.wilson(round(right), len(scores)) if binary else statistics.bootstrap(scores, seed)
    return _rounded(100.0 * right / len(scores), interval)


def _rounded(value: float, interval: statistics.Interval) -> Figure:
    return {"score": round(value, 4), "interval": [round(bound, 4) for bound in interval]}


def summarise(records: Sequence[Record], metrics: Sequence[str], seed: int, group_by: str = "") -> Summary:
    """Computes metrics.json of a pass. metrics: the main one first. group_by: name of a field of the examples'
    `meta`."""
    main, *others = metrics
    scores = [record["score"] for record in records]
    more: dict[str, Figure | Confusion | Fields] = {
        name: figure(name, [record["scores"][name] for record in records], seed) for name in others
    }
    for name in metrics:
        if name == "anls":
            official = [score("official_anls", record["prediction"], record["answers"]) for record in records]
            more["official_anls"] = figure("official_anls", official, seed)
        elif name == "cer":
            more["character_error_rate"] = _error_rate(records, character_edits, seed)
        elif name == "wer":
            more["word_error_rate"] = _error_rate(records, word_edits, seed)
        elif name == "json_fields":
            more |= _of_fields(records, seed)
    if main in ("accuracy", "contained", "multiple_choice") or ":" in main:
        more |= _of_classes(records, seed)
    found = figure(main, scores, seed)
    summary: Summary = {
        "metric": main, "score": found["score"], "n": len(scores), "interval": found["interval"], "more": more
    }  # fmt: skip
    if cut := sum(record.get("cut", False) for record in records):
        summary["cut"] = cut
    if group_by:
        groups: dict[str, list[float]] = defaultdict(list)
        for record in records:
            groups[record.get("meta", {}).get(group_by, "")].append(record["score"])
        summary["groups"] = {name: {"n": len(own), **figure(main, own, seed)} for name, own in sorted(groups.items())}
    return summary


def _ratio(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Figure:
    """100 times the sum of parts divided by the sum of wholes, with an interval over the examples. 0 / 0 counts as
    0."""

    def ratio(part: np.ndarray, whole: np.ndarray) -> float:
        return 100.0 * float(part.sum() / max(whole.sum(), 1))

    interval = statistics.bootstrap_paired(ratio, parts, wholes, seed)
    return _rounded(ratio(np.asarray(parts), np.asarray(wholes)), interval)


def _error_rate(records: Sequence[Record], edits: Callable[[str, str], tuple[int, int]], seed: int) -> Figure:
    """Edits divided by the characters or words of all answers, in percent. Lower is better, and more than 100 is
    possible."""
    pairs = [
        min((edits(record["prediction"], answer) for answer in record["answers"]), key=lambda pair: pair[0] / pair[1])
        for record in records
    ]
    return _ratio([errors for errors, _ in pairs], [length for _, length in pairs], seed)


def _of_fields(records: Sequence[Record], seed: int) -> dict[str, Figure | Confusion | Fields]:
    """F1 over all pairs of the dataset (Donut's), and accuracy and F1 of each field."""
    parts, wholes = [], []
    # By field: examples with it, examples with all of it right, pairs in predictions or answers, pairs in both.
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in records:
        answer = max(record["answers"], key=lambda answer: json_fields(record["prediction"], answer))
        said, true = json_leaves(record["prediction"]), json_leaves(answer)
        parts.append(2 * (said & true).total())
        wholes.append(said.total() + true.total())
        wrong = {field for field, _ in (said - true) + (true - said)}
        for field in {field for field, _ in true}:
            counts[field][0] += 1
            counts[field][1] += field not in wrong
        for pairs, both in ((said, 0), (true, 0), (said & true, 1)):
            for (field, _), count in pairs.items():
                counts[field][2 + both] += count
    fields: dict[str, Field] = {
        name: {"accuracy": round(100 * right / n, 4) if n else 0.0, "f1": round(200 * both / size, 4), "n": n}
        for name, (n, right, size, both) in sorted(counts.items())
    }
    invalid = sum(json_object(record["prediction"]) is None for record in records)
    return {"micro_f1": _ratio(parts, wholes, seed), "fields": {"invalid": invalid, "fields": fields}}


_NLVR2_ID = re.compile(r"([^-]+-[^-]+)-[^-]+(-[^-]+)")
"""SPLIT-SET-PAIR-SENTENCE. The id without its pair identifies the sentence."""


def _of_classes(records: Sequence[Record], seed: int) -> dict[str, Figure | Confusion | Fields]:
    """AUROC of yes/no answers, NLVR2's consistency, and a confusion matrix, if the examples define them."""
    more: dict[str, Figure | Confusion | Fields] = {}
    truths = [normalise(record["answers"][0]) for record in records]
    if set(truths) == {"yes", "no"} and all("p_yes" in record for record in records):
        positive, shares = [truth == "yes" for truth in truths], [record["p_yes"] for record in records]
        places = np.unique(shares, return_inverse=True)[1]
        interval = statistics.bootstrap_paired(auroc_of_places, positive, places, seed)
        more["auroc"] = _rounded(auroc(positive, shares), interval)
    matches = [_NLVR2_ID.fullmatch(record["id"]) for record in records]
    sentences = [found[1] + found[2] for found in matches if found]
    if len(sentences) == len(records) and len(set(sentences)) < len(sentences):
        right, n = consistency(sentences, [record["score"] == 1 for record in records])
        more["consistency"] = _rounded(100.0 * right / n, statistics.wilson(right, n))
    if 2 < len(set(truths)) <= 50:
        more["confusion"] = confusion([r["answers"][0] for r in records], [r["prediction"] for r in records])
    return more


def own_scores(metric: str, records: Sequence[Record]) -> list[float]:
    """Scores by a user's function FILE.py:FUNCTION: `score(predictions: list[dict]) -> list[float]`, each in 0-1.

    Raises DataError if the file or function does not exist, if the number of scores differs, or if a score is not in
    0-1.
    """
    path, _, name = metric.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(
            f"metric {metric}: {path}: no such file; expected FILE.py:FUNCTION, relative to the working directory"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise DataError(
            f"metric {metric}: {path} has no function {name}; define {name}(predictions), which returns a list of "
            "scores"
        )
    scores = list(function([dict(record) for record in records]))
    if len(scores) != len(records):
        raise DataError(
            f"metric {metric}: returned {len(scores)} scores of {len(records)} predictions; expected one for each"
        )
    for record, value in zip(records, scores, strict=True):
        if not isinstance(value, float | int | np.number) or not 0 <= value <= 1:
            raise DataError(f"metric {metric}: id {record['id']!r}: got {value!r}; expected a number in 0-1")
    return [float(value) for value in scores]


def _scores(metric: str, records: Sequence[Record]) -> list[float]:
    if ":" in metric:
        return own_scores(metric, records)
    return [score(metric, record["prediction"], record["answers"]) for record in records]


def set_scores(records: Sequence[Record], metrics: Sequence[str]) -> None:
    """Sets each record's score by the main metric, and its scores by the others. Raises the same errors as
    own_scores."""
    columns = [[round(value, 6) for value in _scores(name, records)] for name in metrics]
    for record, (main, *others) in zip(records, zip(*columns, strict=True), strict=True):
        record["score"] = main
        record.pop("scores", None)
        if others:
            record["scores"] = dict(zip(metrics[1:], others, strict=True))


def _read(path: Path) -> list[Record]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def rescore(settings: ScoreSettings) -> dict[str, Summary]:
    """Scores the predictions of an evaluation without a model. Writes predictions.jsonl and metrics.json of each pass.

    Writes a manifest too if the output folder differs. Raises DataError if there are no passes, and own_scores' errors.
    """
    started, source = time.perf_counter(), Path(settings.input_dir)
    output = Path(settings.output_dir or source)
    found: dict[str, Summary] = {}
    for path in sorted(source.glob("*/metrics.json")):
        before = read_json(path)
        folder = output / path.parent.name
        if "not_applicable" in before:
            write_json(folder / "metrics.json", before)
            continue
        records = _read(path.with_name("predictions.jsonl"))
        set_scores(records, settings.metrics)
        summary = summarise(records, settings.metrics, settings.seed, settings.group_by)
        if "left_out" in before:
            summary["left_out"] = before["left_out"]
        if "leaked" in before:
            summary["leaked"] = before["leaked"]
        write_atomically(folder / "predictions.jsonl", json_lines(records))
        write_json(folder / "metrics.json", summary)
        found[path.parent.name] = summary
        if settings.compare:
            _compare(records, settings, folder)
    if not found:
        raise DataError(f"{source}: contains no PASS/metrics.json; expected a result folder of scripts/evaluate.py")
    if output != source:
        manifest = {"evaluation": str(source)}
        seconds = time.perf_counter() - started
        write_manifest(
            output, kind="score", settings=settings, inputs=manifest, seed=settings.seed, seconds=seconds, device="CPU"
        )
    return found


def _compare(records: Sequence[Record], settings: ScoreSettings, folder: Path) -> None:
    """Prints the paired difference of each metric from another pass."""
    others = {record["id"]: record for record in _read(Path(settings.compare) / "predictions.jsonl")}
    ours = [record for record in records if record["id"] in others]
    if not ours:
        raise DataError(
            f"--compare {settings.compare}: has no example id in common with {folder}; expected a pass on the same "
            "examples"
        )
    theirs = [others[record["id"]] for record in ours]
    for name in settings.metrics:
        found = statistics.paired(_scores(name, ours), _scores(name, theirs), settings.seed)
        p = "" if found.p is None else f", p = {found.p:.4g}"
        low, high = found.interval
        print(
            f"{folder} minus {settings.compare}: {name} {found.difference:+.2f} [{low:.2f}, {high:.2f}], n = "
            f"{found.n}{p}"
        )
