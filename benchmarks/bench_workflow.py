"""Measure what Snakemake needs before the first job, for runs of many rows: time, processor time and peak memory.

    python benchmarks/bench_workflow.py 100 1000 10000          # dry runs, and the start of one job inside a cluster job
    python benchmarks/bench_workflow.py 1000 --only "dry run" --profile out.prof   # under cProfile

A run's rows are one line of config/accuracy.tsv with N learning rates. Each dry run is of all rows. "job": the Snakemake
that the executor starts inside a SLURM job, for one row. Nothing is downloaded or trained.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LINE = "phi35-docvqa_mini-full-bf16"


def write_run(folder: Path, rows: int) -> Path:
    """A run's configuration with so many rows."""
    run = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    text = (ROOT / "config/accuracy.tsv").read_text().splitlines()
    header, *lines = [line for line in text if not line.startswith("#")]
    cells = next(line for line in lines if line.startswith(LINE + "\t")).split("\t")
    column = header.split("\t").index("learning_rate")
    table = [header]
    for number in range(rows):
        rate = f"{1e-6 * (1 + number):.6e}"
        table.append("\t".join([f"row{number}", *cells[1:column], rate, *cells[column + 1 :]]))
    (folder / "rows.tsv").write_text("\n".join(table) + "\n")
    run["name"] = f"rows{rows}"
    run["files"] |= {"accuracy": [str(folder / "rows.tsv")], "speed": []}
    run["rows"] = {"accuracy": ["*"], "speed": []}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def measure(arguments: list[str], program: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, MiB at the peak) of one Snakemake. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *program, "-m", "snakemake", *arguments],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        clock = time.perf_counter() - started
        if status:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace")[-3000:])
    return clock, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=int)
    parser.add_argument("--profile", metavar="FILE", help="where cProfile's figures of the last measurement go")
    parser.add_argument("--only", choices=["dry run", "job"], help="measure this alone")
    given = parser.parse_args()
    program = ["-m", "cProfile", "-o", given.profile] if given.profile else []
    print("| rows | what | seconds | CPU seconds | peak MiB |\n|---|---|---|---|---|")
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            config = ["--configfile", str(write_run(Path(folder), rows)), "--nolock", "-n", "--quiet", "all"]
            target = f"finetune:row=row{rows // 2}"
            job = ["--target-jobs", target, "--allowed-rules", "finetune", "--mode", "remote", "--cores", "all"]
            for what, arguments, environment in (
                ("dry run", config, {}),
                ("job", [*config, *job, "--ignore-incomplete"], {"SLURM_JOB_ID": "1"}),
            ):
                if given.only in (None, what):
                    clock, processor, peak = measure(arguments, program, environment)
                    print(f"| {rows:,} | {what} | {clock:.1f} | {processor:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
