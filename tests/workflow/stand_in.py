"""A copy of the repository whose jobs are stand-ins that take a moment: tests of what Snakemake runs, and when."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import small_run

HERE = Path(__file__).parent / "stand_ins"
JOBS = ("download", "convert", "validate", "finetune", "evaluate")
TABLE = ("row", "model", "dataset", "method", "dtype", "flash_attention", "batch_size", "gpus", "origin")
ROWS = ("one", "two")


def make(root: Path, folder: Path) -> Path:
    """The copy, with a run `stand` of two rows in config/stand.yaml; returns `folder`."""
    small_run.copy(root, folder)
    for name in JOBS:
        shutil.copyfile(HERE / "job.py", folder / f"scripts/{name}.py")
    (folder / "source").mkdir()
    configure(folder, "stand", ROWS)
    return folder


def configure(folder: Path, name: str, rows: tuple[str, ...], **values: object) -> None:
    """Write config/NAME.yaml and its table of rows."""
    lines = ["\t".join(TABLE)]
    lines += ["\t".join((row, "phi35-vision", "digits", "full", "bf16", "no", "64", "2", "ours")) for row in rows]
    (folder / f"config/{name}.tsv").write_text("\n".join(lines) + "\n")
    for kind in ("models", "datasets"):
        known = small_run.read(folder / f"config/{'demo' if kind == 'models' else 'digits'}/{kind}.yaml")
        for entry in known.values():
            for part in entry.get("splits", {"": entry}).values():
                part["url"] = "file:source"
        small_run.write(folder / f"config/{name}-{kind}.yaml", known)
    files = {kind: [f"config/{name}-{kind}.yaml"] for kind in ("models", "datasets")}
    run = {
        "name": name,
        "title": name,
        "files": {**files, "hardware": ["config/hardware.yaml"], "accuracy": [f"config/{name}.tsv"]},
        "hardware": [{"device": "cpu", "per_node": 2}],
        **values,
    }
    small_run.write(folder / f"config/{name}.yaml", run)


def start(folder: Path, *arguments: str, name: str = "stand", profile: str = "profiles/demo") -> subprocess.Popen:
    """Snakemake on a run, in a process group of its own."""
    path = os.pathsep.join([str(HERE), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "snakemake", "--profile", profile, "--configfile", f"config/{name}.yaml"]
    return subprocess.Popen(
        [*command, "--", *arguments] if arguments and not arguments[0].startswith("-") else [*command, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder / "src")},
    )  # fmt: skip


def snakemake(folder: Path, *arguments: str, **options: str) -> tuple[int, str]:
    """(exit code, output) of a Snakemake that ends by itself."""
    process = start(folder, *arguments, **options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output
