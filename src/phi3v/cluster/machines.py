"""What a job finds on a machine of a partition: asked by a small job of a minute, since the login node cannot tell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from phi3v.cluster.check import Problem
from phi3v.settings import Partition, Site

# Each line of its output is NAME VALUE.
PROBE = r"""
echo shared "$([ -f "$1" ] && echo yes || echo no)"
echo python "$("$2" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)"
echo apptainer "$(command -v apptainer || command -v singularity || echo none)"
echo scratch "$([ -z "$3" ] || { mkdir -p "$3" && [ -w "$3" ] && df -Pk "$3" | awk 'NR==2 {print $4}'; } || echo none)"
echo cache "$([ -z "$4" ] || { mkdir -p "$4" && [ -w "$4" ]; } && echo yes || echo no)"
echo modules "$([ -z "$5" ] || { module load $5 >/dev/null 2>&1; } && echo yes || echo no)"
[ -z "$6" ] || echo gpu "$([ -z "$5" ] || module load $5 >/dev/null 2>&1; PYTHONPATH="$6" "$2" -c "$7" 2>/dev/null || echo none)"
"""
# What a training job would say of the GPU that it was given: `yes`, `cpu-build REASON`, or `no REASON`; nothing without torch.
GPU_PROBE = """
import torch
from phi3v.model.runtime import compute_device
from phi3v.settings import Compute, SettingsError
try:
    compute_device(Compute(expect_device="cuda"))
    print("yes")
except SettingsError as error:
    print("no" if torch.version.cuda or torch.version.hip else "cpu-build", error)
"""


def probe(site: Site, entry: Partition, folder: Path, wait_seconds: int = 60) -> list[Problem]:
    """Problems of a machine of the partition: shared folder, Python, Apptainer, scratch, cache, modules, its GPUs.

    folder: the repository. On a partition with GPUs the job asks for one of them. A partition without a free machine
    within `wait_seconds` gives a warning.
    """
    marker = folder / f".cluster-check-{uuid.uuid4().hex}"
    marker.write_text("seen\n")
    command = ["srun", f"--immediate={wait_seconds}", "--nodes=1", "--ntasks=1", "--time=2", "--quiet"]
    has_gpus = bool(entry.gpus_per_node or entry.gpu_type)
    # Importing torch takes memory.
    command += (
        [f"--gres=gpu:{entry.gpu_type}:1" if entry.gpu_type else "--gres=gpu:1", "--mem=4000"]
        if has_gpus
        else ["--mem=100"]
    )
    for flag, value in (
        ("--partition", entry.partition), ("--account", entry.account or site.account), ("--qos", entry.qos or site.qos),
        ("--constraint", entry.constraint),
    ):  # fmt: skip
        command += [f"{flag}={value}"] if value else []
    # In double quotes, the shell of the job expands $USER and the like.
    given = [str(marker), sys.executable, site.scratch, site.cache, " ".join(site.modules)]
    given += [str(folder / "src")] if has_gpus else [""]
    words = " ".join(f'"{word}"' for word in given)
    text = f'USER="${{USER:-$(id -un)}}"; set -- {words} {shlex.quote(GPU_PROBE)}\n{PROBE}'
    try:
        done = subprocess.run(
            [*command, "bash", "-lc", text], capture_output=True, text=True, timeout=wait_seconds + 120, check=False
        )
    except subprocess.TimeoutExpired:
        return [Problem("warning", f"{_named(entry)}: its machine did not answer: not looked at")]
    finally:
        marker.unlink(missing_ok=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return [Problem("warning", f"{_named(entry)}: no machine could be looked at: {reason[0]}")]
    return _judge(dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line), site, entry, folder)


def _named(entry: Partition) -> str:
    return f"partition {entry.partition}" if entry.partition else "the default partition"


def _judge(seen: dict[str, str], site: Site, entry: Partition, folder: Path) -> list[Problem]:
    where, found = f"{_named(entry)}: on its machines", []
    if seen.get("shared") != "yes":
        found.append(
            Problem("error", f"{where} {folder} is not this folder; expected a file system that all machines share")
        )
    if seen.get("python") != f"{sys.version_info.major}.{sys.version_info.minor}":
        found.append(Problem("error", (
            f"{where} {sys.executable} is {seen.get('python', 'none')}; expected this Python, in a folder that all "
            "machines share"
        )))  # fmt: skip
    if seen.get("apptainer", "none") == "none":
        found.append(
            Problem("warning", f"{where} there is no apptainer; --sdm apptainer will not work, --sdm conda will")
        )
    if site.scratch and seen.get("scratch", "none") == "none":
        found.append(Problem("error", f"field `scratch`: got {site.scratch}: {where} it cannot be written"))
    if seen.get("cache") != "yes":
        found.append(Problem("error", f"field `cache`: got {site.cache}: {where} it cannot be written"))
    if seen.get("modules") != "yes":
        found.append(Problem("error", f"field `modules`: got {' '.join(site.modules)}: {where} they do not load"))
    state, _, reason = seen.get("gpu", "").partition(" ")
    if state == "no":
        found.append(Problem("error", f"{where} training would be refused: {reason}"))
    if state == "cpu-build":
        found.append(Problem("warning", (
            f"{where} only --sdm conda or apptainer can train, whose PyTorch for CUDA 13 needs driver 580 or newer: {reason}"
        )))  # fmt: skip
    return found


def login_problems(folder: Path) -> list[Problem]:
    """Problems of the machine that Snakemake runs on."""
    found = []
    if shutil.which("snakemake", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
        found.append(Problem("error", "snakemake was not found; expected it in this environment: make venv"))
    free = shutil.disk_usage(folder).free / 1e9
    if free < 100:
        found.append(
            Problem("warning", f"{folder}: {free:.0f} GB free; the published run wants more (snakemake -c1 plan)")
        )
    return found
