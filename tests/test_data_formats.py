"""Formats of people's own files: every way in which they name columns, pictures and speakers, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from pathlib import Path

import pytest
from data_examples import picture_bytes, write_clip, write_parquet
from PIL import Image

from phi3v.data.conversations import Conversation, DataError, read_conversations
from phi3v.data.convert import convert_files
from phi3v.data.formats import FORMATS
from phi3v.data.rows import Inputs, Rejection
from phi3v.settings import FORMAT_OPTIONS, Options, SettingsError

PNG = picture_bytes(1, "PNG")
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures a.png, b.png and sub/c;d.png."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c;d.png"):
        (source / name).write_bytes(PNG)
    return source


def converted(
    kind: str, source: Path, split: str = "train", columns: dict | None = None, **options: object
) -> list[Conversation]:
    given = {**options, **({"columns": columns} if columns else {})}
    convert_files(kind, source, source.parent / "out", split, name="demo", options=given)  # type: ignore[arg-type]
    return list(read_conversations(source.parent / "out" / f"{split}.jsonl"))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encoding_and_delimiter_of_a_table_are_found(folder: Path, encoding: str, delimiter: str) -> None:
    rows = [["IMAGE", "Question", " answer "], ["a.png", '"Größe, ""wie"" viel; was?"', "Müller"]]
    text = "\r\n".join(delimiter.join(cells) for cells in rows) + "\r\n"
    (folder / "rows.csv").write_bytes(text.encode(encoding))
    (found,) = converted("table", folder / "rows.csv")
    assert (found.turns[0].user, found.turns[0].assistant) == ('Größe, "wie" viel; was?', "Müller")


def test_quotation_marks_that_are_text(folder: Path) -> None:
    lines = ['"Yes" he said?\tno', '"never closed\tone', '"two"\tit is "so"', '"a ""b"" \n c"\tthree', 'last "\tfour']
    (folder / "rows.tsv").write_text("image\tquestion\tanswer\n" + "".join(f"a.png\t{line}\n" for line in lines))
    found = converted("table", folder / "rows.tsv")
    assert [(e.turns[0].user, e.turns[0].assistant) for e in found] == [
        ('"Yes" he said?', "no"), ('"never closed', "one"), ("two", 'it is "so"'), ('a "b" \n c', "three"), ('last "', "four"),
    ]  # fmt: skip


def test_pictures_of_a_row_however_they_are_named(folder: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.png")
    (folder / decomposed).write_bytes(PNG)
    images: list[object] = [
        "./a.png", "sub/../a.png", str(folder / "a.png"), f"file://{folder}/a.png", "sub/c;d.png", "a.png; b.png", ["a.png", "b.png"],
        '["a.png", "b.png"]', "é.png", {"path": "a.png"}, {"bytes": None, "path": "b.png"}, f"data:image/png;base64,{BASE64}",
        {"url": f"data:image/png;base64,{BASE64}"}, BASE64 if len(BASE64) > 4096 else f"data:,{BASE64}", "", None,
    ]  # fmt: skip
    rows = [{"image": image, "question": "q", "answer": 1} for image in images]
    found = converted("table", write(folder / "rows.jsonl", *rows))
    assert [len(example.images) for example in found] == [1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0]
    assert all((folder / "out/images" / path).read_bytes() == PNG for e in found for path in e.images)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("A.PNG", "no such file in .*; did you mean `a.png`"),
        ("a.jpeg", "did you mean `a.png`"),
        ("/etc/passwd", "expected a relative path, or one inside"),
        ("sub/../../x.png", "expected a path inside the images folder"),
        ("data:image/png;base64,@@", "expected base64"),
        ({"width": 3}, "expected bytes, a path, a URL or base64"),
        (7, "expected a string"),
        (
            "ftp://host/a.png",
            "got 'ftp://host/a.png'; expected a path, or https://, http://, s3://, gs://, az://, hf://",
        ),
    ],
)
def test_a_picture_that_cannot_be_taken(folder: Path, image: object, expected: str) -> None:
    path = write(folder / "rows.jsonl", {"image": image, "question": "q", "answer": "a"})
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{expected}"):
        converted("table", path)


def test_columns_templates_and_constants(folder: Path) -> None:
    rows = [{"Front": "a.png", "back": "b.png", "meta": {"q": "How {much}?"}, "price": 2.5, "n": "007", "kind": "x"}]
    columns = {"image": ["front", "back"], "question": "{META.q} {{EUR}}", "answer": "No. {n}: {price}", "id": "row-{n}",
               "system": "Be brief.", "meta": "kind"}  # fmt: skip
    (found,) = converted("table", write(folder / "rows.jsonl", *rows), columns=columns)
    assert found.turns[0].user == "How {much}? {EUR}" and found.turns[0].assistant == "No. 007: 2.5"
    assert (found.id, found.turns[0].system, found.meta, len(found.images)) == (
        "row-007",
        "Be brief.",
        {"kind": "x"},
        2,
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": "qestion"}, "no column `qestion`; .*did you mean `question`"),
        ({"question": "{qestion}?"}, "no column `qestion`; .*did you mean `question`"),
        ({"question": "{question"}, "expected '}' before end of string; write literal braces as {{ and }}"),
        ({"image": "What is it?"}, "no column `What is it?`"),
        ({"anwser": "answer"}, "columns: got 'anwser'; expected roles .*did you mean `answer`"),
        ({"answer": "{empty}"}, "column `empty`: empty or missing"),
        ({"options": "empty"}, "field `options`: got None; expected a list of 2 to 26"),
    ],
)  # fmt: skip
def test_wrong_columns_are_named(folder: Path, columns: dict, expected: str) -> None:
    path = write(folder / "rows.jsonl", {"image": "a.png", "question": "q", "answer": "a", "empty": None})
    with pytest.raises(DataError, match=expected.replace("{{", r"\{\{").replace("}}", r"\}\}").replace("?`", r"\?`")):
        converted("table", path, columns=columns)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("table", {"promt_suffix": "x"}, "got 'promt_suffix'; .*did you mean `prompt_suffix`"),
        ("ucf101", {"frmes": "8"}, "got 'frmes'; .*did you mean `frames`"),
        ("ucf101", {"frames": "x"}, "field `frames`: got 'x': Input should be a valid integer"),
        ("cauldron", {"file": "x"}, "got 'file'; format cauldron accepts split, turns"),
    ],
)
def test_unknown_options_are_refused(tmp_path: Path, kind: str, options: dict, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        convert_files(kind, tmp_path, tmp_path / "out", "train", options=options)
    with pytest.raises(SettingsError, match="field `rows`: got 'x:'"):
        convert_files("table", tmp_path, tmp_path / "out", "train", rows="x:")


def test_every_format_has_options_that_exist() -> None:
    assert set(FORMAT_OPTIONS) == set(FORMATS)
    assert {name for names in FORMAT_OPTIONS.values() for name in names} == set(Options.model_fields)


def test_rows_without_answers_can_be_read_and_not_trained_on(folder: Path) -> None:
    path = write(folder / "rows.jsonl", {"image": "a.png", "question": "q", "answer": ""})
    for unlabelled in (True, False):
        options = Options(unlabelled=unlabelled)
        (found,) = FORMATS["table"](Inputs([path], folder, "new", "demo", options))
        assert isinstance(found, Rejection) is not unlabelled
        if not isinstance(found, Rejection):
            assert found.turns[0].answers == ()
    with pytest.raises(DataError, match=r"field `conversations.0..assistant`"):
        converted("table", path, unlabelled=True)


def chat(*messages: tuple[str, object], **fields: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def test_chats_of_other_trainers(folder: Path) -> None:
    text = {"type": "text", "text": "What?"}
    url = f"data:image/png;base64,{BASE64}"
    write_clip(folder / "clip.avi", 16)
    parts = [
        [{"type": "image"}, text],  # TRL, with the column images
        [{"type": "image_url", "image_url": {"url": url}}, text],  # OpenAI
        [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"}],
        [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}, text],  # Anthropic
        [{"type": "image", "image": "a.png"}, text],
        "<image>What?", "What?<image>", "What?",
    ]  # fmt: skip
    rows = [
        chat(("system", "Be brief."), ("user", part), ("assistant", [{"type": "text", "text": "A box."}]),
             images=["a.png"] if number in (0, 5, 6, 7) else None)
        for number, part in enumerate(parts)
    ]  # fmt: skip
    for example in converted("messages", write(folder / "rows.jsonl", *rows)):
        (turn,) = example.turns
        assert (turn.system, turn.user, turn.assistant, len(turn.images)) == ("Be brief.", "What?", "A box.", 1)
    several = chat(
        ("user", "<video>\nFirst <image> or <image>?"), ("assistant", "x"), ("system", "Now in German."), ("user", "<image> Und?"),
        ("assistant", "y"), images=["a.png", "b.png", "sub/c;d.png"], videos=["clip.avi"],
    )  # fmt: skip
    (found,) = converted("sharegpt", write(folder / "rows.jsonl", several), frames=4)
    assert [len(turn.images) for turn in found.turns] == [6, 1]
    assert [turn.user for turn in found.turns] == ["First image 5 or image 6?", "Und?"]
    assert [turn.system for turn in found.turns] == ["", "Now in German."]
    pair = {"prompt": several["messages"][:1], "completion": several["messages"][1:2], "images": ["a.png", "b.png"]}  # type: ignore[index]
    pair["prompt"] = [{"role": "user", "content": "Which?"}]
    (found,) = converted("messages", write(folder / "rows.jsonl", pair), columns={"messages": ["prompt", "completion"]})
    assert (found.turns[0].user, found.turns[0].assistant, len(found.images)) == ("Which?", "x", 2)


def test_pairs_of_a_question_and_an_answer(folder: Path) -> None:
    row = {
        "system": "s",
        "conversation": [{"human": "<image>a", "assistant": "b"}, {"human": "c", "assistant": "d"}],
        "images": ["a.png"],
    }
    (found,) = converted("sharegpt", write(folder / "rows.jsonl", row))
    assert [(turn.system, turn.user, turn.assistant) for turn in found.turns] == [("s", "a", "b"), ("", "c", "d")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(("user", "a"), ("user", "b")), "got user; expected user and assistant messages in turn"),
        (chat(("user", "a"), ("assistant", "<image>b"), images=["a.png"]), "no picture in an answer"),
        (chat(("user", [{"type": "audio"}]), ("assistant", "b")), r"content\[0\]`: got .*expected type text, image"),
        (chat(("user", "a"), ("tool", "b")), r"messages\[1\]\.role`: .*expected user, assistant or system"),
        (chat(("user", None), ("assistant", "b")), r"messages\[0\]\.content`: got None; expected some text"),
        ({"messages": [{"from": "bot", "value": "a"}]}, r"messages\[0\]\.from`: .*expected human, gpt or system"),
        (chat(("user", "<image>a"), ("assistant", "b")), "1 <image> marks; expected at most"),
        ({"messages": "[broken"}, "expected a list of messages"),
    ],
)
def test_a_chat_that_cannot_be_taken(folder: Path, row: dict, expected: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{expected}"):
        converted("messages", write(folder / "rows.jsonl", row))


def test_ids_of_the_source_are_kept_and_unique_over_splits(folder: Path) -> None:
    rows = [chat(("user", "q"), ("assistant", "a"), id=name) for name in ("7", "7", 8, "7")]
    write(folder / "rows.jsonl", *rows)
    assert [e.id for e in converted("llava", folder / "rows.jsonl")] == ["7", "train-7", "8", "train-7-2"]
    assert [e.id for e in converted("llava", folder / "rows.jsonl", "val")] == ["val-7", "val-7-2", "val-8", "val-7-3"]


def test_the_own_jsonl_made_by_hand(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "images/a.png").write_bytes(PNG)
    turn = {"images": ["a.png"], "system": "s", "user": "q", "assistant": "a", "answers": ["a", "b"]}
    record = {"id": "1", "source": "mine", "conversations": [turn], "meta": {"kind": "x"}}
    write(source / "train.jsonl", record)
    write(source / "val.jsonl", {**record, "id": "2"})
    (found,) = converted("conversations", source)
    assert (found.id, found.turns[0].system, found.turns[0].accepted, found.meta) == (
        "1",
        "s",
        ("a", "b"),
        {"kind": "x"},
    )
    assert [example.id for example in converted("conversations", source, "val")] == ["2"]
    write(source / "train.jsonl", {**record, "idd": 1})
    with pytest.raises(DataError, match=r"train\.jsonl:1: field `idd`: unknown"):
        converted("conversations", source)


def test_image_folders_with_metadata_and_a_text_each(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    (source / "validation").mkdir()
    for name in ("train/a.jfif", "train/b.jpg", "validation/c.jpg"):
        (source / name).write_bytes(picture_bytes(len(name)))
        (source / name).with_suffix(".txt").write_text(f"Text of {name}\n")
    (source / "LICENSE").write_text("free")
    (source / "train/list.jsonl").write_text("{}")
    (source / "train/metadata.csv").write_text("file_name,question,kind\na.jfif,What?,x\nb.jpg,Who?,y\nnone.jpg,?,z\n")
    columns = {"answer": "text"}
    found = converted("imagefolder", source, columns=columns)
    assert [(e.turns[0].user, e.turns[0].assistant) for e in found] == [
        ("What?", "Text of train/a.jfif"),
        ("Who?", "Text of train/b.jpg"),
    ]
    rejected = [json.loads(line)["where"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert rejected == ["LICENSE", "train/list.jsonl", "train/none.jpg"]
    (val,) = converted("imagefolder", source, "val", columns={**columns, "question": "Describe it."})
    assert val.turns[0].assistant == "Text of validation/c.jpg"


def test_files_of_an_image_folder_that_are_no_pictures_are_named_and_the_rest_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.jpg", "no_suffix", "renamed.bin"):
        (source / name).write_bytes(picture_bytes(1))
    (source / "logo.svg").write_text("<svg xmlns='x'/>")
    (source / "icon.ico").write_bytes(b"\0\0\1\0")
    (source / "notes").write_text("text")
    found = converted("imagefolder", source, columns={"answer": "file_name"})
    assert [example.turns[0].assistant for example in found] == ["a.jpg", "no_suffix", "renamed.bin"]
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["icon.ico", "logo.svg", "notes"]
    assert lines[1]["reason"].startswith("not a readable picture: XML or an SVG drawing; expected one of JPEG")
    (source / "b.png").write_bytes(b"x")  # a picture by its name is an error, not another file
    with pytest.raises(DataError, match=r"b\.png: not a readable picture"):
        converted("imagefolder", source, columns={"answer": "file_name"})


def test_what_datasets_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": PNG, "path": None}, "question": f"q{k}", "answer": "007"} for k in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("question", "answer"), datasets.Value("string"))}
    )
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "validation": saved.select([1])}).save_to_disk(tmp_path / "several")
    assert [e.turns[0].user for e in converted("table", tmp_path / "one")] == ["q0", "q1", "q2"]
    (val,) = converted("table", tmp_path / "several", "val")
    assert val.turns[0].user == "q1" and (tmp_path / "out/images" / val.images[0]).read_bytes() == PNG
    with pytest.raises(DataError, match="no split 'test'; expected one of train, validation"):
        converted("table", tmp_path / "several", "test")
    hub = tmp_path / "hub"
    for config in ("en", "de"):
        for split in ("train", "validation"):
            (hub / config).mkdir(parents=True, exist_ok=True)
            write_parquet(hub / config / f"{split}-00000.parquet", [{**rows[0], "question": config + split}])
    card = "configs:\n" + "".join(
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: {c}/{s}-*}}\n" for s in ("train", "validation"))
        for c in ("en", "de")
    )
    (hub / "README.md").write_text(f"---\n{card}---\n")
    assert converted("table", hub, "val", config="de")[0].turns[0].user == "devalidation"
    with pytest.raises(DataError, match=r"4 files .* split 'train' \(Config name is missing"):
        converted("table", hub)
    with pytest.raises(DataError, match="BuilderConfig 'fr' not found"):
        converted("table", hub, config="fr")


def test_a_tar_file_of_samples(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds/train-000.tar", "w") as archive:
        for k in range(3):
            for suffix, data in (("png", PNG), ("json", json.dumps({"q": f"q{k}", "a": "007"}).encode())):
                member = tarfile.TarInfo(f"{k:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    columns = {"image": "png", "question": "json.q", "answer": "json.a", "id": "__key__"}
    found = converted("table", tmp_path / "wds", columns=columns)
    assert [(e.id, e.turns[0].user, e.turns[0].assistant) for e in found] == [
        (f"00{k}", f"q{k}", "007") for k in range(3)
    ]


def test_pages_of_a_document(folder: Path) -> None:
    pages = [Image.new("L", (30, 40), grey) for grey in (10, 100, 200)]
    pages[0].save(folder / "scan.tif", save_all=True, append_images=pages[1:])
    rows = [
        {"image": "scan.tif", "question": "all", "answer": "a"},
        {"image": "scan.tif", "question": "q", "answer": "a", "page": 2},
    ]
    whole, second = converted("table", write(folder / "rows.jsonl", *rows))
    assert whole.images == tuple(f"train/scan.tif.{page}.png" for page in (1, 2, 3))
    assert second.images == ("train/scan.tif.2.png",)
    assert Image.open(folder / "out/images" / second.images[0]).getpixel((0, 0)) in (100, (100, 100, 100))
    with pytest.raises(DataError, match="page"):
        converted("table", write(folder / "rows.jsonl", {**rows[1], "page": 4}))


def test_columns_that_only_later_rows_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text-only chats often come first; the pictures of the chats after them must not get lost."""
    rows = [chat(("user", f"q{k}"), ("assistant", "a")) for k in range(30)]
    rows += [chat(("user", "<image>q"), ("assistant", "a"), images=["a.png"], id="seen")]
    *texts, last = converted("messages", write(folder / "rows.jsonl", *rows))
    assert (last.id, last.images) == ("seen", ("train/a.png",)) and not any(each.images for each in texts)
    assert "31 examples, 1 picture, 0 rejected; 30 examples without a picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("table", chat(("user", "q"), images=["a.png"]), "column `question`: missing; .*format `messages`"),
        ("table", {"data": [{"image": "a.png"}]}, "column `image`: missing; .*option `field: data`"),
        ("table", {"image": "a.png", "answer": "a"}, "`question: NAME`, or a constant text"),
        ("messages", {"image": "a.png", "question": "q"}, "column `messages`: missing; .*format `table`"),
        ("table", {"image": "a.png", "question": "q", "answer": ""}, "field `answer`: got ''; .*option `unlabelled`"),
        ("table", {"image": "none.png", "question": "q", "answer": "a"}, "no such file in .*option `images_dir`"),
    ],
)
def test_a_refusal_names_what_would_take_the_row(folder: Path, kind: str, row: dict, expected: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{expected}"):
        converted(kind, write(folder / "rows.jsonl", row))


def test_when_every_row_is_rejected_the_first_reason_is_told(folder: Path) -> None:
    path = write(folder / "rows.jsonl", {"image": "none.png", "question": "q", "answer": "a"})
    with pytest.raises(
        DataError, match=r"no valid example \(all rows, 1 rejected\).*rows\.jsonl:1: field `image`: got 'none.png'"
    ):
        convert_files("table", path, folder.parent / "out", "train", on_error="skip")


@pytest.mark.parametrize("split", ["../x", "a/b", "", ".."])
def test_a_split_cannot_leave_the_output_folder(folder: Path, split: str) -> None:
    path = write(folder / "rows.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match="split: got"):
        converted("table", path, split, columns={"image": []})
    assert not list(folder.parent.glob("x*"))


def test_the_delimiter_as_a_shell_passes_it_on(folder: Path) -> None:
    (folder / "rows.csv").write_text("image\tquestion, if any\tanswer\na.png\tq\ta\n")
    (found,) = converted("table", folder / "rows.csv", delimiter=r"\t", columns={"question": "question, if any"})
    assert found.turns[0].user == "q"
    with pytest.raises(SettingsError, match="field `delimiter`: got ';;': expected one character"):
        converted("table", folder / "rows.csv", delimiter=";;")


def test_pictures_without_a_class_need_an_answer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "cat/deep").mkdir(parents=True)
    (source / "a.jpg").write_bytes(picture_bytes(1))
    (source / "metadata.csv").write_text("file_name,text\na.jpg,one\n")
    with pytest.raises(DataError, match=r"column `answer`: missing; .*got file_name, text"):
        converted("imagefolder", source)
    (source / "metadata.csv").unlink()
    (source / "a.jpg").rename(source / "cat/a.jpg")
    (source / "cat/deep/b.jpg").write_bytes(picture_bytes(2))
    (found,) = converted("imagefolder", source)
    assert found.turns[0].assistant == "cat" and "deep" not in found.turns[0].user
