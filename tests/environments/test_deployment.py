"""Software deployment: all modes plan, each rule names its smallest environment, and rules run in nothing but their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

STAND_INS = Path(__file__).parent / "stand_ins"
GROUPS = {
    "data": {"download_data", "download_model", "convert", "digits", "demo_sources", "score"},
    "report": {"report", "plan_run"},
}


def snakemake(folder, *arguments):
    """(exit code, output) of a run with the stand-ins in place of Apptainer and conda."""
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PATH": path},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory):
    """A small run's folder, with files where images would be."""
    folder = small_run.make(root, tmp_path_factory.mktemp("deployment"))
    for name in ("train", "report"):
        (folder / f"containers/{name}.sif").touch()
    return folder


@pytest.mark.parametrize(
    ("methods", "environments"),
    [
        ((), set()),
        (("conda",), {"data", "train-cpu", "report"}),
        (("apptainer",), set()),
        (("conda", "apptainer"), set()),
    ],
)
def test_every_mode_of_deployment_plans(copy, methods, environments):
    flags = ["--sdm", *methods] if methods else []
    code, output = snakemake(copy, "-n", "--profile", "profiles/demo", *flags)
    assert code == 0, output
    assert small_run.planned(output)["finetune"] == 2
    assert set(re.findall(r"envs/([\w-]+)\.yaml will be created", output)) == environments


def test_gpus_take_the_cuda_environment(copy):
    code, output = snakemake(copy, "-n", "--sdm", "conda")
    assert code == 0, output
    assert set(re.findall(r"envs/([\w-]+)\.yaml will be created", output)) == {"data", "train-cuda", "report"}


def test_amd_gpus_have_no_environment_and_it_says_so(copy):
    code, output = snakemake(copy, "-n", "--sdm", "conda", "--config", "hardware=[{device: mi300x, per_node: 8}]")
    assert code != 0
    assert "no environment is locked for them" in output
    assert "nothing was started" in output


def test_each_rule_names_the_smallest_environment(root):
    for path in (root / "workflow/rules").glob("*.smk"):
        for name, body in re.findall(r"^ *rule (\w+):\n(.*?)(?=^ *rule \w+:|\Z)", path.read_text(), re.M | re.S):
            if re.search(r"^ *run:", body, re.M):
                continue  # in Snakemake's own environment
            group = next((group for group, rules in GROUPS.items() if name in rules), "train")
            assert f"{group.upper()}_ENV" in body, f"{path.name}: rule {name}"


def test_a_module_of_another_workflow(root, copy, tmp_path):
    """`module phi3v` in somebody's own Snakefile: its rules find the scripts and the settings beside them."""
    (tmp_path / "Snakefile").write_text(
        f"configfile: 'mine.yaml'\nmodule phi3v:\n    snakefile: '{copy}/Snakefile'\n    config: config\n"
        "use rule * from phi3v as phi3v_*\nrule mine:\n    default_target: True\n    input: rules.phi3v_all.input\n"
    )
    values = json.loads(json.dumps(small_run.read(copy / "config/demo.yaml")))
    values["files"] = {kind: [f"{copy}/{path}" for path in paths] for kind, paths in values["files"].items()}
    values["demo"] = f"{copy}/{values['demo']}"
    small_run.write(tmp_path / "mine.yaml", values)
    code, output = snakemake(tmp_path, "-n", "-p", "--cores", "2")
    assert code == 0, output
    assert f"python {copy}/scripts/digits.py" in output
    assert re.search(rf"torchrun .* {re.escape(str(copy))}/scripts/finetune\.py", output)
    assert small_run.planned(output)["phi3v_finetune"] == 2


def test_snakedeploy_makes_a_folder_that_plans(root, copy, tmp_path):
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    (copy / ".git/info/exclude").write_text("*.sif\n.snakemake\n")
    git = ["git", "-C", str(copy), "-c", "user.name=test", "-c", "user.email=test@invalid"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "small run"], check=True)
    deploy = [str(Path(sys.executable).parent / "snakedeploy"), "deploy-workflow", str(copy), str(tmp_path / "mine")]
    done = subprocess.run([*deploy, "--branch", "HEAD"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The step of docs/how-to/module.md after it: the module's Snakefile is the clone's, whose scripts the rules start.
    snakefile = tmp_path / "mine/workflow/Snakefile"
    assert '"Snakefile"' in snakefile.read_text()
    snakefile.write_text(snakefile.read_text().replace('"Snakefile"', f'"{copy}/Snakefile"'))
    code, output = snakemake(tmp_path / "mine", "-n", "--cores", "2", "--configfile", "config/demo.yaml")
    assert code == 0, output
    assert small_run.planned(output)["finetune"] == 2


def test_a_rule_runs_in_its_own_conda_environment(copy):
    """The settings and the plan, in an environment made from envs/report.yaml alone (the verify test runs every rule)."""
    code, output = snakemake(
        copy, "--profile", "profiles/demo", "--sdm", "conda", "--config", "name=planned", "--", "plan"
    )
    assert code == 0, output
    assert "Activating conda environment" in output
    assert (copy / "results/planned/plan/plan.json").is_file()
    made = list((copy / ".snakemake/conda").glob("*/bin/python"))
    assert len(made) == 1
    installed = subprocess.run(
        [made[0], "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {package["name"] for package in json.loads(installed.stdout)}
    assert "torch" not in names
    assert "pydantic" in names


@pytest.mark.verify
def test_every_rule_runs_in_its_own_conda_environment(root, tmp_path, capsys):
    import rootfs

    figures = rootfs.Stopwatch(capsys)
    copy = small_run.make(root, tmp_path / "run")
    with figures("environments data, train-cpu, report and the small run in them", copy / ".snakemake/conda"):
        code, output, _ = small_run.snakemake(copy, "--sdm", "conda", path=[STAND_INS], timeout=3000)
    assert code == 0, output[-6000:]
    assert set(re.findall(r"Creating conda environment \S*envs/([\w-]+)\.yaml", output)) == {
        "data",
        "train-cpu",
        "report",
    }
    assert small_run.accuracies(copy).keys() == set(small_run.ROWS["accuracy"])
