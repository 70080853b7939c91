"""Scores of answers, each with its source. A score of one answer is 0-1; a metric over a dataset is 0-100.

`accuracy` and `anls` are the recipe's own (PhiCookBook, FineTuning_Vision.md, its scripts); `official_anls`, `auroc` and `consistency`
are those of the datasets' authors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from scipy import stats


def normalise(text: str) -> str:
    """The recipe's form of an answer before it is compared: no outer white space, no outer full stops, lower case."""
    return text.strip().strip(".").lower()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers after `normalise`, else 0.0 (recipe: NLVR2, Hateful Memes, UCF-101)."""
    said = normalise(prediction)
    return float(any(said == normalise(answer) for answer in answers))


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of single characters."""
    if left == right:
        return 0
    if len(left) < len(right):
        left, right = right, left
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def _normalised_distance(left: str, right: str) -> float:
    longest = max(len(left), len(right))
    return edit_distance(left, right) / longest if longest else 0.0


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer as the recipe's script computes it.

    1 - NL where NL < 0.5, else 0; the best over the answers; case counts; an empty prediction scores 0.
    """
    if not prediction:
        return 0.0
    distances = (_normalised_distance(prediction, answer) for answer in answers)
    return max((1.0 - distance if distance < 0.5 else 0.0 for distance in distances), default=0.0)


def official_anls(prediction: str, answers: Sequence[str]) -> float:
    """ANLS of one answer as the DocVQA server computes it.

    Lower case, white space collapsed; 1 - NL where that is at least the threshold 0.5, else 0; the best over the answers
    (Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1, and the evaluation script of rrc.cvc.uab.es task 17,
    which keeps a similarity of exactly 0.5 where the recipe drops it, and divides the distance by the length of the longer text as it was
    written, in upper case: white space that was collapsed still counts there, and a sharp s counts twice).
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        longest = max(len(answer.upper()), len(prediction.upper()))
        distance = edit_distance(said, " ".join(answer.lower().split()))
        best = max(best, 1.0 - distance / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"accuracy": exact_match, "anls": anls}
"""Score of one answer by the metric's name in the settings."""


def mean_score(scores: Sequence[float]) -> float:
    """Mean of 0-1 scores, as 0-100. Raises ValueError on none, NaN, or a score outside 0-1."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("scores: empty; expected at least one")
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if wrong.size:
        raise ValueError(f"scores: number {wrong[0]} is {values[wrong[0]]}; expected 0-1")
    return 100.0 * math.fsum(values) / values.size


def auroc(truth: Sequence[bool] | np.ndarray, probability: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve, 0-100: the chance that a random positive is ranked above a random negative, ties half.

    Hateful Memes' metric (Kiela et al., 2020). Raises ValueError unless both classes are present.
    """
    positive = np.asarray(truth, dtype=bool)
    values = np.asarray(probability, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"probability: number {int(np.flatnonzero(np.isnan(values))[0])} is NaN; expected 0-1")
    ones = int(positive.sum())
    zeros = positive.size - ones
    if not ones or not zeros:
        raise ValueError(f"truth: {ones} positive and {zeros} negative examples; expected at least one of each")
    rank_sum = float(stats.rankdata(values)[positive].sum())
    return 100.0 * (rank_sum - ones * (ones + 1) / 2.0) / (ones * zeros)


def consistency(groups: Sequence[str], correct: Sequence[bool]) -> float:
    """NLVR2's second metric, 0-100: the share of sentences that are judged right with every picture pair they come with.

    groups: the sentence each example belongs to (Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs",
    ACL 2019, section 7). Raises ValueError on none.
    """
    if not groups:
        raise ValueError("groups: empty; expected at least one example")
    whole: dict[str, bool] = {}
    for group, right in zip(groups, correct, strict=True):
        whole[group] = whole.get(group, True) and bool(right)
    return 100.0 * sum(whole.values()) / len(whole)


def nlvr2_sentence(identifier: str) -> str:
    """The sentence of an NLVR2 example id `SPLIT-SET-PAIR-SENTENCE`: the id without its pair."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"id: got {identifier!r}; expected NLVR2's SPLIT-SET-PAIR-SENTENCE, such as dev-850-0-1")
    return "-".join((parts[0], parts[1], parts[3]))


class Confusion(TypedDict):
    """A confusion table."""

    classes: list[str]
    counts: list[list[int]]
    """Rows are true classes, columns predicted ones and, last, any other answer."""


def confusion(answers: Sequence[str], predictions: Sequence[str]) -> Confusion:
    """How often each class was answered for each class."""
    classes = sorted({answer.strip() for answer in answers})
    column = {normalise(name): i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes) + 1), dtype=int)
    for answer, said in zip(answers, predictions, strict=True):
        counts[column[normalise(answer)], column.get(normalise(said), len(classes))] += 1
    return {"classes": classes, "counts": counts.tolist()}
