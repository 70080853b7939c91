"""The report's tables from finished, half-finished and damaged result folders."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from reporting_examples import manifest, write_pass, write_row, write_run, write_speed
from scipy.stats import binomtest

from phi3v.reporting import verdict
from phi3v.reporting.columns import ACCURACY_COLUMNS, ACCURACY_TIMES, SPEED_COLUMNS, as_records, chosen, plan
from phi3v.reporting.join import build_tables
from phi3v.reporting.page import build_report
from phi3v.reporting.results import read_pass
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
    tables = build_tables(run, results)
    return next(line for line in tables.accuracy + tables.speed if line.row.row == row)


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
    assert list(next(iter(accuracy.values())))[:12] == [
        "row", "model", "dataset", "method", "dtype", "metric", "before", "after", "control", "n", "cut", "published",
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
    right = []
    for name in ("after", "control"):
        lines = (results / f"evaluate/phi3-hateful_memes-qlora-bf16/{name}/predictions.jsonl").read_text().splitlines()
        right.append({item["id"]: item["score"] for item in map(json.loads, lines)})
    pairs = [(score, right[1][name]) for name, score in right[0].items() if name in right[1]]
    tested = binomtest(pairs.count((1, 0)), pairs.count((1, 0)) + pairs.count((0, 1)))
    assert float(qlora["after_minus_control_p"]) == pytest.approx(tested.pvalue, abs=1e-4)
    assert row["after_minus_control_p"] == ""  # ANLS is graded
    speed = rows_of(folder / "speed.tsv")
    assert speed["phi3-a100-full-flash-8gpu"]["verdict_reason"] == "2 CPU processes instead of 8 A100"
    assert float(speed["phi3-a100-full-flash-8gpu"]["speedup"]) == pytest.approx(6 / 5)
    page = (folder / "index.html").read_text()
    assert "McNemar's exact test: p = " in page
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
    assert len(accuracy) == 38 and len(rows_of(folder / "speed.tsv")) == 30


def test_rows_say_how_far_they_came(changed):
    run, results = changed
    shutil.rmtree(results / "evaluate" / ROW)
    line = line_of(run, results)
    assert (line.state.status, line.state.reason) == ("not run yet", "evaluation has not run yet")
    assert line.score("before") is not None
    (results / "train" / ROW / "manifest.json").unlink()
    assert line_of(run, results).state.reason == "training stopped after step 60"
    log = results / f"logs/train/{ROW}.log"
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\nRuntimeError: out of memory\n")
    line = line_of(run, results)
    assert line.state.status == "did not finish" and str(log) in line.state.reason
    assert line.train.log_tail[-1] == "RuntimeError: out of memory"


def test_a_token_in_a_log_is_not_shown(root, changed, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_TOKEN", "open-sesame")
    _, results = changed
    shutil.rmtree(results / "evaluate" / ROW)
    (results / "train" / ROW / "manifest.json").unlink()
    log = results / f"logs/train/{ROW}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"sent {'hf_' + 'NotARealToken1'}\nsent open-sesame\nRuntimeError: refused\n")
    page = (report(root, results) / "index.html").read_text()
    assert "RuntimeError: refused" in page
    assert "NotARealToken1" not in page
    assert "open-sesame" not in page


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
        (lambda lines: [line.update(score=0.0) for line in lines], r"metrics.json: field `score`.*predictions.jsonl gives 0.0000"),
    ],
)  # fmt: skip
def test_damaged_predictions_are_named_and_the_report_still_builds(root, changed, change, message, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    _edit_lines(results / "evaluate" / ROW / "after" / "predictions.jsonl", change)
    row = rows_of(report(root, results) / "accuracy.tsv")[ROW]
    assert row["status"] == "damaged" and row["after"] == ""
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
            "metrics.json: field `score`: got 150: .*100",
        ),
        (
            "metrics.json",
            '{"metric": "anls", "score": 50, "n": 100, "interval": [1]}',
            "metrics.json: field `interval.1`: missing",
        ),
        ("metrics.json", "half a fi", "metrics.json: not JSON"),
        ("metrics.json", "[]", "got list; expected an object"),
    ],
)
def test_damaged_metrics_are_named(changed, file, text, message):
    run, results = changed
    (results / "evaluate" / ROW / "after" / file).write_text(text)
    line = line_of(run, results)
    assert line.state.status == "damaged"
    assert re.search(message, line.state.reason)


def test_a_result_of_another_row_is_refused(changed):
    run, results = changed
    manifest(results / "evaluate" / ROW, "evaluate", {"row": "phi3-docvqa-lora-bf16", "dataset": "docvqa"}, 1)
    line = line_of(run, results)
    assert (
        line.state.status == "damaged"
        and "got 'phi3-docvqa-lora-bf16'; expected 'phi3-docvqa-full-bf16'" in line.state.reason
    )


def test_a_broken_control_leaves_the_score_and_is_named(changed):
    run, results = changed
    (results / "evaluate" / ROW / "control" / "metrics.json").unlink()
    line = line_of(run, results)
    assert line.state.status == "done" and "control" not in line.after_minus
    assert "control/metrics.json: cannot be read" in line.problems[0]


def test_cut_answers_groups_and_a_control_that_is_not_applicable_are_shown(root, changed, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    folder = results / "evaluate" / ROW
    metrics = json.loads((folder / "after/metrics.json").read_text())
    metrics |= {"cut": 7, "groups": {"letters": {"score": 31.25, "n": 100, "interval": [20.5, 40.5]}}}
    metrics["more"]["fields"] = {"invalid": 3, "fields": {"total": {"accuracy": 61.5, "f1": 62.5, "n": 90}}}
    (folder / "after/metrics.json").write_text(json.dumps(metrics))
    (folder / "control/predictions.jsonl").unlink()
    (folder / "control/metrics.json").write_text(json.dumps({"not_applicable": "one picture"}))
    line = line_of(run, results)
    assert line.state.status == "done" and not line.problems and line.no_control == "one picture"
    row = rows_of(report(root, results) / "accuracy.tsv")[ROW]
    assert (row["cut"], row["control"]) == ("7", "")
    page = (results / f"report/rows/{ROW}.html").read_text() if (results / "report/rows").is_dir() else ""
    page += (results / "report/index.html").read_text()
    for text in (
        "7 of 100 answers",
        "letters",
        "31.2",
        "3 invalid answers",
        "61.5",
        "not applicable, because one picture",
    ):
        assert text in page, text


def test_a_half_written_curve_is_read_as_far_as_it_goes(changed):
    run, results = changed
    path = results / "train" / ROW / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 61, "lo')
    line = line_of(run, results)
    assert len(line.training.curve) == 60 and not line.problems


def test_changed_settings_and_other_code_are_marked(changed):
    run, results = changed
    path = results / "train" / ROW / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "learning_rate": 0.5}))
    line = next(line for line in build_tables(run, results, {"commit": "f" * 40}).accuracy if line.row.row == ROW)
    assert line.notes == ["trained with learning_rate 0.5, but the settings now have 0.002"]
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
    assert _published(root, tmp_path / "a", row, 500, 0.5).verdict.text == "below"
    near = _published(root, tmp_path / "b", row, 500, 0.89)
    assert (
        near.verdict.text == "inconclusive" and near.verdict.against.interval[0] < 0 < near.verdict.against.interval[1]
    )
    short = _published(root, tmp_path / "c", row, 300, 0.89)
    assert (
        short.verdict.text == "not comparable"
        and short.verdict.reason == "300 examples, but the published figure has 500"
    )
    changed = _published(
        root, tmp_path / "d", row, 500, 0.89, overrides={row: {"learning_rate": 2e-5, "micro_batch_size": 2}}
    )
    assert changed.verdict.reason == "departs from the recipe: learning_rate"
    doubted = _published(root, tmp_path / "e", "phi3-docvqa-frozen-bf16", 200, 0.9)
    assert doubted.verdict.text == "not comparable" and "very likely" in doubted.verdict.reason
    assert _published(root, tmp_path / "f", "phi35-docvqa-full-bf16", 200, 0.9).verdict.reason == "no published figure"


def _published_table(root, folder: Path, **changes: str) -> dict:
    """Settings of the published run whose accuracy table is a copy with one row changed."""
    lines = (root / "config/accuracy.tsv").read_text().splitlines()
    names = lines[1].split("\t")
    for at, line in enumerate(lines):
        if line.startswith("phi35-nlvr2-full-bf16\t"):
            lines[at] = "\t".join(changes.get(name, cell) for name, cell in zip(names, line.split("\t"), strict=True))
    (folder / "accuracy.tsv").write_text("\n".join(lines) + "\n")
    values = load_run(root / "config/config.yaml", root).settings.model_dump(mode="json", exclude={"demo"})
    return {**values, "files": {**values["files"], "accuracy": [str(folder / "accuracy.tsv")]}}


def test_the_table_states_how_many_examples_the_published_figure_has(root, tmp_path):
    row = "phi35-nlvr2-full-bf16"
    for count, expected in (("300", "inconclusive"), ("", "inconclusive"), ("500", "not comparable")):
        run = load_run(_published_table(root, tmp_path, published_examples=count), root)
        write_row(tmp_path / "results", run.job(row), [], "accuracy", 300, (0.3, 0.89, 0.4))
        line = next(line for line in build_tables(run, tmp_path / "results").accuracy if line.row.row == row)
        assert line.verdict.text == expected


@pytest.mark.parametrize(
    ("doubted", "note", "marked"), [("yes", "read from a plot", True), ("no", "needs no inference", False)]
)
def test_the_dagger_follows_the_column_and_not_the_note(root, tmp_path, monkeypatch, doubted, note, marked):
    monkeypatch.chdir(root)
    values = _published_table(root, tmp_path, published_doubted=doubted, note=note)
    values["rows"] = {"accuracy": ["phi35-nlvr2-full-bf16"], "speed": []}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    page = (report(root, tmp_path / "results", tmp_path / "run.yaml") / "index.html").read_text()
    assert (f'<span class="flag">†</span> full, bf16: {note}' in page) == marked


def test_a_stand_in_is_named_by_its_device(root, tmp_path):
    values = load_run(root / "config/config.yaml", root).settings.model_dump(mode="json", exclude={"demo"})
    row = "phi3-a100-full-flash-8gpu"
    values |= {
        "hardware": [{"device": "h100", "per_node": 2, "stand_in": True}],
        "rows": {"accuracy": [], "speed": [row]},
    }
    run = load_run(values, root)
    write_speed(tmp_path, run.speed[0])
    (line,) = build_tables(run, tmp_path).speed
    assert line.verdict.reason == "2 NVIDIA H100 80 GB SXM instead of 8 A100"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"save_minutes": 5, "keep_checkpoints": 1}, ""),
        ({"max_grad_norm": 0.5}, "recipe: max_grad_norm"),
        ({"zero_stage": 1}, ""),
    ],
)
def test_a_setting_that_changes_no_result_costs_no_verdict(root, tmp_path, own, said):
    row = "phi35-nlvr2-full-bf16"
    line = _published(root, tmp_path, row, 500, 0.86, overrides={row: {"finetune": own}})
    assert (line.verdict.text == "not comparable") == bool(said)
    assert said in line.verdict.reason


def test_a_legacy_row_gets_no_verdict(root, tmp_path):
    line = _published(root, tmp_path, "phi35-nlvr2-frozen-bf16", 500, 0.5)
    assert line.verdict.text == "below"
    legacy = line.row.model_copy(update={"legacy_freezing": True})
    found = verdict.accuracy_verdict(load_run(root / "config/config.yaml", root), line.job, legacy, line.after, [])
    assert (found.text, found.against) == ("not comparable", None) and found.reason.startswith("legacy freezing")


def test_rows_that_the_hardware_cannot_do_say_why(root, tmp_path):
    run = load_run(root / "config/config.yaml", root)
    values = {**run.settings.model_dump(exclude={"demo"}), "hardware": [{"device": "v100-32gb", "per_node": 2}]}
    tables = build_tables(load_run(values, root), tmp_path)
    row = next(line for line in tables.accuracy if line.row.row == "phi35-nlvr2-full-bf16")
    assert row.state.status == "cannot run" and "bf16" in row.state.reason
    assert any(line.state.reason == "hardware: needs 4 nodes with 8 a100-80gb each" for line in tables.speed) or all(
        line.state.reason for line in tables.speed
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


def test_our_speed_row_stands_beside_the_published_one_with_its_memory(root, tmp_path):
    config = load_run(root / "config/config.yaml", root).settings.model_dump()
    published = "phi3-a100-full-flash-8gpu"
    run = load_run({**config, "rows": {"accuracy": [ROW], "speed": [published, f"{published}-ours"]}}, root)
    for job, rate in zip(run.speed, (8.0, 10.0), strict=True):
        write_speed(tmp_path, job, rate)
        path = tmp_path / "speed" / job.row.row / "speed.json"
        speed = json.loads(path.read_text())
        memory = {"peak_memory_bytes": 18e9, "reserved_memory_bytes": 21e9, "context_memory_bytes": 1e9}
        picked = {"batch_size_per_gpu": 2, "recompute_every": 0}
        observed = {**speed["observed"], **(picked if job.row.accompanies else {})}
        path.write_text(json.dumps({**speed, **memory, "stand_in": False, "observed": observed}))
    first, ours = build_tables(run, tmp_path).speed
    assert (chosen(first), first.device_memory) == ("", 22e9)
    assert chosen(ours) == "ours: micro-batch 2, recompute none"
    assert ours.verdict.text == "1.25 x recipe's"
    records = as_records([ours], SPEED_COLUMNS)
    assert (records[0]["accompanies"], records[0]["context_memory_gb"]) == (published, 1.0)


def test_speed_rows_say_what_they_were_measured_on(root, changed, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    rows = [job.row.row for job in run.speed]
    path = results / "speed" / rows[0] / "speed.json"
    speed = json.loads(path.read_text())
    path.write_text(json.dumps({**speed, "fingerprint": {"devices": {"<b>A100</b>": 2}, "power_limit_w": 400.0}}))
    folder = report(root, results)
    page = (folder / "index.html").read_text()
    assert (
        f"Machine and software of {rows[0]}<" in page
        and "&lt;b&gt;A100&lt;/b&gt; 2" in page
        and "<dt>power limit w</dt><dd>400.0" in page
    )
    assert f"Machine and software of {', '.join(rows[1:])}" in page
    first = rows_of(folder / "speed.tsv")[rows[0]]
    assert float(first["tokens_per_second_per_device"]) == pytest.approx(speed["tokens_per_second"] / 2)


def test_windows_that_differ_are_noted(changed):
    run, results = changed
    row = run.speed[0].row.row
    path = results / "speed" / row / "speed.json"
    speed = json.loads(path.read_text())
    assert line_of(run, results, row).notes == []
    path.write_text(json.dumps({**speed, "spread": 0.12}))
    assert line_of(run, results, row).notes == ["the timed windows differ by 12 %"]


def test_damaged_speed_is_named(changed):
    run, results = changed
    row = run.speed[0].row.row
    path = results / "speed" / row / "speed.json"
    speed = json.loads(path.read_text())
    for change, message in (
        ({"images_per_second": -1}, "speed.json: field `images_per_second`: got -1: "),
        ({"row": "other"}, "field `row`: got 'other'"),
        ({"tokens_per_second": float("nan")}, "NaN; expected finite numbers"),
    ):
        path.write_text(json.dumps({**speed, **change}))
        line = line_of(run, results, row)
        assert line.state.status == "damaged" and message in line.state.reason


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
    write_pass(tmp_path / "after", [1.0] * 95 + [0.0] * 5, "accuracy", [])
    found = read_pass(tmp_path / "after")
    shown = [record["score"] for record in found.examples]
    assert len(shown) == 12 and shown.count(0.0) == 5


def test_reporting_imports_no_torch(root):
    import subprocess
    import sys

    code = "import sys, phi3v.reporting.page; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root / "src")}
    )
    assert done.stdout.strip() == "[]"


def _seeded(root, results: Path, row: str, seeds: list[int], shares: list[float], n: int = 500):
    """A row of the published run with several seeds, evaluated with these shares of right answers; None: not evaluated."""
    values = load_run(root / "config/config.yaml", root).settings.model_dump(exclude={"demo"})
    run = load_run({**values, "overrides": {row: {"seeds": seeds}}}, root)
    for job, share in zip(run.targets()[row], shares, strict=True):
        if share is not None:
            write_row(results, job, [], run.datasets[job.row.dataset].metric, n, (0.3, share, 0.4))
    return run, next(line for line in build_tables(run, results).accuracy if line.row.row == row)


def test_several_seeds_are_one_row_with_mean_and_spread(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    row = "phi35-nlvr2-full-bf16"
    run, line = _seeded(root, tmp_path, row, [42, 43, 44], [0.86, 0.89, 0.92])
    each = [json.loads((tmp_path / f"evaluate/{name}/after/metrics.json").read_text())["score"]
            for name in (row, f"{row}-seed43", f"{row}-seed44")]  # fmt: skip
    assert line.seed_scores == pytest.approx(each)
    assert line.score("after") == pytest.approx(sum(each) / 3, abs=1e-6)
    assert line.spread["sd"] == pytest.approx(np.std(each, ddof=1))
    assert line.after.n == 500 and line.score("before") is not None
    # The seeds' spread is in interval and verdict.
    alone = build_tables(load_run(root / "config/config.yaml", root), tmp_path)
    single = next(other for other in alone.accuracy if other.row.row == row)
    width = [high - low for low, high in (line.verdict.against.interval, single.verdict.against.interval)]
    assert width[0] > width[1]
    assert line.verdict.text == "inconclusive" and line.verdict.reason.endswith("mean of 3 seeds")
    record = as_records([line], ACCURACY_COLUMNS + ACCURACY_TIMES)[0]
    assert record["seeds"] == "42 43 44" and len(record["after_of_each_seed"].split()) == 3
    assert record["train_seconds"] == pytest.approx(sum(m.train.seconds for m in line.members))
    assert sum(r.row.row.startswith(row) for r in build_tables(run, tmp_path).accuracy) == 1


def test_a_seed_that_is_missing_is_named_and_the_mean_is_of_the_others(root, tmp_path):
    row = "phi35-nlvr2-full-bf16"
    _, line = _seeded(root, tmp_path, row, [42, 43, 44], [0.86, 0.9, None])
    assert line.state.status == "done" and len(line.seed_scores) == 2
    assert line.notes == ["seed 44: not run yet: training has not run yet"]
    _edit_lines(tmp_path / f"evaluate/{row}-seed43/after/predictions.jsonl", lambda lines: lines[0].update(id="other"))
    run, _ = _seeded(root, tmp_path / "empty", row, [42, 43, 44], [None, None, None])
    line = next(line for line in build_tables(run, tmp_path).accuracy if line.row.row == row)
    assert (line.state.status, line.score("after")) == ("damaged", None)
    assert "the seeds answered different examples" in line.state.reason
    nothing = next(line for line in build_tables(run, tmp_path / "empty").accuracy if line.row.row == row)
    assert nothing.state.status == "not run yet" and nothing.score("after") is None


def test_seeds_are_shown_in_page_and_markdown(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    row = "phi35-nlvr2-full-bf16"
    run, _ = _seeded(root, tmp_path, row, [42, 43, 44], [0.86, 0.9, None])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.settings.model_dump(mode="json", exclude={"demo"})))
    build_report(ReportSettings(config=str(tmp_path / "run.yaml"), results=str(tmp_path)))
    page = (tmp_path / "report/index.html").read_text()
    assert "2 of 3 seeds done" in page and f'id="seed-{row}-seed43"' in page and "seed 44: not run yet" in page
    assert re.search(r"\| \d\d\.\d\d, \d\d\.\d\d \(sd \d\.\d\d\) \|", (tmp_path / "report/tables.md").read_text())
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, flags=re.S).group(1))
    forest = data["plots"]["forest-nlvr2"]
    assert next(trace for trace in forest["traces"] if trace["name"] == "each seed")["x"] == pytest.approx(
        [float(value) for value in forest["rows"][0][-1].split(", ")], abs=0.06
    )
    assert data["plots"]["losses-nlvr2"]["rows"][1][0] == f"{row}-seed43"


def test_the_official_split_is_a_column_of_its_own(root, tmp_path, monkeypatch):
    row = "phi3-docvqa-full-bf16"
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results/published"
    run = load_run(root / "config/config.yaml", root)
    write_row(results, run.job(row), [], "anls", 200, (0.3, 0.8, 0.4))

    def line():
        return next(line for line in build_tables(run, results).accuracy if line.row.row == row)

    assert line().official.status == "not present" and "results/official/docvqa: no such file" in line().official.reason
    (tmp_path / "results/official/docvqa").mkdir(parents=True)
    assert line().official.status == "not run yet"
    folder = results / "evaluate/official" / row
    write_pass(folder / "after", [1.0, 0.0, 0.75, 1.0] * 20, "anls", [])
    manifest(folder, "evaluate", {"row": row, "dataset": "docvqa"}, 5)
    assert line().official.status == "damaged" and "expected 'docvqa_official'" in line().official.reason
    assert line().state.status == "done"
    manifest(folder, "evaluate", {"row": row, "dataset": "docvqa_official"}, 5)
    path = folder / "after/metrics.json"
    more = {"official_anls": {"score": 70.5, "interval": [61, 80]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": more, "leaked": 3}))
    record = as_records([line()], ACCURACY_COLUMNS)[0]
    assert record["official_split"] == "done"
    assert (record["official_metric"], record["official_score"]) == ("official_anls", 70.5)
    assert (record["official_low"], record["official_high"], record["official_n"]) == (61, 80, 80)
    assert record["official_leaked"] == 3
    # The recipe's protocol keeps its own figures beside it.
    assert record["n"] == 200 and record["after"] != 70.5
    ours = next(line for line in build_tables(run, results).accuracy if line.row.dataset == "ucf101")
    assert ours.official.status == ""


def test_scores_of_the_users_functions_need_their_own_manifest(root, tmp_path):
    known = yaml.safe_load((root / "config/datasets.yaml").read_text())
    del known["docvqa"]["metric"]
    known["docvqa"]["metrics"] = [f"{tmp_path}/own.py:score"]
    (tmp_path / "own.py").write_text("")
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(known))
    values = load_run(root / "config/config.yaml", root).settings.model_dump(mode="json", exclude={"demo"})
    values["files"]["datasets"] = [str(tmp_path / "datasets.yaml")]
    run, results = load_run(values, root), tmp_path / "results/published"
    job = run.job(ROW)
    write_row(results, job, [], "own", 200, (0.3, 0.8, 0.4))
    line = line_of(run, results)
    assert (line.state.status, line.state.reason, line.passes) == ("not run yet", "scoring has not run yet", {})
    for folder in (ROW, f"base/{job.baseline}"):
        shutil.copytree(results / "evaluate" / folder, results / "score" / folder)
    line = line_of(run, results)
    assert line.state.status == "done" and set(line.passes) == {"before", "after", "control"}
    assert {work.folder for work in line.works} > {results / "score" / ROW, results / "score/base" / job.baseline}


def test_rejected_rows_leakage_and_statistics_are_in_the_data_part(root, changed, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    from phi3v.settings import dataset_key

    folder = results.parent / "data" / dataset_key("docvqa", run.datasets["docvqa"])
    folder.mkdir(parents=True)
    summary = {"mean": 2443.2, "median": 2400, "p95": 2700, "max": 2900}
    counted = {"examples": 997, "turns": 3000, "images": 997, "text_only": 0, "num_crops": 16, "tokens": summary,
               "answer_tokens": summary, "tiles": summary, "histogram": {"edges": [0, 1500, 3000], "counts": [10, 987]}}  # fmt: skip
    splits = {name: {"file": f"{name}.jsonl", "examples": 997, "images": 997, "rejected": 3 * (name == "train"), "sha256": "ab" * 32}
              for name in ("train", "val")}  # fmt: skip
    (folder / "dataset.json").write_text(
        json.dumps({"name": "docvqa", "splits": splits, "rejected": 3, "leakage": {"val": {"examples": 17, "of": 997, "pictures": 9}}})
    )  # fmt: skip
    (folder / "statistics.json").write_text(json.dumps({"train": counted, "val": counted}))
    (folder / "rejected.jsonl").write_text(
        json.dumps({"split": "train", "where": "a.parquet: row 7", "reason": "not a <b>picture</b>"}) + "\n"
    )
    page = (report(root, results) / "index.html").read_text()
    part = page[page.index('id="data"') : page.index('id="provenance"')]
    assert "3 source rows of docvqa rejected: train: a.parquet: row 7: not a &lt;b&gt;picture" in part
    assert re.search(r'data-label="Also in train"><span class="warn">17</span><small>of 997', part)
    assert re.search(r'data-label="Tokens">2443\.2<small>median 2.400, max 2.900', part)
    assert "tokens-docvqa" in part
    (folder / "statistics.json").write_text("[]")
    assert "got list; expected an object" in (report(root, results) / "index.html").read_text()


def test_the_plan_stands_beside_what_happened(root, changed, monkeypatch):
    monkeypatch.chdir(root)
    run, results = changed
    (results / "plan").mkdir()
    rows = [{"row": ROW, "status": "run", "hours": 2.5, "images_per_second": 80.0, "allocated_gb": 1.2}]
    (results / "plan/plan.json").write_text(json.dumps({"rows": rows}))
    (entry,) = plan(build_tables(run, results), results)
    folders = (f"train/{ROW}", f"evaluate/{ROW}", f"evaluate/base/{run.job(ROW).baseline}")
    took = [json.loads((results / folder / "manifest.json").read_text())["seconds"] for folder in folders]
    assert entry[:3] == [ROW, "run", 2.5] and entry[3] == pytest.approx(sum(took) / 3600)
    assert entry[6:] == [1.2, pytest.approx(1.4)]
    assert 'id="plan"' in (report(root, results) / "index.html").read_text()
