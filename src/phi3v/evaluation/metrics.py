"""Scores of answers, each with its source, and metrics.json of a pass.

The score of one answer is 0-1 and higher is better; a metric over a dataset is 0-100. `accuracy` and `anls` are the recipe's own
(PhiCookBook, FineTuning_Vision.md, its scripts); the others follow the papers named in their docstrings.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from rapidfuzz.distance import Levenshtein

from phi3v.data.conversations import DataError
from phi3v.evaluation import statistics
from phi3v.evaluation.predictions import Record, json_lines
from phi3v.provenance.manifest import read_json, write_atomically, write_json, write_manifest
from phi3v.settings import ScoreSettings

Score = Callable[[str, str], float]
"""Score of a prediction by one accepted answer."""


class Figure(TypedDict):
    """A metric, 0-100, with its interval."""

    score: float
    interval: list[float]


class Confusion(TypedDict):
    """A confusion table."""

    classes: list[str]
    counts: list[list[int]]
    """Rows are true classes, columns predicted ones and, last, any other answer."""


class Field(TypedDict):
    """A field of JSON answers, 0-100."""

    accuracy: float
    """Share of the examples whose answer has the field for which all its values are right."""
    f1: float
    n: int
    """Examples whose answer has the field."""


class Fields(TypedDict):
    """What JSON answers hold, field by field."""

    invalid: int
    """Predictions that are not a JSON object."""
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
    """Further metrics: those that were asked for, and those that the examples allow."""
    cut: NotRequired[int]
    """Answers that reached max_new_tokens; missing: none did."""
    groups: NotRequired[dict[str, Group]]
    left_out: NotRequired[int]
    leaked: NotRequired[int | None]


def normalise(text: str) -> str:
    """The recipe's form of an answer before it is compared: no outer white space, no outer full stops, lower case."""
    return text.strip().strip(".").lower()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are equal after `normalise`, else 0.0 (recipe: NLVR2, Hateful Memes, UCF-101)."""
    return float(normalise(prediction) == normalise(answer))


def contained(prediction: str, answer: str) -> float:
    """1.0 if the answer stands anywhere in the prediction, whatever its case (Liu et al., "OCRBench", 2024, section 3)."""
    return float(" ".join(answer.lower().split()) in " ".join(prediction.lower().split()))


def anls(prediction: str, answer: str) -> float:
    """Normalised Levenshtein similarity as the recipe's script computes it.

    1 - NL where NL < 0.5, else 0; case counts; an empty prediction scores 0.
    """
    distance = Levenshtein.normalized_distance(prediction, answer)
    return 1.0 - distance if prediction and distance < 0.5 else 0.0


def official_anls(prediction: str, answer: str) -> float:
    """ANLS of one answer as the DocVQA server computes it.

    Lower case, white space collapsed; 1 - NL where that is at least the threshold 0.5, else 0 (Biten et al., "Scene Text Visual Question
    Answering", ICCV 2019, equation 1, and the evaluation script of rrc.cvc.uab.es task 17, which keeps a similarity of exactly 0.5 where
    the recipe drops it, and divides the distance by the length of the longer text as it was written, in upper case: white space that was
    collapsed still counts there, and a sharp s counts twice).
    """
    longest = max(len(answer.upper()), len(prediction.upper()))
    distance = Levenshtein.distance(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
    similarity = 1.0 - distance / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def edit_similarity(prediction: str, answer: str) -> float:
    """1 - edit distance over the longer text's length; for formulae and pages (Blecher et al., "Nougat", ICLR 2024, section 5.1)."""
    return Levenshtein.normalized_similarity(prediction.strip(), answer.strip())


def _edits(prediction: Sequence[str], answer: Sequence[str]) -> tuple[int, int]:
    """(edits, length of the answer)."""
    return Levenshtein.distance(prediction, answer), len(answer)


def _character_edits(prediction: str, answer: str) -> tuple[int, int]:
    return _edits(prediction.strip(), answer.strip())


def _word_edits(prediction: str, answer: str) -> tuple[int, int]:
    return _edits(prediction.split(), answer.split())


def _without_errors(edits: Callable[[str, str], tuple[int, int]], prediction: str, answer: str) -> float:
    """1 - the answer's error rate, at least 0. Error rate: edits over the answer's characters or words (Morris et al., Interspeech 2004)."""
    errors, length = edits(prediction, answer)
    return max(0.0, 1.0 - errors / length) if length else float(not errors)


_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number of a text: `1,234.5 kg` is 1234.5, `30%` is 30; None without one.

    A prediction's last number counts, as in lm-evaluation-harness' flexible extraction (GSM8K).
    """
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None


def numeric(prediction: str, answer: str, tolerance: str = "0") -> float:
    """1.0 if the last numbers of both texts differ by at most the tolerance: `0.5` in the answer's unit, `2%` of the answer."""
    said, true = last_number(prediction), last_number(answer)
    if said is None or true is None:
        return 0.0
    allowed = abs(true) * float(tolerance[:-1]) / 100 if tolerance.endswith("%") else float(tolerance)
    return float(abs(said - true) <= allowed + 1e-9 * max(allowed, abs(true)))  # 1.1 - 1.0 is more than 0.1


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """ChartQA's: numbers within 5 % of the answer, a percentage as its fraction; other texts equal whatever their case.

    Masry et al., "ChartQA", Findings of ACL 2022, section 5, after Methani et al., "PlotQA", WACV 2020.
    """

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    prediction, answer = prediction.strip(), answer.strip()
    said, true = number(prediction), number(answer)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= 0.05)
    return float(prediction.lower() == answer.lower())


_LETTER = re.compile(r"\W*([A-Za-z])(?:[).:,\]]|\s*$)")
_STATED_LETTER = re.compile(r"\b(?:answer|option|choice)(?: is)?:?\s*\(?([A-Z])\b", re.IGNORECASE)


def choice_letter(text: str) -> str | None:
    """The letter of a multiple-choice answer, in upper case: `B`, `(b)`, `B. a boat`, `The answer is B`; None without one."""
    found = _LETTER.match(text) or _STATED_LETTER.search(text)
    return found[1].upper() if found else None


def multiple_choice(prediction: str, answer: str) -> float:
    """1.0 if both name the same letter (Lu et al., "ScienceQA", NeurIPS 2022; the letter is read as in LLaVA's evaluation)."""
    said = choice_letter(prediction)
    return float(said is not None and said == choice_letter(answer))


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not JSON")
    return value


def json_object(text: str) -> dict[str, object] | None:
    """The JSON object of an answer, in a Markdown fence or not; None if it is none."""
    inner = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(inner[1] if inner else text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(field, value) of each leaf: a nested field is `outer.inner`, the items of a list share their field."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    elif isinstance(value, str):
        yield path, normalise(value)
    else:
        yield path, json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _json_leaves(text: str) -> Counter[tuple[str, str]]:
    return Counter(_leaves(json_object(text) or {}))


def json_fields(prediction: str, answer: str) -> float:
    """F1 of the (field, value) pairs of two JSON objects, each value after `normalise`; a prediction that is none scores 0.

    Kim et al., "OCR-free Document Understanding Transformer" (Donut), ECCV 2022, section 3.3.
    """
    if json_object(prediction) is None:
        return 0.0
    said, true = _json_leaves(prediction), _json_leaves(answer)
    both = said.total() + true.total()
    return 2 * (said & true).total() / both if both else 1.0


SCORES: dict[str, Score] = {
    "accuracy": exact_match,
    "anls": anls,
    "official_anls": official_anls,
    "contained": contained,
    "numeric": numeric,
    "relaxed_accuracy": relaxed_accuracy,
    "cer": partial(_without_errors, _character_edits),
    "wer": partial(_without_errors, _word_edits),
    "edit_similarity": edit_similarity,
    "json_fields": json_fields,
    "multiple_choice": multiple_choice,
}
"""Score of a prediction by the metric's name in the settings; `numeric` may have a tolerance, `numeric@0.5` or `numeric@2%`."""
BINARY = {"accuracy", "contained", "numeric", "relaxed_accuracy", "multiple_choice"}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """The best score of a prediction over the accepted answers, 0-1."""
    name, _, tolerance = metric.partition("@")
    function = partial(numeric, tolerance=tolerance) if tolerance else SCORES[name]
    return max((function(prediction, answer) for answer in answers), default=0.0)


def figure(metric: str, scores: Sequence[float], seed: int) -> Figure:
    """Mean of 0-1 scores, as 0-100: Wilson's interval where answers are right or wrong, a bootstrap of graded ones."""
    binary = metric.partition("@")[0] in BINARY or (":" in metric and set(scores) <= {0.0, 1.0})
    right = math.fsum(scores)
    interval = statistics.wilson(round(right), len(scores)) if binary else statistics.bootstrap(scores, seed)
    return _rounded(100.0 * right / len(scores), interval)


def _rounded(value: float, interval: statistics.Interval) -> Figure:
    return {"score": round(value, 4), "interval": [round(bound, 4) for bound in interval]}


def auroc(truth: Sequence[bool] | np.ndarray, probability: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve, 0-100 (Kiela et al., "The Hateful Memes Challenge", NeurIPS 2020).

    truth: positive or not; probability: of the positive answer. Raises ValueError if one of the classes is missing.
    """
    from sklearn.metrics import roc_auc_score

    if len(set(np.asarray(truth).tolist())) < 2:
        raise ValueError("truth: one class only; expected positive and negative examples")
    return 100.0 * float(roc_auc_score(truth, probability))


def consistency(groups: Sequence[str], correct: Sequence[bool]) -> tuple[int, int]:
    """NLVR2's second metric: how many sentences are judged right with every picture pair they come with, of how many.

    groups: the sentence each example belongs to (Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs",
    ACL 2019, section 7).
    """
    whole: dict[str, bool] = {}
    for group, right in zip(groups, correct, strict=True):
        whole[group] = whole.get(group, True) and right
    return sum(whole.values()), len(whole)


_NLVR2_ID = re.compile(r"([^-]+-[^-]+)-[^-]+(-[^-]+)")
"""SPLIT-SET-PAIR-SENTENCE; the sentence is the id without its pair."""


def confusion(answers: Sequence[str], predictions: Sequence[str]) -> Confusion:
    """How often each class was answered for each class."""
    from sklearn.metrics import confusion_matrix

    classes = sorted({answer.strip() for answer in answers})
    place = {normalise(name): i for i, name in enumerate(classes)}
    true = [place[normalise(answer)] for answer in answers]
    said = [place.get(normalise(prediction), len(classes)) for prediction in predictions]
    counts = confusion_matrix(true, said, labels=range(len(classes) + 1))
    return {"classes": classes, "counts": counts[:-1].tolist()}


def summarise(records: Sequence[Record], metrics: Sequence[str], seed: int, group_by: str = "") -> Summary:
    """metrics.json of a pass. metrics: the main one first. group_by: name of the examples' `meta` field."""
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
            more["character_error_rate"] = _error_rate(records, _character_edits, seed)
        elif name == "wer":
            more["word_error_rate"] = _error_rate(records, _word_edits, seed)
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
    """100 times the sum of the parts over the sum of the wholes, with an interval over the examples."""

    def ratio(part: np.ndarray, whole: np.ndarray) -> float:
        if not whole.sum():
            raise ValueError("nothing to divide by")
        return 100.0 * float(part.sum() / whole.sum())

    interval = statistics.bootstrap_paired(ratio, parts, wholes, seed)
    return _rounded(ratio(np.asarray(parts), np.asarray(wholes)), interval)


def _error_rate(records: Sequence[Record], edits: Callable[[str, str], tuple[int, int]], seed: int) -> Figure:
    """Edits over the answers' characters or words of the whole dataset, in percent: lower is better, and above 100 is possible."""
    pairs = [
        min((edits(record["prediction"], answer) for answer in record["answers"]), key=lambda pair: pair[0] / pair[1])
        for record in records
    ]
    return _ratio([errors for errors, _ in pairs], [length for _, length in pairs], seed)


def _of_fields(records: Sequence[Record], seed: int) -> dict[str, Figure | Confusion | Fields]:
    """F1 over all pairs of the dataset (Donut's), and each field's accuracy and F1."""
    parts, wholes = [], []
    # Examples that have the field, those with all of it right, pairs said or true, pairs that are both.
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in records:
        answer = max(record["answers"], key=lambda answer: json_fields(record["prediction"], answer))
        said, true = _json_leaves(record["prediction"]), _json_leaves(answer)
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


def _of_classes(records: Sequence[Record], seed: int) -> dict[str, Figure | Confusion | Fields]:
    """AUROC of yes/no answers, NLVR2's consistency, and a confusion table: each where the examples define it."""
    more: dict[str, Figure | Confusion | Fields] = {}
    truths = [normalise(record["answers"][0]) for record in records]
    if set(truths) == {"yes", "no"} and all("p_yes" in record for record in records):
        positive, shares = [truth == "yes" for truth in truths], [record["p_yes"] for record in records]
        interval = statistics.bootstrap_paired(auroc, positive, shares, seed)
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
    """Scores by a function of the user's, FILE.py:FUNCTION: `score(predictions: list[dict]) -> list[float]`, one in 0-1 for each.

    Raises DataError: no such file or function, another number of scores, a score that is not in 0-1.
    """
    path, _, name = metric.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(f"metric {metric}: {path}: no such file; expected FILE.py:FUNCTION, from the working directory")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise DataError(
            f"metric {metric}: {path} has no function {name}; expected {name}(predictions) -> list of scores"
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


def _read(path: Path) -> list[Record]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def rescore(settings: ScoreSettings) -> dict[str, Summary]:
    """Score the predictions of an evaluation, without a model: its passes' predictions.jsonl, metrics.json and, elsewhere, a manifest.

    Raises DataError: no passes, or what own_scores raises.
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
        scores = {name: [round(s, 6) for s in _scores(name, records)] for name in settings.metrics}
        for at, record in enumerate(records):
            main, *others = settings.metrics
            record["score"] = scores[main][at]
            if others:
                record["scores"] = {name: scores[name][at] for name in others}
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
        raise DataError(f"{source}: no PASS/metrics.json; expected a result of scripts/evaluate.py")
    if output != source:
        manifest = {"evaluation": str(source)}
        seconds = time.perf_counter() - started
        write_manifest(
            output, kind="score", settings=settings, inputs=manifest, seed=settings.seed, seconds=seconds, device="CPU"
        )
    return found


def _compare(records: Sequence[Record], settings: ScoreSettings, folder: Path) -> None:
    """Print the paired difference of each metric from another pass."""
    others = {record["id"]: record for record in _read(Path(settings.compare) / "predictions.jsonl")}
    ours = [record for record in records if record["id"] in others]
    if not ours:
        raise DataError(f"--compare {settings.compare}: no example of {folder}; expected the same ids")
    theirs = [others[record["id"]] for record in ours]
    for name in settings.metrics:
        found = statistics.paired(_scores(name, ours), _scores(name, theirs), settings.seed)
        p = "" if found.p is None else f", p = {found.p:.4g}"
        low, high = found.interval
        print(
            f"{folder} minus {settings.compare}: {name} {found.difference:+.2f} [{low:.2f}, {high:.2f}], n = {found.n}{p}"
        )
