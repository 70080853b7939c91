"""The conversations jsonl: what is read, what is refused with which words, and the same whatever a fuzzer writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.data import conversations
from phi3v.data.conversations import (
    Conversation,
    DataError,
    Turn,
    answer_text,
    format_line,
    image_path_problem,
    parse_line,
    prompt_text,
    read_conversations,
    record_problem,
)

SCHEMA = json.loads(Path(__file__).parents[1].joinpath("workflow/schemas/conversations.schema.json").read_text())
RECIPE_LINE = (
    '{"id": "val-0000000300", "source": "ucf101", "conversations": [{"images": ["val/BabyCrawling/v_g21_c04.0.jpg"], '
    '"user": "Classify the video into one of the following classes: Archery.", "assistant": "BabyCrawling"}]}'
)


def record(**turn: object) -> dict:
    return {"id": "a", "source": "s", "conversations": [{"images": [], "user": "u", "assistant": "x", **turn}]}


def test_the_recipes_line_is_read() -> None:
    conversation = parse_line(RECIPE_LINE.encode(), "val.jsonl:1")
    assert conversation.id == "val-0000000300"
    assert conversation.source == "ucf101"
    assert conversation.images == ("val/BabyCrawling/v_g21_c04.0.jpg",)
    assert conversation.turns[0].accepted == ("BabyCrawling",)
    assert format_line(conversation) == RECIPE_LINE.encode() + b"\n"


def test_a_turn_as_the_model_sees_it() -> None:
    turn = Turn(("a.png", "b.png"), "Same?", "yes")
    assert prompt_text(turn, 3) == "<|user|>\n<|image_3|>\n<|image_4|>\nSame?<|end|>\n<|assistant|>\n"
    assert answer_text(turn) == "yes<|end|>\n<|endoftext|>"
    turn = Turn(("a.png",), "Total?", "$1", system="Be brief.")
    assert prompt_text(turn) == "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\nTotal?<|end|>\n<|assistant|>\n"
    assert prompt_text(Turn((), "Hi", "x")) == "<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark; expected UTF-8 without one"),
        (b'{"id": "a"}\r\n', "carriage return; expected lines that end in"),
        (b"\n", "an empty line"),
        (b'{"id": NaN}', "NaN is not JSON"),
        (b'{"id": -Infinity}', "Infinity is not JSON"),
        (b'{"id": "a", "id": "b"}', "key 'id' appears twice"),
        (b'{"id": "\xff"}', "byte 8 is not UTF-8"),
        (b'{"id": "a"', "not JSON: "),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "limit"),
        (b"[]", "got []; expected an object"),
        (b"3", "got 3; expected an object"),
        (
            json.dumps(record(user="\ud800")).encode(),
            "`conversations[0].user`: got '\\ud800'; expected no lone surrogates",
        ),
    ],
)
def test_lines_that_are_not_json_of_ours(line: bytes, expected: str) -> None:
    with pytest.raises(DataError) as error:
        parse_line(line, "train.jsonl:7")
    assert str(error.value).startswith("train.jsonl:7: ")
    assert expected in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (record(user=3), "`conversations[0].user`: got 3; expected a string"),
        (record(user=" \n"), "`conversations[0].user`: got ' \\n'; expected some text"),
        (record(assistant=""), "`conversations[0].assistant`: got ''; expected some text"),
        (record(assistant="a<|end|>"), "no control token of the model (<|end|>)"),
        (record(user="<|image_1|> what?"), "no control token of the model (<|image_1|>)"),
        (record(images="a.png"), "`conversations[0].images`: got 'a.png'; expected a list of paths"),
        (record(images=["a.png", 3]), "`conversations[0].images[1]`: got 3; expected a string"),
        (
            record(images=["../a.png"]),
            "`conversations[0].images[0]`: got '../a.png'; expected a path inside the images folder",
        ),
        (record(images=["a/../../b.png"]), "expected a path inside the images folder"),
        (record(images=["/etc/passwd"]), "expected a relative path"),
        (record(images=["a\\b.png"]), "expected a relative path"),
        (record(images=["C:/b.png"]), "expected a relative path"),
        (record(images=["a\0.png"]), "expected a relative path"),
        (record(images=["a//b.png"]), "expected a path inside"),
        (record(images=["a/./b.png"]), "expected a path inside"),
        (record(images=["a" * 2000]), "expected at most 1024 characters"),
        (record(answers=[]), "`conversations[0].answers`: got []; expected a list of accepted answers"),
        (record(answers=["y", "x"]), "`conversations[0].answers[0]`: got 'y'; expected the assistant's answer, 'x'"),
        (record(answers=["x", None]), "`conversations[0].answers[1]`: got None; expected a string"),
        (record(image="a"), "`conversations[0].image`: unknown; expected images, system, user, assistant, answers"),
        ({**record(), "extra": 1}, "field `extra`: unknown; expected id, source, conversations"),
        ({**record(), "id": 5}, "field `id`: got 5; expected a string"),
        ({**record(), "id": "a\nb"}, "expected no line break"),
        ({"id": "a", "source": "s"}, "field `conversations`: got None; expected a list of turns"),
        ({"source": "s", "conversations": []}, "field `id`: missing"),
        ({**record(), "conversations": ["x"]}, "`conversations[0]`: got 'x'; expected an object"),
        ({"id": "a", "source": "s", "conversations": [{"user": "u"}]}, "`conversations[0].assistant`: missing"),
    ],
)
def test_wrong_fields_are_named(value: dict, expected: str) -> None:
    with pytest.raises(DataError) as error:
        parse_line(json.dumps(value).encode(), "f.jsonl:2")
    assert expected in str(error.value)


def test_a_line_of_a_hundred_megabytes_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with open(path, "wb") as file:
        file.write(RECIPE_LINE.encode() + b'\n{"id": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + RECIPE_LINE.encode() + b"\n")
    with pytest.raises(
        DataError, match=rf"train\.jsonl:2: .* expected a line of at most {conversations.MAX_LINE_BYTES}"
    ):
        list(read_conversations(path))
    with open(path, "rb") as file:
        assert [number for number, _ in conversations.raw_lines(file)] == [1, 2, 3]


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="empty; expected one JSON object"):
        list(read_conversations(tmp_path / "a.jsonl"))


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    good = Conversation("a", "s", (Turn((), "ü?", "x", ("x", "y")),))
    (tmp_path / "a.jsonl").write_bytes(format_line(good))
    assert list(read_conversations(tmp_path / "a.jsonl")) == [good]
    with pytest.raises(DataError, match=r"example 'b': field `conversations\[0\]\.user`"):
        format_line(Conversation("b", "s", (Turn((), "", "x"),)))


TEXT = st.text(min_size=1, max_size=30).filter(lambda text: conversations.text_problem(text) is None)
PATH = st.text(st.sampled_from("ab/. -_é<s>"), min_size=1, max_size=12)
TURN = st.fixed_dictionaries(
    {"user": TEXT, "assistant": TEXT},
    optional={"images": st.lists(PATH, max_size=3), "answers": st.lists(TEXT, max_size=2), "system": TEXT},
)
RECORD = st.fixed_dictionaries({"id": TEXT, "source": TEXT, "conversations": st.lists(TURN, max_size=3)})
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "source", "conversations", "images", "user", "assistant", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | RECORD.map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_are_an_example_or_a_data_error(line: bytes) -> None:
    try:
        conversation = parse_line(line, "f:1")
    except DataError:
        return
    # What is read can be written, and is the same again; and the schema agrees that it is right.
    written = format_line(conversation)
    assert parse_line(written, "f:1") == conversation
    assert written.count(b"\n") == 1
    jsonschema.validate(json.loads(written), SCHEMA)


@settings(max_examples=300, deadline=None)
@given(RECORD | JSON)
def test_the_schema_and_the_reader_agree(value: object) -> None:
    """Two rules are the reader's alone: JSON schema has no words for the first answer, nor for what counts as blank."""
    problem = record_problem(value)
    schema_says = not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(value))
    if problem is None:
        assert schema_says
    elif schema_says:
        assert re.search(r"answers\[0\]|expected some text|surrogates|line break", problem), problem


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab/.\\:\0 -~é"), max_size=12))
def test_an_accepted_path_stays_inside(path: str) -> None:
    if image_path_problem(path) is None:
        import posixpath

        assert posixpath.normpath(f"root/{path}") == f"root/{path}"
