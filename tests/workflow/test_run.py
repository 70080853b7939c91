"""One small workflow run for real, in a copy of the repository: data, base model, training, evaluation, speed, report.

The tests of this file build on each other's results, in order.
"""

import csv
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_run import ROWS, edit, make, planned, snakemake

from phi3v.provenance import digests

BROKEN = "phi35-nowhere-full-bf16"
METRICS = ["anls", "my_metrics.py:length"]


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory):
    """The small run, with a row whose source cannot be read."""
    folder = make(root, tmp_path_factory.mktemp("repository"), rows={**ROWS, "accuracy": [*ROWS["accuracy"], BROKEN]})
    edit(folder / "config/demo.yaml", lambda values: values["files"]["datasets"].append("config/nowhere.yaml"))
    missing = {"url": "file:results/nowhere.parquet", "format": "cauldron"}
    entry = {"title": "nowhere", "metric": "accuracy", "splits": {"train": missing, "val": missing}}
    # The second protocol, from files in the authors' own format.
    official = folder / "results/official/docvqa"
    (official / "documents").mkdir(parents=True)
    pages = []
    for i in range(4):
        Image.new("RGB", (60 + 10 * i, 80), (250, 240, 200 + 10 * i)).save(official / f"documents/{i}.png")
        page = {"questionId": i, "question": "what is the total ?", "image": f"documents/{i}.png"}
        pages.append({**page, "answers": ["12", "12.0"]})
    (official / "val_v1.0.json").write_text(json.dumps({"data": pages}))
    split = {"url": "file:results/official/docvqa", "format": "docvqa_official"}
    slips = {"title": "slips, as DocVQA's own split", "metric": "anls", "splits": {"val": split}}
    # A score of one's own beside the recipe's, and pictures without labels.
    (folder / "my_metrics.py").write_text(
        "def length(lines):\n    return [1 / (1 + len(l['prediction'])) for l in lines]\n"
    )
    docvqa = {"official": "slips", "metrics": METRICS}
    edit(
        folder / "config/demo/datasets.yaml",
        lambda values: values.update(docvqa={**values["docvqa"], **docvqa}, slips=slips),
    )
    scans = {"row": ROWS["accuracy"][0], "folder": "results/official/docvqa/documents", "question": "what is it ?"}
    edit(folder / "config/demo.yaml", lambda values: values.update(predictions={"scans": scans}))
    # The source is there while the run is planned and empty when it is read.
    (folder / "config/nowhere.yaml").write_text(yaml.safe_dump({"nowhere": entry}))
    (folder / "results/nowhere.parquet").write_bytes(b"")
    table = folder / "config/digits/accuracy.tsv"
    digits = table.read_text().splitlines()[-1]
    table.write_text(table.read_text() + digits.replace("digits", "nowhere") + "\n")
    return folder


def test_a_failed_job_leaves_the_others_running_and_a_report_of_them(copy):
    code, output, _ = snakemake(copy)
    assert code != 0
    results = copy / "results/demo"
    for row in ROWS["accuracy"]:
        assert (results / f"evaluate/{row}/manifest.json").is_file(), output[-6000:]
        assert (results / f"train/{row}/final").is_dir()
    assert (results / f"speed/{ROWS['speed'][0]}/manifest.json").is_file()
    # The log's path and its last lines are on the screen.
    assert re.search(r"results/data/nowhere-\w+/logs/convert\.log", output)
    assert "nowhere.parquet" in output
    # The command itself failed, though its output went through a pipe.
    assert "MissingOutputException" not in output
    page = (results / "report-partial/index.html").read_text()
    assert "Partial report: 3 of 4 rows are done" in page
    assert BROKEN in page
    # The plan was made before anything else, and stands in the report beside what happened.
    planned_rows = {row["row"]: row for row in json.loads((results / "plan/plan.json").read_text())["rows"]}
    assert planned_rows[ROWS["accuracy"][0]]["images_per_second"] > 0
    assert '<section id="plan"' in page


def test_the_rest_of_the_run_completes_the_report(copy):
    values = yaml.safe_load((copy / "config/demo.yaml").read_text())
    values["rows"] = ROWS
    (copy / "config/demo.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    code, output, _ = snakemake(copy)
    assert code == 0, output[-6000:]
    assert "finetune" not in planned(output)
    report = copy / "results/demo/report"
    header, *lines = [line.split("\t") for line in (report / "accuracy.tsv").read_text().splitlines()]
    assert header[:6] == ["row", "model", "dataset", "method", "dtype", "metric"]
    for column in ("before", "after", "control", "n", "published"):
        assert column in header
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    for row in ROWS["accuracy"]:
        assert 0 <= float(rows[row]["after"]) <= 100
        assert int(rows[row]["n"]) == (24 if "docvqa" in row else 401)
    docvqa = rows[ROWS["accuracy"][0]]
    assert (docvqa["official_split"], docvqa["official_metric"], docvqa["official_n"]) == ("done", "official_anls", "4")
    assert rows[ROWS["accuracy"][1]]["official_split"] == ""
    page = (report / "index.html").read_text()
    assert "tokens-docvqa" in page  # the data's statistics were counted on the way
    speed = [line.split("\t") for line in (report / "speed.tsv").read_text().splitlines()]
    assert ROWS["speed"][0] in [line[0] for line in speed]
    assert "demo: tiny model, synthetic data, not comparable" in (report / "index.html").read_text()


def test_a_score_of_ones_own_is_made_of_the_predictions(copy):
    row, metric = ROWS["accuracy"][0], "my_metrics.py:length"
    lines = (copy / f"results/demo/evaluate/{row}/after/predictions.jsonl").read_text().splitlines()
    expected = [100 / (1 + len(json.loads(line)["prediction"])) for line in lines]
    found = json.loads((copy / f"results/demo/score/{row}/after/metrics.json").read_text())
    assert found["metric"] == "anls" and found["n"] == 24
    assert found["more"][metric]["score"] == pytest.approx(sum(expected) / 24, abs=1e-3)


def test_pictures_without_labels_are_answered(copy):
    code, output, _ = snakemake(copy, "predictions")
    assert code == 0, output[-6000:]
    assert {name: n for name, n in planned(output).items() if name != "total"} == {"predict": 1, "predictions": 1}
    with open(copy / "results/demo/predictions/scans/answers.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(line["question"] == "what is it ?" and 0 < float(line["probability"]) <= 1 for line in lines)


def test_snakemakes_own_report_holds_page_tables_and_captions(copy):
    code, output, _ = snakemake(copy, "--report", "report.zip")
    assert code == 0, output[-3000:]
    with zipfile.ZipFile(copy / "report.zip") as archive:
        files = {Path(name).name: name for name in archive.namelist()}
        assert {"index.html", "accuracy.tsv", "speed.tsv", "tables.md", "report.html"} <= set(files)
        page = (copy / "results/demo/report/index.html").read_bytes()
        assert archive.read(files["index.html"]) == page
        shown = archive.read(files["report.html"]).decode()
    for text in (
        '"Tables": {"Other"',
        "ready to paste",
        "in one self-contained page",
        "demo: tiny model, synthetic data",
    ):
        assert text in shown


def test_what_was_observed_is_recorded(copy):
    train = copy / "results/demo/train"
    lora = json.loads((train / ROWS["accuracy"][0] / "observed.json").read_text())
    assert lora["activation_dtype"] in ("bf16", "bfloat16")
    assert lora["world_size"] == 2
    census = json.loads((train / ROWS["accuracy"][1] / "census.json").read_text())
    assert census["groups"]["decoder"]["with_gradient"] > 0
    manifest = json.loads((train / ROWS["accuracy"][0] / "manifest.json").read_text())
    assert manifest["versions"]["torch"].startswith("2.")


@pytest.mark.verify
def test_another_folder_gives_the_same_bytes(copy, tmp_path):
    """Of a row's data, training and evaluations; `make reproduce` repeats the whole demo from scratch."""
    row = ROWS["accuracy"][1]
    again = shutil.copytree(copy, tmp_path / "again", symlinks=True)
    results = again / "results"
    for pattern in ("data/digits-*", f"demo/train/{row}", f"demo/evaluate/{row}", "demo/evaluate/base/*digits*"):
        (folder,) = results.glob(pattern)
        shutil.rmtree(folder)
    kept = digests.digests(results, "demo")
    code, output, _ = snakemake(again, row)
    assert code == 0, output[-6000:]
    assert {"convert": 1, "finetune": 1, "evaluate": 1, "evaluate_base": 1}.items() <= planned(output).items()
    first, second = (digests.digests(folder / "results", "demo") for folder in (copy, again))
    made = second.keys() - kept.keys()
    # By kind of file, so that an empty pattern cannot pass.
    for part in (
        "data/digits-",
        f"train/{row}/final/",
        f"evaluate/{row}/after/",
        f"evaluate/{row}/control/",
        "/before/",
    ):
        assert [name for name in made if part in name], part
    different = digests.first_difference(second, {name: first[name] for name in second})
    assert different is None, digests.explain(copy / "results" / different, again / "results" / different)


def test_the_planner_counts_what_the_data_are(copy):
    """Tokens, tiles and labels of the datasets' `workload` against the converted data."""
    from phi3v.data.dataset import ConversationDataset
    from phi3v.data.lengths import split_statistics
    from phi3v.model import Phi3VProcessor
    from phi3v.planning.fits import mean_and_longest
    from phi3v.settings import dataset_key, load_run, model_key

    run = load_run(copy / "config/demo.yaml", copy)
    model = run.models["phi3-vision"]
    processor = Phi3VProcessor.from_pretrained(copy / "results/models" / model_key("phi3-vision", model))
    for name in ("docvqa", "digits"):
        entry = run.datasets[name]
        folder = copy / "results/data" / dataset_key(name, entry)
        seen = split_statistics(ConversationDataset(folder, "train", processor))
        work, _ = mean_and_longest(entry.workload, model.geometry, entry.num_crops)
        assert work.tiles == seen["tiles"]["mean"], name
        # The small run's tokenizer has seen fewer words, so that some are more tokens than in the demo.
        assert work.tokens == pytest.approx(seen["tokens"]["mean"], rel=0.1), name
        assert work.labels == pytest.approx(seen["answer_tokens"]["mean"], rel=0.4), name


def test_a_second_run_does_nothing(copy):
    code, output, seconds = snakemake(copy)
    assert code == 0
    assert "Nothing to be done" in output
    assert seconds < 60  # goal 15 s on an idle machine


def test_a_rows_learning_rate_repeats_that_row_and_the_report(copy):
    values = yaml.safe_load((copy / "config/demo.yaml").read_text())
    values["overrides"][ROWS["accuracy"][0]]["learning_rate"] = 0.003
    (copy / "config/demo.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    code, output, _ = snakemake(copy, "-n")
    assert code == 0
    jobs = planned(output)
    assert {name: n for name, n in jobs.items() if name not in ("total", "all")} == {
        "run_settings": 1, "plan_run": 1, "finetune": 1, "evaluate": 1, "evaluate_official": 1, "score": 1, "report": 1
    }  # fmt: skip


def test_an_edited_environment_docstring_or_comment_repeats_nothing(copy):
    values = yaml.safe_load((copy / "config/demo.yaml").read_text())
    values["overrides"][ROWS["accuracy"][0]]["learning_rate"] = 0.002
    (copy / "config/demo.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for path, old, new in (
        ("envs/train-cpu.yaml", "torch==2.13.0", "torch==2.13.1"),
        ("scripts/finetune.py", '"""', '"""Edited. '),
        ("workflow/rules/train.smk", "# Checkpoints are no outputs", "# Edited. Checkpoints are no outputs"),
    ):
        text = (copy / path).read_text()
        assert old in text
        (copy / path).write_text(text.replace(old, new, 1))
    code, output, _ = snakemake(copy, "-n")
    assert code == 0
    assert "Nothing to be done" in output
