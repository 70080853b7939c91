"""The same command again always goes on: after a failed row, after Ctrl-C, and where outputs are gone."""

import json
import os
import shutil
import signal
import time

import pytest
import small_run
import stand_in

TRAIN = "results/stand/train"


@pytest.fixture
def copy(root, tmp_path):
    return stand_in.make(root, tmp_path)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A copy whose run is complete."""
    folder = stand_in.make(root, tmp_path_factory.mktemp("finished"))
    code, output = stand_in.snakemake(folder)
    assert code == 0, output
    return folder


def steps(folder, row):
    """Step numbers of a row's finished training; a resumed one counts from 1 again."""
    return json.loads((folder / TRAIN / row / "final/weights.json").read_text())


def test_a_failed_row_is_reported_and_the_same_command_goes_on(copy):
    (copy / "fail-one").touch()
    code, output = stand_in.snakemake(copy)
    assert code != 0
    assert "one: fails as it was told to" in output
    assert (copy / "results/stand/evaluate/two/manifest.json").is_file(), output
    partial = copy / "results/stand/report-partial/index.html"
    assert "Partial report: 0 of 2 rows are done" in partial.read_text()
    assert not (copy / "results/stand/report").exists()

    (copy / "fail-one").unlink()
    code, output = stand_in.snakemake(copy)
    assert code == 0, output
    assert steps(copy, "one") == [1, 2, *range(1, 9)]
    assert steps(copy, "two") == [*range(1, 11)]
    assert (copy / "results/stand/report/index.html").is_file()
    assert not partial.exists()
    code, output = stand_in.snakemake(copy)
    assert code == 0 and "Nothing to be done" in output


def test_after_ctrl_c_the_same_command_goes_on(copy):
    hold = copy / "hold-one"  # however busy the machine is, the row does not finish before the signal
    hold.touch()
    process = stand_in.start(copy)
    checkpoint = copy / TRAIN / "one/checkpoints/steps.json"
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    hold.unlink()
    assert process.returncode != 0, output
    assert not (copy / TRAIN / "one/manifest.json").exists()
    code, output = stand_in.snakemake(copy)
    assert code == 0, output
    assert steps(copy, "one").count(1) == 2
    assert (copy / "results/stand/report/index.html").is_file()


@pytest.mark.parametrize(
    ("gone", "made"),
    [
        ("train/one/final", {"finetune", "evaluate", "report"}),
        ("evaluate/one/after/predictions.jsonl", {"evaluate", "report"}),
    ],
)
def test_an_output_that_is_gone_is_made_again(finished, gone, made):
    path = finished / "results/stand" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, output = stand_in.snakemake(finished)
    assert code == 0, output
    assert small_run.planned(output).keys() - {"all", "total"} == made
    assert path.exists()
    assert steps(finished, "one") == [*range(1, 11)]
    assert "Nothing to be done" in stand_in.snakemake(finished)[1]


@pytest.mark.verify
def test_outputs_that_appear_late_are_waited_for(copy):
    """As on a shared file system: the manifest is seen three seconds after the job's end."""
    (copy / "late-one").touch()
    code, output = stand_in.snakemake(copy, "--latency-wait", "20")
    assert code == 0, output
    assert steps(copy, "one") == [*range(1, 11)]


def test_a_space_and_a_quote_in_the_path(root, tmp_path):
    """They work, or one line at the start says why not."""
    folder = stand_in.make(root, tmp_path / "it's my folder")
    for extra in (["--sdm", "conda"], ["--sdm", "apptainer"], ["--default-resources", "slurm_account=a"]):
        code, output = stand_in.snakemake(folder, "-n", *extra)
        assert code != 0
        assert f"holds a space, a quote or another special character: got {folder}" in output
        assert "Traceback" not in output
    code, output = stand_in.snakemake(folder)
    assert code == 0, output
    assert (folder / "results/stand/report/index.html").is_file()


def test_no_profile_is_needed_to_keep_what_is_finished(finished):
    """profiles/default: an edited command, docstring or environment repeats nothing."""
    path = finished / "workflow/rules/train.smk"
    path.write_text(path.read_text().replace('shell:\n        "', 'shell:\n        "true; ', 1))
    code, output = stand_in.snakemake(finished, "-n", profile="none")
    assert code == 0 and "Nothing to be done" in output, output
    code, output = stand_in.snakemake(finished, "-n", "--workflow-profile", "none", profile="none")
    assert code == 0 and small_run.planned(output)["finetune"] == 2


def test_a_finished_row_stays_finished_if_only_its_execution_changes(finished):
    """Other machines, workers and saving repeat no training and no evaluation; a setting of the recipe repeats both."""
    same = {"hardware": [{"device": "cpu", "per_node": 1}], "num_workers": 3, "save_minutes": 7}
    stand_in.configure(finished, "stand", stand_in.ROWS, **same)
    code, output = stand_in.snakemake(finished, "-n")
    assert code == 0, output
    assert not {"finetune", "evaluate", "evaluate_base"} & small_run.planned(output).keys(), output
    stand_in.configure(finished, "stand", stand_in.ROWS, **same, overrides={"one": {"learning_rate": 0.5}})
    code, output = stand_in.snakemake(finished, "-n")
    assert code == 0, output
    found = small_run.planned(output)
    assert (found["finetune"], found["evaluate"]) == (1, 1)
    stand_in.configure(finished, "stand", stand_in.ROWS)


def test_touch_accepts_what_another_version_has_finished(finished):
    """The command of the upgrade notes, after a change that Snakemake takes for one of the recipe's settings."""
    path = finished / "src/phi3v/settings/jobs.py"
    text = path.read_text()
    path.write_text(
        text.replace(
            "return shlex.join([*flags(settings, roles)", 'return shlex.join(["new", *flags(settings, roles)', 1
        )
    )
    assert path.read_text() != text
    assert small_run.planned(stand_in.snakemake(finished, "-n")[1])["finetune"] == 2
    code, output = stand_in.snakemake(finished, "--touch")
    assert code == 0, output
    code, output = stand_in.snakemake(finished, "-n")
    assert code == 0 and "Nothing to be done" in output, output


@pytest.mark.verify
def test_two_runs_at_the_same_time(finished):
    """Of one clone, with names of their own and the same data."""
    for name in ("left", "right"):
        stand_in.configure(finished, name, (f"{name}-row",))
    runs = {name: stand_in.start(finished, name=name) for name in ("left", "right")}
    for name, run in runs.items():
        output, _ = run.communicate(timeout=200)
        assert run.returncode == 0, output
        assert (finished / f"results/{name}/report/index.html").is_file()
