"""Metrics against scikit-learn, a slow obvious version, and examples worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.evaluation import metrics


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Yes.", ["yes"], 1.0),
        (" yes ", ["Yes"], 1.0),
        ("..BabyCrawling..", ["babycrawling"], 1.0),
        ("yes. ", ["Yes"], 1.0),
        ("yes .", ["yes"], 0.0),  # full stops go once, the space before them stays
        ("no", ["yes", "No"], 1.0),
        ("", ["no"], 0.0),
    ],
)
def test_accuracy_is_an_exact_match_after_the_recipes_normalisation(prediction, answers, expected):
    assert metrics.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "recipe", "official"),
    [
        # Worked by hand: distance / longer length, and where the two protocols part.
        ("ITC Limited", ["ITC Limited"], 1.0, 1.0),
        ("itc limited", ["ITC Limited"], 1 - 4 / 11, 1.0),  # I, T, C, L differ in case
        ("1/8/93", ["1/8/93", "Jan 8"], 1.0, 1.0),
        ("1/8/92", ["1/8/93"], 1 - 1 / 6, 1 - 1 / 6),
        ("abcd", ["abxy"], 0.0, 0.5),  # a similarity of exactly 0.5: the recipe drops it, the server keeps it
        ("abcde", ["abxyz"], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
        ("  two   words ", ["two words"], 1 - 5 / 14, 1.0),  # white space counts in the recipe
        ("kitten", ["sitting", "mitten"], 1 - 1 / 6, 1 - 1 / 6),
        (
            "ab  cd",
            ["ab xd"],
            1 - 2 / 6,
            1 - 1 / 6,
        ),  # the server collapses white space, and divides by what was written
        ("Strasse", ["Straße"], 1 - 2 / 7, 1 - 2 / 7),  # STRASSE has seven letters
        ("ß", ["s"], 0.0, 0.5),  # one edit of SS's two letters
    ],
)
def test_anls_on_a_set_worked_by_hand(prediction, answers, recipe, official):
    assert metrics.anls(prediction, answers) == pytest.approx(recipe)
    assert metrics.official_anls(prediction, answers) == pytest.approx(official)


def _slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        _slow_distance(a[1:], b) + 1, _slow_distance(a, b[1:]) + 1, _slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_equals_its_definition(a, b):
    assert metrics.edit_distance(a, b) == _slow_distance(a, b)


def test_auroc_equals_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for digits in (1, 2, 6):
        truth = rng.random(300) < 0.3
        probability = np.round(np.clip(rng.random(300) * 0.7 + truth * 0.25, 0, 1), digits)
        assert metrics.auroc(truth, probability) == pytest.approx(100 * roc_auc_score(truth, probability))


def test_auroc_of_one_class_or_nan_is_refused():
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        metrics.auroc([True] * 3, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="number 1 is NaN"):
        metrics.auroc([True, False], [0.1, float("nan")])


def test_consistency_counts_sentences_that_are_right_throughout():
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]
    sentences = [metrics.nlvr2_sentence(i) for i in ids]
    assert sentences == ["dev-1-0", "dev-1-0", "dev-1-1", "dev-2-0"]
    assert metrics.consistency(sentences, [True, False, True, True]) == pytest.approx(100 * 2 / 3)
    with pytest.raises(ValueError, match="val-17"):
        metrics.nlvr2_sentence("val-17")


def test_confusion_has_a_column_for_answers_that_are_no_class():
    table = metrics.confusion(["cat", "dog", "dog"], ["Cat.", "cat", "horse"])
    assert table == {"classes": ["cat", "dog"], "counts": [[1, 0, 0], [1, 0, 1]]}


def test_a_mean_of_nothing_or_of_nan_is_refused():
    assert metrics.mean_score([1, 0, 0.5]) == 50.0
    with pytest.raises(ValueError, match="empty"):
        metrics.mean_score([])
    with pytest.raises(ValueError, match="number 1 is nan"):
        metrics.mean_score([1.0, float("nan")])
