"""Dry runs: the published configuration plans every row anywhere, and wrong settings stop before any job."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from small_run import planned

from phi3v.settings import SettingsError, load_run
from phi3v.settings.rows import RULES


@pytest.fixture(scope="session")
def snakemake(root):
    """snakemake(*arguments) → (exit code, output), run in the repository without network."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            # No cluster that this machine may know takes part.
            env={**os.environ, "SLURM_CONF": os.devnull},
        )
        return done.returncode, done.stdout + done.stderr

    return run


def with_datasets(root, folder, known) -> str:
    """The published run's settings with other datasets, as a file in `folder`."""
    (folder / "datasets.yaml").write_text(yaml.safe_dump(known))
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["files"]["datasets"] = [str(folder / "datasets.yaml")]
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("profile", [[], ["--profile", "slurm"]])
def test_published_run_plans_every_row(snakemake, profile):
    started = time.monotonic()
    code, output = snakemake("-n", *profile)
    assert code == 0, output
    found = planned(output)
    assert (found["finetune"], found["evaluate"], found["speed_row"], found["report"]) == (38, 38, 30, 1)
    assert time.monotonic() - started < 30  # goal 10 s on an idle machine; generous against neighbours


def test_a_large_run_can_be_split_into_batches(snakemake):
    code, output = snakemake("-n", "--batch", "report=1/2")
    assert code == 0, output
    found = planned(output)
    assert 0 < found["finetune"] == found["evaluate"] < 38
    assert not {"report", "all"} & found.keys()


def test_one_row_by_name_prints_the_command_that_a_person_types(snakemake):
    code, output = snakemake("-n", "-p", "phi3-docvqa-lora-fp16")
    assert code == 0, output
    assert planned(output)["finetune"] == 1
    assert re.search(
        r"OMP_NUM_THREADS=8 torchrun --standalone --nproc_per_node=4 --shutdown-timeout=900 --signals-to-handle=\S+,SIGUSR1 "
        r"scripts/finetune\.py --model_name_or_path \S+ .*--dataset docvqa .*--use_lora "
        r"--lora_rank 32 --lora_alpha_ratio 0\.5 --batch_size 64 .*--fp16",
        output,
    )


def test_every_job_states_the_device_that_it_expects(snakemake):
    """A row on GPUs, which must not take the CPU, and the demo, which takes the CPU on a machine with GPUs too."""
    for arguments, device in (([], "cuda"), (["--configfile", "config/demo.yaml"], "cpu")):
        # Whatever this folder has finished.
        code, output = snakemake("-n", "-p", "--forceall", "all", *arguments)
        assert code == 0, output
        commands = [line for line in output.splitlines() if re.search(r"scripts/(finetune|evaluate|speed)\.py", line)]
        assert len(commands) > 10
        assert all(f" --expect_device {device} " in command for command in commands)


def test_seeds_of_a_row_are_jobs_of_their_own(snakemake):
    row = "phi35-nlvr2-lora-bf16"
    code, output = snakemake(row, "-n", "-p", "--config", f"overrides={{{row}: {{seeds: [42, 43]}}}}")
    assert code == 0, output
    assert (planned(output)["finetune"], planned(output)["evaluate"], planned(output)["evaluate_base"]) == (2, 2, 1)
    train = [line for line in output.splitlines() if "scripts/finetune.py" in line]
    # 42 is the flag's default.
    assert sorted(re.findall(r"--output_dir results/published/train/(\S+) (?:.*--seed (\d+))?", "\n".join(train))) == [
        (row, ""), (f"{row}-seed43", "43")
    ]  # fmt: skip
    assert not re.search(r"scripts/evaluate\.py .*--seed", output)


def test_official_splits_are_evaluated_where_their_files_are(snakemake, root, tmp_path):
    row = "phi3-docvqa-lora-bf16"
    code, output = snakemake(row, "-n")
    assert code == 0 and "evaluate_official" not in planned(output)
    (tmp_path / "val_v1.0.json").write_text("{}")
    known = yaml.safe_load((root / "config/datasets.yaml").read_text())
    known["docvqa_official"]["splits"]["val"]["url"] = f"file:{tmp_path}"
    code, output = snakemake(row, "-n", "-p", "--configfile", with_datasets(root, tmp_path, known))
    assert code == 0, output
    assert planned(output)["evaluate_official"] == 1
    (command,) = [line for line in output.splitlines() if "evaluate/official" in line and "scripts/evaluate.py" in line]
    assert re.search(
        rf"--model_name_or_path results/published/train/{row}/final --data_dir results/data/docvqa_official-\w+ .*"
        rf"--dataset docvqa_official --row {row} .*--train_dir results/data/docvqa-\w+ .*--metrics anls",
        command,
    )


def test_functions_of_the_users_score_after_the_evaluation(snakemake, root, tmp_path):
    row = "phi3-docvqa-lora-bf16"
    (tmp_path / "own.py").write_text("")
    known = yaml.safe_load((root / "config/datasets.yaml").read_text())
    del known["docvqa"]["metric"]
    known["docvqa"] |= {"metrics": [f"{tmp_path}/own.py:score", "cer"], "group_by": "kind", "max_new_tokens": 99}
    code, output = snakemake(row, "-n", "-p", "--configfile", with_datasets(root, tmp_path, known))
    assert code == 0, output
    found = planned(output)
    assert (found["evaluate"], found["evaluate_base"], found["score"]) == (1, 1, 2)
    commands = [line for line in output.splitlines() if "scripts/evaluate.py" in line]
    assert len(commands) == 2
    assert all("--max_new_tokens 99" in line and "--metrics cer --group_by kind" in line for line in commands)
    scored = [line for line in output.splitlines() if "scripts/score.py" in line]
    assert any(f"--input_dir results/published/evaluate/{row} " in line for line in scored)
    assert all(f"--metrics {tmp_path}/own.py:score cer --group_by kind" in line for line in scored)


def test_several_nodes_start_through_the_launcher(snakemake):
    code, output = snakemake("-n", "-p", "phi3-a100-full-flash-32gpu")
    assert code == 0, output
    assert "scripts/torchrun_nodes.sh 4 8 scripts/speed.py" in output


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hardware=[{device: a1000, per_node: 1}]", "field `hardware.device`: got 'a1000'"),
        ("overrides={phi35-nlvr2-full-bf16: {learning_rate: -1}}", "field `learning_rate`: got -1"),
        ("hardware=[{device: a100-80gb, per_node: 3}]", "field `batch_size`: got 64: expected a multiple of 3"),
        ("rows={accuracy: [phi9-none], speed: []}", "got 'phi9-none': matches no row"),
    ],
)
def test_wrong_settings_are_refused(root, setting, said):
    name, _, value = setting.partition("=")
    values = yaml.safe_load((root / "config/config.yaml").read_text()) | {name: yaml.safe_load(value)}
    with pytest.raises(SettingsError, match=re.escape(said)):
        load_run(values, root)


def test_wrong_settings_stop_before_any_job(snakemake):
    code, output = snakemake("-n", "--config", "hardware=[{device: a1000, per_node: 1}]")
    assert code != 0
    assert "field `hardware.device`: got 'a1000'" in output
    assert "nothing was started" in output
    assert "Traceback" not in output


def test_all_names_of_rules_are_known(snakemake):
    """settings.rows.RULES; the demo has all rules that there are."""
    code, output = snakemake("--list-rules", "--configfile", "config/demo.yaml", "--quiet", "all")
    assert code == 0, output
    assert set(re.findall(r"^(\w+)(?: \(|$)", output, re.M)) == RULES


@pytest.mark.parametrize("name", ["all", "finetune", "report"])
def test_a_row_must_not_have_the_name_of_a_rule(root, tmp_path, name):
    table = (root / "config/accuracy.tsv").read_text()
    (tmp_path / "own.tsv").write_text(table.replace("phi35-nlvr2-full-bf16\t", f"{name}\t", 1))
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["files"]["accuracy"] = [str(tmp_path / "own.tsv")]
    said = rf"own\.tsv: line \d+: row `{name}`: field `row`: got '{name}': this is the name of a workflow rule"
    with pytest.raises(SettingsError, match=rf"{said}[\s\S]*choose another name for the row"):
        load_run(values, root)


@pytest.mark.parametrize(("device", "rows"), [("h100", 38), ("l40s", 18)])
def test_one_gpu_runs_the_rows_that_fit(snakemake, device, rows):
    """80 GB hold every accuracy row, full fine-tuning tightly; 48 GB hold the LoRA and QLoRA rows."""
    code, output = snakemake("-n", "--config", f"hardware=[{{device: {device}, per_node: 1}}]")
    assert code == 0, output
    assert planned(output)["finetune"] == rows
    assert "speed_row" not in planned(output)
    assert bool(re.search(r"train phi3\S*-(full|frozen)-", output)) == (device == "h100")


@pytest.fixture
def huge(root, tmp_path):
    """A run whose dataset would fill any disk."""
    datasets = yaml.safe_load((root / "config/datasets.yaml").read_text())
    datasets["docvqa_mini"]["workload"]["picture_bytes"] = 1e15
    datasets["docvqa_mini"]["splits"]["train"]["options"] = {"turns": "all"}
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(datasets))
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values |= {"name": "huge", "rows": {"accuracy": ["phi35-docvqa_mini-full-bf16"], "speed": []}}
    values["files"]["datasets"] = [str(tmp_path / "datasets.yaml")]
    config = tmp_path / "huge.yaml"
    config.write_text(yaml.safe_dump(values))
    return str(config)


@pytest.mark.parametrize("target", ["all", "data"])
def test_a_disk_that_is_too_small_stops_the_run_before_any_job(snakemake, root, huge, target):
    code, output = snakemake("--cores", "1", "--configfile", huge, "--nolock", target)
    assert code != 0
    assert "not enough disk space, nothing was started" in output
    assert re.search(r"results: \d+ GB free, but this run will write about \d+ GB \(models \d+, datasets \d+", output)
    assert "Traceback" not in output
    assert not (root / "results/huge").exists()


def test_a_dry_run_needs_no_commands_of_slurm(root, tmp_path):
    for name in ("bash", "git", "which"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "config/demo.yaml", "-n", "plan"],
        cwd=root, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the cluster could not be checked: scontrol was not found" in done.stdout + done.stderr


def test_predictions_answer_new_pictures_with_a_trained_row(snakemake, root, tmp_path):
    row = "phi3-docvqa-lora-bf16"
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/a.png").write_bytes(b"")
    (tmp_path / "new.csv").write_text("photo,prompt\n")
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["predictions"] = {
        "scans": {
            "row": row,
            "folder": str(tmp_path / "scans"),
            "question": "What is the total?",
            "max_new_tokens": 99,
        },
        "table": {"row": row, "table": str(tmp_path / "new.csv"), "columns": {"image": "photo", "question": "prompt"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    code, output = snakemake("predictions", "-n", "-p", "--configfile", str(tmp_path / "run.yaml"))
    assert code == 0, output
    found = planned(output)
    assert (found["finetune"], found["predict"]) == (1, 2) and "evaluate" not in found
    scans, table = sorted(line for line in output.splitlines() if "scripts/predict.py" in line)
    if "--table" in scans:
        scans, table = table, scans
    assert f"--model_name_or_path results/published/train/{row}/final" in scans and "--max_new_tokens 99" in scans
    assert "--question 'What is the total?'" in scans and "--output_dir results/published/predictions/scans" in scans
    assert "--columns image=photo question=prompt" in table
    values["predictions"]["scans"]["row"] = "nothing"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    code, output = snakemake("predictions", "-n", "--configfile", str(tmp_path / "run.yaml"))
    assert code != 0 and "predictions.scans.row" in output


def test_the_catalogues_small_run_plans(snakemake):
    code, output = snakemake("-n", "--directory", ".test", "--nolock", "--cores", "2")
    assert code == 0, output
    found = planned(output)
    assert (found["finetune"], found["evaluate"], found["report"]) == (1, 1, 1)


def test_no_page_names_a_target_after_a_list_of_files(root):
    """Snakemake would take it as another configuration file, and end with a traceback."""
    pages = [root / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Snakefile")]
    for folder, kinds in (
        ("docs", "md"),
        ("config", "md yaml"),
        ("profiles", "yaml"),
        ("scripts", "py"),
        ("src", "py"),
    ):
        pages += [page for kind in kinds.split() for page in (root / folder).glob(f"**/*.{kind}")]
    for page in pages:
        for line in page.read_text().splitlines():
            if "snakemake " in line:
                after = re.search(r"--config(?:file)? [^\s`]+ (?!-)([a-z]\S*)", line)
                assert after is None, f"{page.name}: {line}"
