"""A small run to send to the test cluster, and what a test asks about it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster import end_with_parent
from small_run import SIZES, copy

METHODS = ("full", "frozen", "lora", "qlora")
ROWS = [f"phi35-docvqa-{method}-bf16" for method in METHODS]
SITE = {
    "account": "research",
    "partitions": {
        "cpu": {"partition": "cpu", "max_runtime": 240},
        "a100-80gb": {"partition": "gpu", "gpus_per_node": 8, "gpu_type": "a100", "cpus_per_gpu": 1},
    },
}
EPOCHS = 8
STEPS = 3 * EPOCHS
ROW = dict(zip(METHODS, ROWS, strict=True))


def environment_of(folder: Path) -> dict[str, str]:
    """This Python's programs, and the package of the repository's copy; of the repository for a folder without one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = folder / "src" if (folder / "src").is_dir() else Path(__file__).resolve().parents[2] / "src"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(source)}


class Snakemake:
    """A Snakemake under way, and its output so far."""

    def __init__(self, folder: Path, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *arguments], cwd=folder, env=environment_of(folder), stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self, seconds: float = 900) -> int:
        """Exit code; what it said is in the error when it does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {seconds:.0f} s:\n{self.output[-6000:]}") from None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Runs:
    """A copy of the repository with a small demo; each run has a name, and shares data and base model with the others."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        copy(root, folder)
        sources = yaml.safe_load((folder / "config/demo/sources.yaml").read_text())
        sources["sizes"] = dict(SIZES)
        sources["texts"], sources["base"]["epochs"] = ["docvqa", "mixture"], 1
        (folder / "config/demo/sources.yaml").write_text(yaml.safe_dump(sources))
        # The cluster's GPUs are files: jobs that SLURM gives GPUs compute on CPUs here.
        jobs, given = folder / "src/phi3v/settings/jobs.py", "_device(run.hardware[job.pool.device])"
        text = jobs.read_text()
        assert given in text
        jobs.write_text(text.replace(given, '"cpu"'))
        self.site(SITE)

    def site(self, values: dict[str, Any]) -> None:
        (self.folder / "config/site.yaml").write_text(yaml.safe_dump(values))

    def configure(
        self, name: str, rows: list[str], speed: list[str] | None = None, *, epochs: float = 1,
        hardware: list[dict[str, Any]] | None = None, overrides: dict[str, dict[str, Any]] | None = None, **values: Any,
    ) -> str:  # fmt: skip
        """Write a run's configuration; returns its path. Epochs of 192 examples are 3 steps."""
        run = yaml.safe_load((self.folder / "config/demo.yaml").read_text())
        run |= {
            "name": name,
            "rows": {"accuracy": rows, "speed": speed or []},
            "hardware": hardware or [{"device": "cpu", "per_node": 2, "stand_in": True}],
            "speed": {"warmup_steps": 10, "timed_steps": 1, "repeats": 3},
            "overrides": {
                "*": {"micro_batch_size": 8, "flash_attention": False, "epochs": epochs},
                **(overrides or {}),
            },
            **values,
        }
        path = f"config/{name}.yaml"
        (self.folder / path).write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    def start(self, config: str, *arguments: str, profile: str = "slurm") -> Snakemake:
        log = self.folder / f"{Path(config).stem}-{time.monotonic_ns()}.out"
        # Few at a time: what the tests prove needs one, and two cores carry no more.
        quick = ["--slurm-init-seconds-before-status-checks", "2", "--jobs", "2"] if profile == "slurm" else []
        return Snakemake(self.folder, ["--profile", profile, *quick, *arguments, "--configfile", config], log)

    def run(self, config: str, *arguments: str, profile: str = "slurm", seconds: float = 900) -> tuple[int, str]:
        """(exit code, output) of a Snakemake that should end by itself."""
        snakemake = self.start(config, *arguments, profile=profile)
        return snakemake.finish(seconds), snakemake.output

    def look(self, *arguments: str) -> tuple[int, str]:
        """(exit code, output) of scripts/cluster.py."""
        done = subprocess.run(
            [sys.executable, "scripts/cluster.py", *arguments], cwd=self.folder, env=environment_of(self.folder),
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def train(self, name: str, row: str) -> Path:
        return self.folder / "results" / name / "train" / row

    def steps(self, name: str, row: str) -> int:
        """Training steps done so far."""
        try:
            lines = (self.train(name, row) / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return 0
        return len([line for line in lines if line.endswith("}")])

    def result(self, name: str, row: str) -> dict[str, str]:
        """Digests of what must not depend on where and how often a row was started: weights and predictions."""
        files = [
            *self.train(name, row).glob("final/*.safetensors"),
            *(self.folder / "results" / name / "evaluate" / row).rglob("predictions.jsonl"),
        ]
        assert files, f"{name} {row}: nothing there"
        return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def report(self, name: str) -> dict[str, dict[str, str]]:
        """Rows of the report's accuracy table that have a result."""
        lines = (self.folder / "results" / name / "report/accuracy.tsv").read_text().splitlines()
        header, *rows = [line.split("\t") for line in lines]
        found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        # Without how long it took, and what depends on the other rows of the run.
        kept = ("before", "after", "control", "n", "after_low", "after_high", "observed_dtype", "observed_attention")
        return {row: {name: values[name] for name in kept} for row, values in found.items() if values["after"]}

    def step_numbers(self, name: str, row: str) -> list[int]:
        lines = (self.train(name, row) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def losses(self, name: str, row: str) -> list[float]:
        lines = (self.train(name, row) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def submissions(output: str, row: str) -> int:
    """SLURM jobs that a Snakemake submitted for a row's training."""
    return len(re.findall(rf"has been submitted with SLURM jobid \d+ \(log: \S*/rule_finetune/{row}/", output))


def job_of(cluster, row: str, rule: str = "finetune") -> tuple[str, str]:
    """(job id, machine) of a row's running job."""
    for line in cluster.out("squeue", "-h", "-t", "RUNNING", "-o", "%i|%N|%k").splitlines():
        job, node, comment = line.split("|")
        if comment == f"rule_{rule}_wildcards_{row}":
            return job, node
    return "", ""


def workers(folder: Path) -> list[psutil.Process]:
    """Training processes of a row's folder, first rank first."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = process.info["cmdline"] or []
        rank = (process.info["environ"] or {}).get("RANK")
        if rank is not None and "scripts/finetune.py" in command and f"results/{folder}" in " ".join(command):
            found.append((int(rank), process))
    return [process for _, process in sorted(found, key=lambda item: item[0])]


def assert_complete(runs, name: str, rows: list[str]) -> None:
    """A full report, every step once, and the weights and answers of the undisturbed run."""
    assert set(runs.report(name)) == set(rows)
    for row in rows:
        assert runs.step_numbers(name, row) == list(range(1, STEPS + 1))
        assert runs.result(name, row) == runs.result("undisturbed", row)
        assert runs.report(name)[row] == runs.report("undisturbed")[row]


def epochs_of(runs, seconds: float) -> int:
    """Epochs that train for at least so long: as fast as the undisturbed run's fastest step, whatever ran beside it."""
    lines = (runs.train("undisturbed", ROW["lora"]) / "metrics.jsonl").read_text().splitlines()
    return max(EPOCHS, round(seconds / (3 * min(json.loads(line)["seconds"] for line in lines))))
