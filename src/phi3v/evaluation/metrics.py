"""Metrics of answers, each with its source.

The score of one answer is 0-1, and higher is better. A metric over a dataset is 0-100. `accuracy` and `anls` follow the
recipe (PhiCookBook, FineTuning_Vision.md, its scripts). The others follow the papers named in their docstrings.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypedDict

import numpy as np
from rapidfuzz.distance import Levenshtein

Score = Callable[[str, str], float]
"""Score of a prediction against one accepted answer."""


class Confusion(TypedDict):
    """A confusion matrix."""

    classes: list[str]
    counts: list[list[int]]
    """Rows are true classes. Columns are predicted classes, and at the end any other answer."""


def normalise(text: str) -> str:
    """The recipe's normalisation before a comparison: strips outer white space and full stops, and lowers the case."""
    return text.strip().strip(".").lower()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are equal after `normalise`, else 0.0 (recipe: NLVR2, Hateful Memes, UCF-101)."""
    return float(normalise(prediction) == normalise(answer))


def contained(prediction: str, answer: str) -> float:
    """1.0 if the prediction contains the answer, ignoring case (Liu et al., "OCRBench", 2024, section 3)."""
    return float(" ".join(answer.lower().split()) in " ".join(prediction.lower().split()))


def anls(prediction: str, answer: str) -> float:
    """Normalised Levenshtein similarity as the recipe's script computes it.

    1 - NL where NL < 0.5, else 0; case counts; an empty prediction scores 0.
    """
    distance = Levenshtein.normalized_distance(prediction, answer)
    return 1.0 - distance if prediction and distance < 0.5 else 0.0


def official_anls(prediction: str, answer: str) -> float:
    """ANLS of one answer as the DocVQA server computes it.

    Lower case, white space collapsed; 1 - NL if that is at least the threshold 0.5, else 0 (Biten et al., "Scene Text
    Visual Question Answering", ICCV 2019, equation 1, and the evaluation script of rrc.cvc.uab.es task 17, which keeps
    a similarity of exactly 0.5 while the recipe drops it, and divides the distance by the length of the longer original
    text in upper case, so collapsed white space still counts, and a sharp s counts twice).
    """
    longest = max(len(answer.upper()), len(prediction.upper()))
    distance = Levenshtein.distance(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
    similarity = 1.0 - distance / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def edit_similarity(prediction: str, answer: str) -> float:
    """1 - edit distance / length of the longer text, for formulae and pages (Blecher et al., "Nougat", ICLR 2024,
    section 5.1)."""
    return Levenshtein.normalized_similarity(prediction.strip(), answer.strip())


def character_edits(prediction: str, answer: str) -> tuple[int, int]:
    """(edits, characters of the answer)."""
    return Levenshtein.distance(prediction.strip(), answer.strip()), len(answer.strip())


def word_edits(prediction: str, answer: str) -> tuple[int, int]:
    """(edits, words of the answer)."""
    return Levenshtein.distance(prediction.split(), answer.split()), len(answer.split())


def _without_errors(edits: Callable[[str, str], tuple[int, int]], prediction: str, answer: str) -> float:
    """1 - the answer's error rate, at least 0. Error rate: edits over the answer's characters or words (Morris et al.,
    Interspeech 2004)."""
    errors, length = edits(prediction, answer)
    return max(0.0, 1.0 - errors / length) if length else float(not errors)


_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, or None: `1,234.5 kg` is 1234.5, `30%` is 30.

    A prediction's last number counts, as in lm-evaluation-harness' flexible extraction (GSM8K).
    """
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None


def numeric(prediction: str, answer: str, tolerance: str = "0") -> float:
    """1.0 if the last numbers of both texts differ by at most the tolerance: `0.5` in the answer's unit, `2%` of the
    answer."""
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
    """The letter of a multiple-choice answer in upper case, or None: `B`, `(b)`, `B. a boat`, `The answer is B`."""
    found = _LETTER.match(text) or _STATED_LETTER.search(text)
    return found[1].upper() if found else None


def multiple_choice(prediction: str, answer: str) -> float:
    """1.0 if both name the same letter (Lu et al., "ScienceQA", NeurIPS 2022; the letter is read as in LLaVA's
    evaluation)."""
    said = choice_letter(prediction)
    return float(said is not None and said == choice_letter(answer))


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not JSON")
    return value


def json_object(text: str) -> dict[str, object] | None:
    """The JSON object in an answer, with or without a Markdown fence, or None."""
    inner = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(inner[1] if inner else text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(field, value) of each leaf. A nested field is `outer.inner`. The items of a list share their field."""
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


def json_leaves(text: str) -> Counter[tuple[str, str]]:
    return Counter(_leaves(json_object(text) or {}))


def json_fields(prediction: str, answer: str) -> float:
    """F1 of the (field, value) pairs of two JSON objects, each value after `normalise`; a prediction that is none
    scores 0.

    Kim et al., "OCR-free Document Understanding Transformer" (Donut), ECCV 2022, section 3.3.
    """
    if json_object(prediction) is None:
        return 0.0
    said, true = json_leaves(prediction), json_leaves(answer)
    both = said.total() + true.total()
    return 2 * (said & true).total() / both if both else 1.0


SCORES: dict[str, Score] = {
    "accuracy": exact_match,
    "anls": anls,
    "official_anls": official_anls,
    "contained": contained,
    "numeric": numeric,
    "relaxed_accuracy": relaxed_accuracy,
    "cer": partial(_without_errors, character_edits),
    "wer": partial(_without_errors, word_edits),
    "edit_similarity": edit_similarity,
    "json_fields": json_fields,
    "multiple_choice": multiple_choice,
}
"""Metric by its name in the settings. `numeric` accepts a tolerance: `numeric@0.5` or `numeric@2%`."""
BINARY = {"accuracy", "contained", "numeric", "relaxed_accuracy", "multiple_choice"}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """The best score of a prediction over the accepted answers, 0-1."""
    name, _, tolerance = metric.partition("@")
    function = partial(numeric, tolerance=tolerance) if tolerance else SCORES[name]
    return max((function(prediction, answer) for answer in answers), default=0.0)


def auroc(truth: Sequence[bool] | np.ndarray, probability: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve, 0-100 (Kiela et al., "The Hateful Memes Challenge", NeurIPS 2020).

    truth: positive or not; probability: of the positive answer. Raises ValueError if one of the classes is missing.
    """
    positive, values = np.asarray(truth, bool), np.asarray(probability, np.float64)
    if np.isnan(values).any():
        raise ValueError("probability: NaN; expected numbers")
    return auroc_of_places(positive, np.unique(values, return_inverse=True)[1])


def auroc_of_places(positive: np.ndarray, places: np.ndarray) -> float:
    """AUROC from each value's rank among the distinct values, so that a bootstrap sorts only once."""
    negatives, positives = np.bincount(2 * places + positive, minlength=2 * (places.max() + 1)).reshape(-1, 2).T
    pairs = int(positives.sum()) * int(negatives.sum())
    if not pairs:
        raise ValueError("truth: one class only; expected positive and negative examples")
    # Mann and Whitney 1947: share of correctly ordered (positive, negative) pairs, where ties count half.
    below = np.cumsum(negatives) - negatives
    return 100.0 * float((positives * (below + negatives / 2)).sum()) / pairs


def consistency(groups: Sequence[str], correct: Sequence[bool]) -> tuple[int, int]:
    """NLVR2's second metric: how many sentences are judged right with every picture pair they come with, of how many.

    groups: the sentence each example belongs to (Suhr et al., "A Corpus for Reasoning About Natural Language Grounded
    in Photographs", ACL 2019, section 7).
    """
    whole: dict[str, bool] = {}
    for group, right in zip(groups, correct, strict=True):
        whole[group] = whole.get(group, True) and right
    return sum(whole.values()), len(whole)


def confusion(answers: Sequence[str], predictions: Sequence[str]) -> Confusion:
    """Number of times that each class was predicted for each true class."""
    from sklearn.metrics import confusion_matrix

    classes = sorted({answer.strip() for answer in answers})
    place = {normalise(name): i for i, name in enumerate(classes)}
    true = [place[normalise(answer)] for answer in answers]
    said = [place.get(normalise(prediction), len(classes)) for prediction in predictions]
    counts = confusion_matrix(true, said, labels=range(len(classes) + 1))
    return {"classes": classes, "counts": counts[:-1].tolist()}
