"""Metrics against scikit-learn, jiwer, a slow obvious version, and examples worked by hand."""

import json
import re
from collections import Counter
from fractions import Fraction

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from phi3v.data.conversations import DataError
from phi3v.evaluation import metrics, scoring, statistics
from phi3v.settings import ScoreSettings
from phi3v.settings.entries import METRICS


def record(prediction: str, *answers: str, **more) -> dict:
    """A line of predictions.jsonl."""
    return {
        "id": more.pop("id", "x"), "prompt": "?", "images": [], "answers": list(answers), "prediction": prediction, **more
    }  # fmt: skip


def test_every_name_of_the_settings_is_a_metric():
    assert {*METRICS, "official_anls"} == set(metrics.SCORES)


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
    assert metrics.score("accuracy", prediction, answers) == expected


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
        # The server collapses white space, and divides by what was written.
        ("ab  cd", ["ab xd"], 1 - 2 / 6, 1 - 1 / 6),
        ("Strasse", ["Straße"], 1 - 2 / 7, 1 - 2 / 7),  # STRASSE has seven letters
        ("ß", ["s"], 0.0, 0.5),  # one edit of SS's two letters
    ],
)
def test_anls_on_a_set_worked_by_hand(prediction, answers, recipe, official):
    assert metrics.score("anls", prediction, answers) == pytest.approx(recipe)
    assert metrics.score("official_anls", prediction, answers) == pytest.approx(official)


def edit_distance(left, right) -> int:
    """Levenshtein distance by its table."""
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


TEXTS = st.text("abC é", max_size=12)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_edit_metrics_equal_their_definition(said, true):
    longest = max(len(said), len(true))
    distance = edit_distance(said, true) / longest if longest else 0.0
    assert metrics.anls(said, true) == (1.0 - distance if said and distance < 0.5 else 0.0)
    stripped = said.strip(), true.strip()
    longest = max(map(len, stripped))
    similarity = 1 - edit_distance(*stripped) / longest if longest else 1.0
    assert metrics.edit_similarity(said, true) == pytest.approx(similarity)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=6))
def test_error_rates_equal_jiwers(pairs):
    said, true = ([pair[k] for pair in pairs] for k in (0, 1))
    for name, rate in (("cer", jiwer.cer), ("wer", jiwer.wer)):
        scores = [metrics.score(name, prediction, [answer]) for prediction, answer in pairs]
        assert scores == pytest.approx([1 - min(1, rate(answer, prediction)) for prediction, answer in pairs])
        records = [record(p, a, score=s) for (p, a), s in zip(pairs, scores, strict=True)]
        more = scoring.summarise(records, [name], 0)["more"]
        (found,) = more.values()
        assert found["score"] == pytest.approx(100 * rate(true, said), abs=1e-4)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The sign says STOP here", "stop", 1.0),
        ("st op", "stop", 0.0),
        ("two\nlines", "two lines", 1.0),
        ("", "a", 0.0),
    ],
)
def test_contained(prediction, answer, expected):
    assert metrics.score("contained", prediction, [answer]) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The gauge reads 4.5 bar", 4.5), ("$1,234.50", 1234.5), ("-3", -3), ("\N{MINUS SIGN}3.0 °C", -3), ("12 of 15", 15),
        (".5", 0.5), ("1e-3", 0.001), ("A-7", 7), ("30%", 30), ("1,2345", 2345), ("none", None), ("5.", 5),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert metrics.last_number(text) == number


@settings(max_examples=300, deadline=None)
@given(st.decimals(-100, 100, places=2), st.decimals(-100, 100, places=2), st.decimals(0, 20, places=1))
def test_numbers_within_a_tolerance_equal_exact_fractions(said, true, tolerance):
    error, allowed = abs(Fraction(said) - Fraction(true)), Fraction(tolerance)
    assert metrics.score("numeric", f"It is {said} kg", [str(true)]) == (error == 0)
    assert metrics.score(f"numeric@{tolerance}", f"It is {said} kg", [str(true)]) == (error <= allowed)
    relative = allowed * abs(Fraction(true)) / 100
    assert metrics.score(f"numeric@{tolerance}%", f"It is {said} kg", [str(true)]) == (error <= relative)


def chartqa(target: str, prediction: str) -> bool:
    """Relaxed correctness as the Pix2Struct repository writes it."""

    def number(text):
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    said, true = number(prediction), number(target)
    if said is not None and true:
        return abs(said - true) / abs(true) <= 0.05
    return prediction.lower() == target.lower()


NUMBERS = st.one_of(
    st.integers(90, 110).map(str),
    st.integers(90, 110).map("{}%".format),
    st.sampled_from(["Yes", "yes", "0", "0.0", "No"]),
)


@settings(max_examples=300, deadline=None)
@given(NUMBERS, NUMBERS)
def test_relaxed_accuracy_equals_the_published_code(said, true):
    assert metrics.score("relaxed_accuracy", said, [true]) == chartqa(true, said)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B. a boat", "B"), ("B) a boat", "B"), ("The answer is (C).", "C"), ("Answer: d", "D"),
        ("A dog", None), ("a boat", None), ("", None), ("[E]", "E"), ("I think the correct option is B", "B"),
    ],
)  # fmt: skip
def test_the_letter_of_a_multiple_choice_answer(text, letter):
    assert metrics.choice_letter(text) == letter
    assert metrics.score("multiple_choice", text, ["B"]) == (letter == "B")


RECEIPT = {"shop": "Café", "total": 12.5, "items": [{"name": "tea", "price": 2}, {"name": "tea", "price": 3}]}


def donut_f1(said: dict, true: dict) -> float:
    """Field F1 as Donut's evaluator counts it: each pair of the prediction is looked for among those left of the answer."""

    def flat(value, path=()):
        if isinstance(value, dict):
            return [pair for name, inner in value.items() for pair in flat(inner, (*path, name))]
        if isinstance(value, list):
            return [pair for inner in value for pair in flat(inner, path)]
        return [(".".join(path), str(value))]

    left, right, wrong = flat(true), 0, 0
    for pair in flat(said):
        if pair in left:
            left.remove(pair)
            right += 1
        else:
            wrong += 1
    return right / (right + (wrong + len(left)) / 2) if right + wrong + len(left) else 1.0


FIELDS = st.dictionaries(
    st.sampled_from("abc"), st.one_of(st.sampled_from("xyz"), st.lists(st.sampled_from("xyz"), max_size=3)), max_size=3
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=4))
def test_json_fields_equal_donuts_f1_and_direct_counts(pairs):
    records = []
    for said, true in pairs:
        texts = json.dumps(said), json.dumps(true)
        f1 = metrics.score("json_fields", texts[0], [texts[1]])
        assert f1 == pytest.approx(donut_f1(said, true))
        records.append(record(*texts, score=f1))
    fields = scoring.summarise(records, ["json_fields"], 0)["more"]["fields"]
    assert fields["invalid"] == 0
    for name, found in fields["fields"].items():
        lists = [[Counter(np.atleast_1d(value.get(name, [])).tolist()) for value in pair] for pair in pairs]
        having = [said == true for said, true in lists if true]
        assert found["n"] == len(having)
        assert found["accuracy"] == pytest.approx(100 * np.mean(having) if having else 0, abs=1e-4)


def test_json_answers_are_read_in_a_fence_and_invalid_ones_are_counted():
    answer = json.dumps(RECEIPT)
    fenced = f"```json\n{json.dumps(RECEIPT | {'total': '12.5'}, indent=1)}\n```"
    predictions = [fenced, answer[:-1], "[1]", json.dumps(RECEIPT | {"total": 13})]
    scores = [metrics.score("json_fields", prediction, [answer]) for prediction in predictions]
    assert scores == pytest.approx([1, 0, 0, 5 / 6])  # six pairs, of which one is wrong
    records = [record(p, answer, score=s) for p, s in zip(predictions, scores, strict=True)]
    more = scoring.summarise(records, ["json_fields"], 0)["more"]
    assert more["fields"]["invalid"] == 2
    assert more["fields"]["fields"]["total"] == {"accuracy": 25.0, "f1": pytest.approx(200 / 6, abs=1e-3), "n": 4}
    assert more["micro_f1"]["score"] == pytest.approx(100 * 22 / 36, abs=1e-3)


def test_json_fields_of_answers_that_are_no_json_are_zero_and_counted():
    records = [record("total: 5", "total: 5", score=metrics.score("json_fields", "total: 5", ["total: 5"]))]
    summary = scoring.summarise(records, ["json_fields"], 0)
    assert summary["score"] == 0 and summary["more"]["micro_f1"] == {"score": 0.0, "interval": [0.0, 0.0]}
    assert summary["more"]["fields"] == {"invalid": 1, "fields": {}}


def test_auroc_equals_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    for digits in (1, 2, 6):
        truth = rng.random(80) < 0.3
        probability = np.round(np.clip(rng.random(80) * 0.7 + truth * 0.25, 0, 1), digits)
        pairs = [(p > n) + (p == n) / 2 for p in probability[truth] for n in probability[~truth]]
        assert metrics.auroc(truth, probability) == pytest.approx(100 * np.mean(pairs))
        assert metrics.auroc(truth, probability) == pytest.approx(100 * roc_auc_score(truth, probability), rel=1e-13)
        # Sorting once for all resamples changes no bit of the interval.
        places = np.unique(probability, return_inverse=True)[1]
        slow, fast = (
            statistics.bootstrap_paired(of, truth, values, 5, 50)
            for of, values in ((metrics.auroc, probability), (metrics.auroc_of_places, places))
        )
        assert slow == fast
    with pytest.raises(ValueError, match="one class only"):
        metrics.auroc([True] * 3, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc([True, False], [0.1, float("nan")])


def test_consistency_counts_sentences_that_are_right_throughout():
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]
    records = [record("yes", "yes", id=i, score=float(s)) for i, s in zip(ids, [1, 0, 1, 1], strict=True)]
    more = scoring.summarise(records, ["accuracy"], 0)["more"]
    assert more["consistency"]["score"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    records[0]["id"] = "val-17"
    assert "consistency" not in scoring.summarise(records, ["accuracy"], 0)["more"]


def test_confusion_has_a_column_for_answers_that_are_no_class():
    table = metrics.confusion(["cat", "dog", "dog"], ["Cat.", "cat", "horse"])
    assert table == {"classes": ["cat", "dog"], "counts": [[1, 0, 0], [1, 0, 1]]}


def test_several_metrics_and_groups_have_their_intervals():
    rows = [("red", "red", "colour"), ("rad", "red", "colour"), ("4", "4", "number"), ("5", "4", "number")]
    names = ["accuracy", "cer"]
    records = []
    for said, true, kind in rows:
        scores = [metrics.score(name, said, [true]) for name in names]
        records.append(record(said, true, score=scores[0], scores={"cer": scores[1]}, meta={"kind": kind}))
    summary = scoring.summarise(records, names, 0, "kind")
    assert (summary["metric"], summary["score"], summary["n"]) == ("accuracy", 50.0, 4)
    assert summary["more"]["cer"]["score"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4, abs=1e-3)
    assert list(summary["groups"]) == ["colour", "number"]
    assert summary["groups"]["colour"]["n"] == 2 and summary["groups"]["colour"]["score"] == 50.0
    assert re.fullmatch(r"\d+\.\d+", str(summary["groups"]["number"]["interval"][0]))


def write_result(folder, predictions: list[str]):
    """A result of scripts/evaluate.py whose answers are all `yes`."""
    (folder / "after").mkdir(parents=True)
    lines = [
        record(said, "yes", id=f"e{at}", score=metrics.score("accuracy", said, ["yes"]))
        for at, said in enumerate(predictions)
    ]
    (folder / "after/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = scoring.summarise(lines, ["accuracy"], 42) | {"left_out": 0, "leaked": 1}
    (folder / "after/metrics.json").write_text(json.dumps(summary))
    (folder / "control").mkdir()
    (folder / "control/metrics.json").write_text(json.dumps({"not_applicable": "one picture"}))
    return folder


def test_a_function_of_the_users_scores_the_predictions(tmp_path, capsys):
    source = write_result(tmp_path / "result", ["yes", "no", "Yes.", "maybe"])
    function = tmp_path / "my_metrics.py"
    function.write_text("def half(predictions):\n    return [len(p['prediction']) / 10 for p in predictions]\n")
    own = f"{function}:half"
    settings = {"input_dir": str(source), "output_dir": str(tmp_path / "scored"), "compare": str(source / "after")}
    (found,) = scoring.rescore(ScoreSettings(metrics=[own, "accuracy"], **settings)).values()
    assert (found["metric"], found["n"], found["leaked"]) == (own, 4, 1)
    assert found["score"] == pytest.approx(100 * (3 + 2 + 4 + 5) / 40)
    assert found["interval"] == [round(bound, 4) for bound in statistics.bootstrap([0.3, 0.2, 0.4, 0.5], 42)]
    assert found["more"]["accuracy"]["score"] == 50.0
    lines = [json.loads(line) for line in (tmp_path / "scored/after/predictions.jsonl").read_text().splitlines()]
    assert [(line["score"], line["scores"]["accuracy"]) for line in lines] == [(0.3, 1), (0.2, 0), (0.4, 1), (0.5, 0)]
    assert json.loads((tmp_path / "scored/control/metrics.json").read_text()) == {"not_applicable": "one picture"}
    assert json.loads((tmp_path / "scored/manifest.json").read_text())["kind"] == "score"
    assert json.loads((source / "after/metrics.json").read_text())["metric"] == "accuracy"
    assert "accuracy +0.00 [0.00, 0.00], n = 4, p = 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1]", "returned 1 scores of 2 predictions"),
        ("return [0.5, 1.5]", "id 'e1': got 1.5; expected a number in 0-1"),
        ("return [0.5, 'x']", "id 'e1': got 'x'"),
        ("return [0.5, float('nan')]", "id 'e1': got nan"),
    ],
)
def test_wrong_scores_of_a_users_function_are_named(tmp_path, body, message):
    source = write_result(tmp_path / "result", ["yes", "no"])
    (tmp_path / "own.py").write_text(f"def score(predictions):\n    {body}\n")
    for name, expected in ((f"{tmp_path}/own.py:score", message), (f"{tmp_path}/own.py:other", "has no function other"),
                           (f"{tmp_path}/none.py:score", "no such file")):  # fmt: skip
        with pytest.raises(DataError, match=expected):
            scoring.rescore(ScoreSettings(input_dir=str(source), metrics=[name]))


def test_wrong_names_of_metrics_are_refused_with_the_names_that_exist():
    for name in ("bleu", "numeric@", "numeric@x", "my_metrics:score"):
        with pytest.raises(ValueError, match=r"expected one of accuracy, anls, .*FILE\.py:FUNCTION"):
            ScoreSettings(input_dir="x", metrics=[name])
