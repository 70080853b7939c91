"""The report's tables from finished, half-finished and damaged result folders."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from reporting_examples import manifest, write_pass, write_row, write_run, write_speed

from phi3v.reporting.build import build_report
from phi3v.reporting.tables import ACCURACY_COLUMNS, as_records, build_tables
from phi3v.settings import ReportSettings, SettingsError, load_run

ROW = "phi3-docvqa-full-bf16"


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    return write_run(root, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the finished run to damage; returns (run, results)."""
    run, results = finished
    shutil.copytree(results.parent, tmp_path / "results", ignore=shutil.ignore_patterns("data"))
    return run, tmp_path / "results" / results.name


def line_of(run, results, row=ROW):
    return next(
        line for line in build_tables(run, results).accuracy + build_tables(run, results).speed if line.row.row == row
    )


def report(root, results: Path, config="config/demo.yaml"):
    build_report(ReportSettings(config=str(root / config), results=str(results)))
    return results / "report"


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["row"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_a_finished_demo(root, finished, monkeypatch):
    monkeypatch.chdir(root)
    run, results = finished
    folder = report(root, results)
    accuracy = rows_of(folder / "accuracy.tsv")
    assert list(accuracy) and set(accuracy) == {job.row.row for job in run.accuracy}
    assert list(next(iter(accuracy.values())))[:11] == [
        "row", "model", "dataset", "method", "dtype", "metric", "before", "after", "control", "n", "published",
    ]  # fmt: skip
    row = accuracy[ROW]
    predictions = [
        json.loads(line) for line in (results / f"evaluate/{ROW}/after/predictions.jsonl").read_text().splitlines()
    ]
    assert float(row["after"]) == pytest.approx(sum(p["score"] for p in predictions), abs=1e-3)  # 100 examples
    assert float(row["published"]) == 83.65 and row["metric"] == "anls"
    assert float(row["after_minus_control_low"]) > 0
    # A demo is never held against the published figures.
    assert row["verdict"] == "not comparable" and row["after_minus_published"] == ""
    assert "learning_rate 5e-06 -> 0.002" in row["departures"]
    qlora = accuracy["phi3-hateful_memes-qlora-bf16"]
    assert qlora["linear4bit_layers"] == "30" and qlora["linear4bit_bytes"] == "123456"
    speed = rows_of(folder / "speed.tsv")
    assert speed["phi3-a100-full-flash-8gpu"]["verdict_reason"] == "2 CPU processes stand for 8 A100"
    assert float(speed["phi3-a100-full-flash-8gpu"]["speedup"]) == pytest.approx(6 / 5)
    page = (folder / "index.html").read_text()
    assert page.count("demo: tiny model, synthetic data, not comparable") >= 4
    assert "a published figure" in page and "an inference, not a fact" in page
    data = json.loads((folder / "report.json").read_text())
    assert data["comparable"] is False and len(data["accuracy"]) == len(run.accuracy)
    assert "| full | bf16 |" in (folder / "tables.md").read_text()
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "report"
    assert (folder / "index.html").stat().st_size < 5e6


def test_the_accuracy_table_holds_no_clock(root, changed, monkeypatch):
    """A repeated run takes other seconds and gives the same bytes; report.json tells the seconds."""
    monkeypatch.chdir(root)
    _, results = changed
    before = (report(root, results) / "accuracy.tsv").read_bytes()
    for path in results.glob("*/*/manifest.json"):
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "seconds": 98765.0, "finished": "2020-01-01T00:00:00+00:00"})
        )
    folder = report(root, results)
    assert (folder / "accuracy.tsv").read_bytes() == before
    assert 98765.0 in [row["train_seconds"] for row in json.loads((folder / "report.json").read_text())["accuracy"]]


def test_nothing_has_run_yet(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    folder = report(root, tmp_path / "empty", "config/config.yaml")
    accuracy = rows_of(folder / "accuracy.tsv")
    assert {row["status"] for row in accuracy.values()} == {"not run yet"}
    assert {row["reason"] for row in accuracy.values()} == {"training has not run yet"}
    assert all(row["after"] == "" for row in accuracy.values())
    assert len(accuracy) == 38 and len(rows_of(folder / "speed.tsv")) == 15


def test_rows_say_how_far_they_came(changed):
    run, results = changed
    shutil.rmtree(results / "evaluate" / ROW)
    line = line_of(run, results)
    assert (line.status, line.reason) == ("not run yet", "evaluation has not run yet")
    assert line.score("before") is not None
    (results / "train" / ROW / "manifest.json").unlink()
    assert line_of(run, results).reason == "training stopped after step 60"
    log = results / f"logs/train/{ROW}.log"
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\nRuntimeError: out of memory\n")
    line = line_of(run, results)
    assert line.status == "did not finish" and str(log) in line.reason
    assert line.result.train.log_tail[-1] == "RuntimeError: out of memory"


def _edit_lines(path: Path, change) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[3].pop("id"), r"predictions.jsonl:4: field `id`: missing"),
        (lambda lines: lines[3].update(id=lines[1]["id"]), r"predictions.jsonl:4: field `id`: got 'val-00001', which an earlier line has"),
        (lambda lines: lines[0].update(answers=[]), r"predictions.jsonl:1: field `answers`: got \[\]"),
        (lambda lines: lines[2].update(score=float("nan")), r"predictions.jsonl:3: field `score`: got nan"),
        (lambda lines: lines[2].update(score=7), r"predictions.jsonl:3: field `score`: got 7; expected a number 0-1"),
        (lambda lines: lines.clear(), r"predictions.jsonl: empty"),
        (lambda lines: lines.pop(), r"metrics.json: field `n`: got 100, predictions.jsonl has 99 lines"),
        (lambda lines: [line.update(score=0.0) for line in lines], r"metrics.json: field `score`.*the predictions beside it give 0.0000; is it of another run\?"),
    ],
)  # fmt: skip
def test_damaged_predictions_are_named_and_the_report_still_builds(root, changed, change, message, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    _edit_lines(results / "evaluate" / ROW / "after" / "predictions.jsonl", change)
    row = rows_of(report(root, results) / "accuracy.tsv")[ROW]
    assert row["status"] == "damaged" and row["after"] == ""
    import re

    assert re.search(message, row["reason"])
    others = rows_of(results / "report/accuracy.tsv")
    assert sum(r["status"] == "done" for r in others.values()) == len(run.accuracy) - 1
    assert "damaged" in (results / "report/index.html").read_text()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "metrics.json",
            '{"metric": "anls", "score": NaN, "n": 100, "interval": [1, 2]}',
            "metrics.json: NaN; expected finite numbers",
        ),
        (
            "metrics.json",
            '{"metric": "anls", "score": 150, "n": 100, "interval": [1, 2]}',
            "field `score`: got 150; expected a number 0 to 100",
        ),
        ("metrics.json", '{"metric": "anls", "score": 50, "n": 100, "interval": [1]}', r"field `interval`: got \[1\]"),
        ("metrics.json", "half a fi", "metrics.json: not JSON"),
        ("metrics.json", "[]", "got list; expected an object"),
    ],
)
def test_damaged_metrics_are_named(changed, file, text, message):
    run, results = changed
    (results / "evaluate" / ROW / "after" / file).write_text(text)
    line = line_of(run, results)
    assert line.status == "damaged"
    import re

    assert re.search(message, line.reason)


def test_a_result_of_another_row_is_refused(changed):
    run, results = changed
    manifest(results / "evaluate" / ROW, "evaluate", {"row": "phi3-docvqa-lora-bf16", "dataset": "docvqa"}, 1)
    line = line_of(run, results)
    assert line.status == "damaged" and "got 'phi3-docvqa-lora-bf16'; expected 'phi3-docvqa-full-bf16'" in line.reason


def test_a_broken_control_leaves_the_score_and_is_named(changed):
    run, results = changed
    (results / "evaluate" / ROW / "control" / "metrics.json").unlink()
    line = line_of(run, results)
    assert line.status == "done" and line.result.looking is None
    assert "control/metrics.json: cannot be read" in line.result.problems[0]


def test_a_half_written_curve_is_read_as_far_as_it_goes(changed):
    run, results = changed
    path = results / "train" / ROW / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 61, "lo')
    line = line_of(run, results)
    assert len(line.result.curve) == 60 and not line.result.problems


def test_changed_settings_and_other_code_are_marked(changed):
    run, results = changed
    path = results / "train" / ROW / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "learning_rate": 0.5}))
    line = next(line for line in build_tables(run, results, {"commit": "f" * 40}).accuracy if line.row.row == ROW)
    assert line.notes == ["made with learning_rate 0.5; the settings now say 0.002"]
    assert line.older


def _published(root, results: Path, row: str, n: int, share: float, **changes):
    """One row of the published run, evaluated on n examples."""
    run = load_run(root / "config/config.yaml", root)
    if changes:
        values = {**run.settings.model_dump(exclude={"demo"}), **changes}
        run = load_run(values, root)
    job = run.job(row)
    write_row(results, job, [], run.datasets[job.row.dataset].metric, n, (0.3, share, 0.4))
    return next(line for line in build_tables(run, results).accuracy if line.row.row == row)


def test_verdicts_of_the_published_run(root, tmp_path):
    row = "phi35-nlvr2-full-bf16"
    assert _published(root, tmp_path / "a", row, 500, 0.5).verdict == "below"
    near = _published(root, tmp_path / "b", row, 500, 0.89)
    assert near.verdict == "inconclusive" and near.against.interval[0] < 0 < near.against.interval[1]
    short = _published(root, tmp_path / "c", row, 300, 0.89)
    assert short.verdict == "not comparable" and short.verdict_reason == "300 examples; the published figure has 500"
    changed = _published(
        root, tmp_path / "d", row, 500, 0.89, overrides={row: {"learning_rate": 2e-5, "micro_batch_size": 2}}
    )
    assert changed.verdict_reason == "departs from the recipe: learning_rate"
    doubted = _published(root, tmp_path / "e", "phi3-docvqa-frozen-bf16", 200, 0.9)
    assert doubted.verdict == "not comparable" and "very likely" in doubted.verdict_reason
    assert _published(root, tmp_path / "f", "phi35-docvqa-full-bf16", 200, 0.9).verdict_reason == "no published figure"


def test_rows_that_the_hardware_cannot_do_say_why(root, tmp_path):
    run = load_run(root / "config/config.yaml", root)
    values = {**run.settings.model_dump(exclude={"demo"}), "hardware": [{"device": "v100-32gb", "per_node": 2}]}
    tables = build_tables(load_run(values, root), tmp_path)
    row = next(line for line in tables.accuracy if line.row.row == "phi35-nlvr2-full-bf16")
    assert row.status == "cannot run" and "bf16" in row.reason
    assert any(line.reason == "needs 32 a100-80gb on 4 node(s)" for line in tables.speed) or all(
        line.reason for line in tables.speed
    )


def test_rows_that_ran_the_same_code_are_marked(root, tmp_path):
    config = load_run(root / "config/demo.yaml", root).settings.model_dump()
    wanted = ["phi3-a100-full-flash-8gpu", "phi3-a100-full-flash-16gpu", "phi3-a100-full-eager-8gpu"]
    run = load_run(
        {**config, "demo": str(root / "config/demo/sources.yaml"), "rows": {"accuracy": ["*digits*"], "speed": wanted}},
        root,
    )
    for job in run.speed:
        write_speed(tmp_path, job)
    same = {line.row.row: line.same_as for line in build_tables(run, tmp_path).speed}
    assert same["phi3-a100-full-flash-8gpu"] == ["phi3-a100-full-flash-16gpu"]
    assert same["phi3-a100-full-eager-8gpu"] == []


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.yaml"):
        build_report(ReportSettings(config=str(tmp_path / "nowhere.yaml")))


def test_more_metrics_have_their_columns(changed):
    run, results = changed
    path = results / "evaluate" / ROW / "after" / "metrics.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "more": {"official_anls": {"score": 81.5, "interval": [75, 88]}},
                "leaked": 7,
            }
        )
    )
    record = next(r for r in as_records(build_tables(run, results).accuracy, ACCURACY_COLUMNS) if r["row"] == ROW)
    assert record["official_anls"] == 81.5 and record["leaked"] == 7


def test_examples_show_wrong_and_right_answers(finished, tmp_path):
    from phi3v.reporting.results import read_pass

    write_pass(tmp_path / "after", [1.0] * 95 + [0.0] * 5, "accuracy", [])
    found = read_pass(tmp_path / "after", {"settings": {}}, lambda settings: None)
    shown = [record["score"] for record in found.examples]
    assert len(shown) == 12 and shown.count(0.0) == 5


def test_reporting_imports_no_torch(root):
    import subprocess
    import sys

    code = "import sys, phi3v.reporting.build; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root / "src")}
    )
    assert done.stdout.strip() == "[]"
