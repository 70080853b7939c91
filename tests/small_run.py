"""A copy of the repository whose demo is smaller: fewer rows, one pass, fewer timed steps. Under two minutes on two cores."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROWS = {"accuracy": ["phi3-docvqa-lora-bf16", "phi35-digits-full-bf16"], "speed": ["phi3-a100-full-eager-8gpu"]}
SIZES = {"docvqa_train": 192, "docvqa_test": 24, "hateful_memes": 8, "nlvr2": 8, "docvqa_mini_train": 8}
SIZES |= {"ucf101_train": 1, "ucf101_val": 1, "ucf101_test": 1, "mixture_train": 320, "mixture_val": 8}


def edit(path: Path, change) -> None:
    """Apply change(values) to a YAML file."""
    values = read(path)
    change(values)
    write(path, values)


def read(path: Path):
    return yaml.safe_load(path.read_text())


def write(path: Path, values) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def copy(root: Path, folder: Path) -> Path:
    """Copy what git knows of the repository, tests aside, into `folder`; returns it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        # slurm is a link to a folder.
        if not name.startswith("tests/") and ((root / name).is_file() or (root / name).is_symlink()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)
    return folder


def make(root: Path, folder: Path, rows=None) -> Path:
    """A copy of the repository in `folder` whose demo is small; returns `folder`."""
    copy(root, folder)

    def smaller(values):
        values["sizes"] = dict(SIZES)
        values["texts"] = ["digits", "docvqa", "mixture"]
        values["base"]["epochs"] = 1

    def quick(values):
        values["rows"] = rows or ROWS
        values["speed"] = {"warmup_steps": 10, "timed_steps": 1, "repeats": 3}
        # One row has two processes. Another would cost a further start of PyTorch.
        values["hardware"][0]["rows"] = [ROWS["accuracy"][0]]
        values["hardware"].insert(1, {"device": "cpu", "per_node": 1, "stand_in": True, "rows": ["*gpu*"]})
        values["overrides"] = {
            "*": {"micro_batch_size": 8, "flash_attention": False, "epochs": 1},
            ROWS["accuracy"][0]: {"learning_rate": 0.002},
            ROWS["accuracy"][1]: {"epochs": 0.2},
            ROWS["speed"][0]: {"batch_size": 16},
        }

    edit(folder / "config/demo/sources.yaml", smaller)
    edit(folder / "config/demo.yaml", quick)
    return folder


def snakemake(folder: Path, *arguments, timeout=900, path=(), **environment):
    """(exit code, output, seconds) of a demo run in the copy, in this Python's environment. path: folders before all others of PATH."""
    folders = [*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(folder / "src"), **environment,
    }  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "profiles/demo", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def planned(output: str) -> dict[str, int]:
    """Rule to number of jobs, of a dry run's table or a run's first line."""
    table = re.findall(r"^(\S+) +(\d+)$", output, re.M)
    for total, jobs in re.findall(r"^(\d+) jobs?: (.*)$", output, re.M):
        table += [("total", total), *(job.split(" ") for job in jobs.split(", "))]
    return {name: int(n) for name, n in table}


def accuracies(folder: Path) -> dict[str, float]:
    """Row to accuracy after training, of a finished run's table."""
    header, *lines = [
        line.split("\t") for line in (folder / "results/demo/report/accuracy.tsv").read_text().splitlines()
    ]
    return {line[0]: float(line[header.index("after")]) for line in lines if line[header.index("after")]}
