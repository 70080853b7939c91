"""What only a node can tell: a short job looks at folders, software and GPUs; another times all-reduce over nodes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from phi3v.cluster.check import Problem
from phi3v.cluster.site import Partition, Site
from phi3v.planning.resources import Resources

# Less in TMPDIR or /dev/shm (processes that load pictures, NCCL) is worth knowing.
LEAST_FREE_MB = 1000
# Of the hardware file's network_gb_s: a rate below is that of another network.
LEAST_SHARE = 0.1
# Each line of output is NODE NAME VALUE. $1 a file of this folder, $2 Python, $3 scratch, $4 cache, $5 the package or
# "", $6 what Python runs on a GPU.
PROBE = r"""
free() {
  file=$(mktemp "$1/.phi3v-XXXXXX" 2>/dev/null) || { echo none; return; }
  if head -c 16777216 /dev/zero >"$file" 2>/dev/null; then df -Pm "$1" | awk 'NR==2 {print $4}'; else echo none; fi
  rm -f "$file"
}
{
  echo shared "$([ -f "$1" ] && echo yes || echo no)"
  echo python "$("$2" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)"
  echo apptainer "$(command -v apptainer || command -v singularity || echo none)"
  echo TMPDIR "$(free "$TMPDIR") $TMPDIR"
  echo shm "$(free /dev/shm) /dev/shm"
  echo home "$(free "$HOME") $HOME"
  [ -z "$3" ] || echo scratch "$(mkdir -p "$3" 2>/dev/null; free "$3")"
  [ -z "$4" ] || echo cache "$(mkdir -p "$4" 2>/dev/null; free "$4")"
  (begin) >/dev/null 2>&1
  echo setup "$([ $? = 0 ] && echo yes || echo no)"
  [ -z "$5" ] || echo gpu "$( (begin >/dev/null 2>&1; PYTHONPATH="$5" exec "$2" -c "$6") 2>/dev/null || echo none)"
} | sed "s/^/$(uname -n) /"
"""
# What a training job would report of its GPU: `yes`, `cpu-build REASON`, or `no REASON`; nothing without torch.
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
# As the workflow starts a row: the environment of jobs, and none of SLURM's variables but the job's own.
START = """
import os, sys
sys.path.insert(0, "src")
from phi3v.cluster.site import load_site
site = load_site()
kept = {{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}}
kept |= {{name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CONF") if name in os.environ}}
kept |= site.environment(in_job=True) | {{"PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"]}}
launch = "scripts/torchrun_nodes.sh {nodes} {processes} scripts/slurm/all_reduce.py"
os.execvpe("bash", ["bash", "-c", "set -euo pipefail; " + site.prologue("scripts") + launch], kept)
"""


def has_gpus(entry: Partition) -> bool:
    return bool(entry.gpus_per_node or entry.gpu_type)


def _name(entry: Partition) -> str:
    return f"partition {entry.partition}" if entry.partition else "the default partition"


def _options(site: Site, entry: Partition, wanted: Resources) -> list[str]:
    """Options of sbatch and srun by which the executor would ask for the same."""
    names = {
        "slurm_partition": "partition", "slurm_account": "account", "qos": "qos", "constraint": "constraint",
        "runtime": "time", "mem_mb": "mem", "mem_mb_per_cpu": "mem-per-cpu", "nodes": "nodes", "tasks": "ntasks",
        "gres": "gres",
    }  # fmt: skip
    found = site.resources(entry, wanted, is_row=True)
    if found["mem_mb_per_cpu"]:
        found["mem_mb"] = None
    extra = [flag for flag in shlex.split(str(found["slurm_extra"])) if not flag.startswith("--signal=")]
    return [*(f"--{names[name]}={value}" for name, value in found.items() if name in names and value), *extra]


def probe(site: Site, entry: Partition, folder: Path, nodes: int = 1, wait_seconds: int = 60) -> list[Problem]:
    """Problems of nodes of the partition: shared folder, Python, Apptainer, folders, modules, GPUs.

    folder: the repository. On a partition with GPUs the job requests one of each node. A partition without free nodes
    within `wait_seconds` gives a warning.
    """
    gpus, name = has_gpus(entry), _name(entry)
    # Importing torch takes memory.
    gres = ":".join(["gpu", *([entry.gpu_type] if entry.gpu_type else []), "1"]) if gpus else ""
    wanted = Resources(2, 4000 if gpus else 200, 1, nodes, gres, "")
    marker = folder / f".cluster-check-{uuid.uuid4().hex}"
    # In double quotes, the shell of the job expands $USER and the like.
    given = [str(marker), sys.executable, site.scratch, site.cache, str(folder / "src") if gpus else ""]
    words = " ".join([*(f'"{word}"' for word in given), shlex.quote(GPU_PROBE)])
    defaults = 'USER="${USER:-$(id -un)}" TMPDIR="${TMPDIR:-/tmp}"'
    begin = f"begin() {{ set -euo pipefail; {site.prologue(str(folder / 'scripts'))} }}"
    command = ["srun", f"--immediate={wait_seconds}", "--ntasks-per-node=1", "--quiet", *_options(site, entry, wanted)]
    command += ["bash", "-lc", f"{defaults}; set -- {words}\n{begin}\n{PROBE}"]
    marker.write_text("seen\n")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait_seconds + 120, check=False)
    except subprocess.TimeoutExpired:
        return [Problem("warning", f"{name}: its nodes did not answer in time, so they were not checked")]
    finally:
        marker.unlink(missing_ok=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return [Problem("warning", f"{name}: no node could be checked: {reason[0]}")]
    seen: dict[str, dict[str, str]] = {}
    for node, what, value in re.findall(r"^(\S+) (\w+) (.*)$", done.stdout, re.M):
        seen.setdefault(node, {})[what] = value
    alike: dict[tuple[Literal["error", "warning"], str], list[str]] = {}
    for node in sorted(seen):
        for level, text in _seen(seen[node], site, folder):
            alike.setdefault((level, text), []).append(node)
    return [
        Problem(level, text.replace("<where>", f"{name}: on {', '.join(where)}"))
        for (level, text), where in alike.items()
    ]


def _seen(seen: dict[str, str], site: Site, folder: Path) -> Iterator[tuple[Literal["error", "warning"], str]]:
    """Levels and texts of one node's problems, with `<where>` for its name."""
    if seen.get("shared") != "yes":
        yield "error", f"<where> {folder} is missing or another folder; expected a file system that all nodes share"
    if (python := seen.get("python", "none")) != f"{sys.version_info.major}.{sys.version_info.minor}":
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        expected = f"expected Python {here} as here, in a folder that all nodes share"
        yield "error", f"<where> {sys.executable}: got Python {python}; {expected}"
    if seen.get("apptainer", "none") == "none":
        yield "warning", "<where> there is no apptainer; --sdm apptainer will not work there, but --sdm conda will"
    for what in ("TMPDIR", "shm", "home"):
        free, _, path = seen.get(what, "none ").partition(" ")
        # With caches elsewhere, a job writes nothing to the home folder; some centres let it only be read there.
        full: Literal["error", "warning"] = "warning" if what == "home" and site.cache else "error"
        title = f"{what}={path}" if what == "TMPDIR" else path or what
        if free == "none":
            yield full, f"<where> 16 MB could not be written to {title} (full, over quota, or read-only)"
        elif int(free) < LEAST_FREE_MB and what != "home":
            yield "warning", f"<where> {title} has {free} MB free; expected at least {LEAST_FREE_MB}"
    for field, path in (("scratch", site.scratch), ("cache", site.cache)):
        if path and seen.get(field, "none") == "none":
            yield "error", f"field `{field}`: got {path}: <where> 16 MB could not be written there"
    if seen.get("setup") != "yes":
        lines = "; ".join([*site.setup, *site.modules])
        yield "error", f"fields `setup` and `modules`: got {lines}: <where> they end with an error"
    state, _, reason = seen.get("gpu", "").partition(" ")
    if state == "no":
        yield "error", f"<where> training would be refused: {reason}"
    if state == "cpu-build":
        text = "training needs --sdm conda or --sdm apptainer, whose PyTorch for CUDA 13 needs driver 580 or newer"
        yield "warning", f"<where> {text}: {reason}"


def all_reduce(
    site: Site, entry: Partition, folder: Path, nodes: int, processes: int, network_gb_s: float | None
) -> tuple[list[str], list[Problem]]:
    """(lines to print, problems) of a job that times all-reduce over `nodes`, started as the workflow starts a row.

    processes: on each node. network_gb_s: what one node's network carries in one direction, from the hardware file.
    """
    name, gres = f"phi3v-{uuid.uuid4().hex}", f"gpu:{processes}" if has_gpus(entry) else ""
    wanted = entry.fit(Resources(10, 4000 * processes, processes, nodes, gres, ""))
    start = START.format(nodes=nodes, processes=processes)
    log, script = folder / f".{name}.log", f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(start)}\n"
    command = ["sbatch", "--wait", "--quiet", f"--job-name={name}", f"--output={log}", f"--chdir={folder}"]
    command += [f"--cpus-per-task={wanted.cpus}", *_options(site, entry, wanted)]
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=1800, check=False)
        text = log.read_text(errors="replace") if log.is_file() else ""
    except subprocess.TimeoutExpired:
        return [], [Problem("warning", f"{_name(entry)}: {nodes} nodes did not run a job within half an hour")]
    finally:
        # Ctrl-C leaves no job behind; an ended one is not found.
        subprocess.run(["scancel", f"--name={name}"], capture_output=True, check=False)
        log.unlink(missing_ok=True)
    lines = [line for line in text.splitlines() if line.startswith("all-reduce:")]
    nccl = sorted({match[1] for match in re.finditer(r"NCCL INFO (NET/\S+ : Using .*|Using network .*)", text)})
    rate = re.search(r"([\d.]+) GB/s", "\n".join(lines))
    if done.returncode or rate is None:
        reason = " | ".join((done.stderr + text).strip().splitlines()[-5:]) or "no output"
        return lines, [Problem("error", f"{_name(entry)}: all-reduce over {nodes} nodes failed: {reason}")]
    found = []
    if nodes > 1 and network_gb_s and float(rate[1]) < LEAST_SHARE * network_gb_s:
        reached = f"all-reduce over {nodes} nodes reaches {rate[1]} GB/s"
        text = f"{reached}; the hardware file has network_gb_s: {network_gb_s:g}"
        remedy = "NCCL may use another interface: set env.NCCL_SOCKET_IFNAME or env.NCCL_IB_HCA in config/site.yaml"
        found.append(Problem("warning", f"{_name(entry)}: {text}; {remedy}"))
    return [*lines, *(f"NCCL: {line}" for line in nccl)], found
