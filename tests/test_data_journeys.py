"""Five journeys from files that people have to rows that train: one entry each, through the same steps as a run."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from data_examples import picture_bytes, write_parquet

from phi3v.data.conversations import Conversation, DataError, read_conversations
from phi3v.data.convert import convert_dataset, convert_files, dataset_sources, fetch_pictures
from phi3v.data.fetch import fetch
from phi3v.settings import Dataset, validate


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing on the screen."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with three pictures."""
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def journey(name: str, entry: str) -> dict[str, list[Conversation]]:
    """Fetch and convert an entry of a datasets file; what its splits hold."""
    assert len(entry.strip().splitlines()) <= 15
    dataset = validate(Dataset, yaml.safe_load(entry)[name], name)
    fetch([(split.url, split.revision) for split in dataset.splits.values()], "source")
    fetch_pictures(dataset_sources(name, dataset, "source"))
    convert_dataset(name, dataset, "source", "out")
    description = json.loads(Path("out/dataset.json").read_text())
    return {split: list(read_conversations(f"out/{split}.jsonl")) for split in description["splits"]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHI3V_DOWNLOAD_PAUSE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_product_prices_from_rows_with_addresses_of_pictures(web: str) -> None:
    rows = [
        {"title": f"Lamp {k} “Öl”", "full_price": f"€ {k}.50", "Image_URL": f"{web}/{k % 3}.jpg", "shop": f"s{k // 2}"}
        for k in range(10)
    ]
    rows[4]["Image_URL"] = f"{web}/gone.jpg"
    Path("hub/data").mkdir(parents=True)
    write_parquet(Path("hub/data/train-00000-of-00002.parquet"), rows[:6])
    write_parquet(Path("hub/data/train-00001-of-00002.parquet"), rows[6:])
    write_parquet(Path("hub/data/test-00000-of-00001.parquet"), rows[:1])
    found = journey(
        "prices",
        """
prices:
  title: product prices
  metric: accuracy
  on_error: skip
  split: {val: 0.2, group: shop}
  splits:
    train:
      url: "file:hub"
      format: table
      options:
        columns:
          image: image_url
          question: "What is shown, and what does it cost?"
          answer: "Product: {title}, price: {full_price}"
""",
    )
    answers = {split: [example.turns[0].assistant for example in examples] for split, examples in found.items()}
    assert answers["train"][0] == "Product: Lamp 0 “Öl”, price: € 0.50"
    assert sum(map(len, answers.values())) == 9
    shops = {split: {int(answer.split()[2]) // 2 for answer in texts} for split, texts in answers.items()}
    assert len(shops["val"]) == 1 and not shops["val"] & shops["train"]
    assert Path("out/images", found["train"][1].images[0]).read_bytes() == picture_bytes(1)
    (rejected,) = map(json.loads, Path("out/rejected.jsonl").read_text().splitlines())
    assert (
        rejected["where"] == "train-00000-of-00002.parquet: row 4" and "gone.jpg: not downloaded" in rejected["reason"]
    )
    shutil.rmtree("web")  # the cache serves from now on
    before = Path("out/train.jsonl").read_bytes()
    shutil.rmtree("out")
    dataset = {"title": "t", "metric": "accuracy", "on_error": "skip", "split": {"val": 0.2, "group": "shop"}}
    options = {"columns": {"image": "image_url", "question": "What is shown, and what does it cost?",
                           "answer": "Product: {title}, price: {full_price}"}}  # fmt: skip
    split = {"url": "file:hub", "format": "table", "options": options}
    convert_dataset("prices", validate(Dataset, {**dataset, "splits": {"train": split}}, "x"), "source", "out")
    assert Path("out/train.jsonl").read_bytes() == before


def test_a_fetched_file_that_is_no_picture_is_named_by_its_address(web: str) -> None:
    Path("web/page.png").write_text("<html>not found</html>")
    Path("rows.csv").write_text(f"image,question,answer\n{web}/page.png,q,a\n")
    with pytest.raises(DataError, match=rf"rows\.csv:2: {web}/page\.png: not a readable picture.*an HTML page"):
        convert_files("table", Path("rows.csv"), "out", "train")


def test_formulae_to_latex_from_parquet() -> None:
    latex = [r"\frac{a}{b} \\ \sum_{i=1}^{n} x_i", r"\text{na\"ive} \{x\}", r"\alpha_{1} & \beta"]
    for split in ("train", "validation"):
        rows = [{"image": {"bytes": picture_bytes(k, "PNG"), "path": f"{k}.png"}, "text": text}
                for k, text in enumerate(latex)]  # fmt: skip
        write_parquet(Path(f"{split}.parquet"), rows)
    found = journey(
        "latex",
        """
latex:
  title: formulae to LaTeX
  metric: edit_similarity
  splits:
    train: &rows
      url: "file:train.parquet"
      format: table
      options: &columns {columns: {question: "Write the formula in LaTeX.", answer: text}}
    val:
      url: "file:validation.parquet"
      format: table
      options: *columns
""",
    )
    assert [example.turns[0].assistant for example in found["val"]] == latex
    assert Path("out/images", found["train"][2].images[0]).read_bytes() == picture_bytes(2, "PNG")


def test_gauge_readings_from_jsonl_with_options() -> None:
    Path("gauges").mkdir()
    options = ["0.2 MPa", "0.4 MPa", "0.6 MPa", "0.8 MPa"]
    rows = [
        {"image": f"./g{k}.png", "question": "What does the gauge read?", "options": options,
         "answer": [options[k % 4], "ABCD"[k % 4], k % 4][k % 3], "kind": f"type{k % 2}"}
        for k in range(12)
    ]  # fmt: skip
    for k in range(12):
        Path(f"gauges/g{k}.png").write_bytes(picture_bytes(k, "PNG"))
    Path("gauges/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = journey(
        "gauges",
        """
gauges:
  title: gauge readings
  metric: multiple_choice
  group_by: kind
  split: {val: 0.25, stratify: kind}
  splits:
    train:
      url: "file:gauges"
      format: table
      options: {columns: {options: options}}
""",
    )
    assert len(found["val"]) == 3 and {example.meta["kind"] for example in found["val"]} == {"type0", "type1"}
    asked = {example.id: example.turns[0] for examples in found.values() for example in examples}
    for k in range(12):
        turn = asked[f"gauges-train-{k:08d}"]
        assert turn.user == "What does the gauge read?\nA. 0.2 MPa\nB. 0.4 MPa\nC. 0.6 MPa\nD. 0.8 MPa"
        assert turn.assistant == "ABCD"[k % 4]


def test_questions_on_chest_x_rays_from_a_json_array() -> None:
    Path("xrays/images").mkdir(parents=True)
    for k in range(4):
        Path(f"xrays/images/p{k}.png").write_bytes(picture_bytes(k, "PNG"))
    rows = [
        {"img_id": f"images\\p{k % 4}.png", "question": f"Is lobe {k} clear?", "answer": [True, 3, "no", {"b": 1, "a": "é"}][k % 4],
         "qid": 100 + k, "patient_id": k % 4}
        for k in range(20)
    ]  # fmt: skip
    Path("xrays/vqa.json").write_text(json.dumps(rows, indent=1))
    found = journey(
        "xrays",
        """
xrays:
  title: questions on chest X-rays
  metric: accuracy
  split: {val: 0.25, group: patient_id}
  splits:
    train:
      url: "file:xrays"
      format: table
      options: {file: vqa.json, columns: {image: img_id, id: qid}, pixel_range: real}
""",
    )
    assert (len(found["train"]), len(found["val"])) == (15, 5)
    pictures = {
        split: {example.images[0].partition("/")[2] for example in examples} for split, examples in found.items()
    }
    assert not pictures["train"] & pictures["val"]
    answers = {example.id: example.turns[0].assistant for examples in found.values() for example in examples}
    assert [answers[str(100 + k)] for k in range(4)] == ["true", "3", "no", '{"a": "é", "b": 1}']


def test_receipts_to_fields_from_pictures_with_a_json_file_each() -> None:
    Path("receipts/scans").mkdir(parents=True)
    Path("receipts/fields").mkdir()
    fields = [
        {"shop": 'Café "Zum Öl"', "lines": ["2 x Brot\n1 x Käse", "Trinkgeld"], "total": 12.5, "paid": True},
        {"total": 7, "shop": "日本橋\\2", "lines": [], "paid": False},
        {"shop": "x", "total": None},
    ]
    for k, value in enumerate(fields):
        Path(f"receipts/scans/r{k}.jpg").write_bytes(picture_bytes(k))
        Path(f"receipts/fields/r{k}.json").write_text(
            json.dumps(value, ensure_ascii=k != 0, indent=2), encoding="utf-8"
        )
    Path("receipts/scans/._r0.jpg").write_bytes(b"Mac")
    Path("receipts/scans/Thumbs.db").write_bytes(b"Windows")
    Path("receipts/fields/extra.json").write_text("{}")
    Path("receipts/scans/clip.mp4").write_bytes(b"x")
    found = journey(
        "receipts",
        """
receipts:
  title: receipts to fields
  metric: json_fields
  split: {val: 0.34}
  splits:
    train:
      url: "file:receipts"
      format: imagefolder
      options: {columns: {question: "Read the receipt as JSON.", answer: json}}
""",
    )
    examples = sorted((e for some in found.values() for e in some), key=lambda e: e.id)
    assert [json.loads(example.turns[0].assistant) for example in examples] == fields
    # The rest of the way: a tiny model makes one step with them.
    from training_fixtures import train_here, write_model

    write_model(Path("model"))
    trained = train_here(Path(), Path("trained"), data_dir="out", max_steps=1, batch_size=2, micro_batch_size=1)
    assert (trained / "final").is_dir()
    assert examples[0].turns[0].assistant.startswith('{"lines": ["2 x Brot\\n1 x Käse", "Trinkgeld"], "paid": true,')
    lines = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    reasons = {line["where"]: line["reason"] for line in lines}
    assert reasons.keys() == {"fields/extra.json", "scans/clip.mp4"}
    assert reasons["fields/extra.json"] == "no picture has this name"
    assert reasons["scans/clip.mp4"].startswith("not a readable picture; expected one of JPEG")
    assert json.loads(Path("out/dataset.json").read_text())["splits"]["train"]["untaken"] == 2


@pytest.mark.parametrize("test", [0.0, 0.2])
def test_groups_never_straddle_splits_and_labels_keep_their_shares(test: float) -> None:
    from phi3v.data.convert import divide
    from phi3v.data.rows import Inputs
    from phi3v.settings import Division

    rows = [{"image": "", "who": k * 7 % 60, "label": "rare" if k * 7 % 60 < 12 else "common"} for k in range(600)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = Inputs([Path("rows.jsonl")], Path(), "train", "demo")
    drawn = []
    for seed in (0, 1):
        how = Division(val=0.1, test=test, seed=seed, group="WHO", stratify="label")
        parts = divide("table", inputs, how)
        assert parts == divide("table", inputs, how)
        drawn.append(parts)
        assert len({(row["who"], part) for row, part in zip(rows, parts, strict=True)}) == 60
        for label in ("rare", "common"):
            own = [part for row, part in zip(rows, parts, strict=True) if row["label"] == label]
            assert own.count("val") / len(own) == pytest.approx(0.1, abs=0.07)
            assert own.count("test") / len(own) == pytest.approx(test, abs=0.07)
        assert parts.count("val") == 60
    assert drawn[0] != drawn[1]
    with pytest.raises(DataError, match=r"split\.group: no column `whom`; expected one of image, who, label"):
        divide("table", inputs, Division(val=0.1, group="whom"))
