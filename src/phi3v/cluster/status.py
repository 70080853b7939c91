"""Progress of a run: each row's state, SLURM job, step and time left, from result files, metrics and squeue."""

from __future__ import annotations

import getpass
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from phi3v.cluster.ask import ask
from phi3v.settings import AccuracyRow, Job, ResolvedRun

# The executor's comment on each of its jobs.
COMMENT = re.compile(r"^rule_(?P<rule>\w+?)(?:_wildcards_(?P<wildcards>.*))?$")
# What a row's job does, by its rule.
ACTIVITY = {"finetune": "training", "speed_row": "timing", "evaluate_official": "official"}


@dataclass(frozen=True)
class RunningJob:
    """A job of this working folder that SLURM has not finished."""

    id: str
    state: str
    rule: str
    wildcards: str
    """Row, or key of the data; "" for rules without."""
    nodes: str
    """Nodes, or why it waits."""
    elapsed: str

    def __str__(self) -> str:
        what = f"{self.rule} {self.wildcards}".strip()
        return f"job {self.id}: {what}, {self.state.lower()} {self.elapsed} on {self.nodes or 'no machine yet'}"


def running_jobs(folder: Path) -> list[RunningJob]:
    """This user's unfinished jobs that a Snakemake in `folder` submitted; raises ClusterError."""
    found = []
    for line in ask("squeue", "--noheader", "--user", getpass.getuser(), "-o", "%i|%T|%Z|%M|%R|%k").splitlines():
        job, state, where, elapsed, nodes, comment = line.split("|", 5)
        match = COMMENT.match(comment)
        if match and os.path.realpath(where) == os.path.realpath(folder):
            found.append(RunningJob(job, state, match["rule"], match["wildcards"] or "", nodes, elapsed))
    return found


def nodes_to_avoid(folder: Path, rule: str, wildcards: Iterable[str], partition: str) -> str:
    """Nodes of this user's newest job of a rule in `folder`, if its partition has as many working others of their kind.

    "" if it has not. Of a job that SLURM has forgotten, the first node, from the job's log. Raises ClusterError.
    """
    # As the executor writes them.
    joined = "_".join(wildcards).replace("/", "_")
    comment = "_wildcards_".join([f"rule_{rule}", *([joined] if joined else [])])
    found = {}
    for log in (folder / ".snakemake/slurm_logs" / f"rule_{rule}" / joined).glob("[0-9]*.log"):
        if host := re.search(r"^ *Host: ([^\s.]+)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
            found[int(log.stem)] = host[1], partition, 1
    every = ask("squeue", "--noheader", "--states=all", "--user", getpass.getuser(), "-o", "%A|%N|%P|%D|%Z|%k")
    for line in every.splitlines():
        job, nodes, its_partition, width, where, its_comment = line.split("|", 5)
        if its_comment == comment and os.path.realpath(where) == os.path.realpath(folder):
            found[int(job)] = nodes, its_partition, int(width)
    nodes, partition, count = found[max(found)] if found else ("", "", 0)
    if not nodes:
        return ""
    failed = ask("scontrol", "show", "hostnames", nodes).split()
    states, kinds = {}, {}
    among = [f"--partition={partition}"] if partition else []
    for line in ask("sinfo", "--noheader", "--Node", *among, "-o", "%N|%t|%G|%f|%c|%m").splitlines():
        name, states[name], kinds[name] = line.strip().split("|", 2)
    wanted = {kinds.get(name) for name in failed}
    # A star: the node does not respond.
    working = [name for name, state in states.items() if re.fullmatch(r"(idle|mix|alloc|comp)[^*]*", state)]
    others = [name for name in working if name not in failed and kinds[name] in wanted]
    return nodes if len(others) >= count and states.keys() >= {*failed} else ""


@dataclass(frozen=True)
class Progress:
    """Of one training job, from its metrics."""

    step: int
    steps: int
    """All of them."""
    seconds_left: float


def progress(folder: Path) -> Progress | None:
    """Step and time left of a training folder; None before its first step.

    The number of steps follows from the epochs set and the epoch reached; the time from the median of 50 steps.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    # The last line may still be in writing.
    lines = [json.loads(line) for line in text.splitlines()[-60:] if line.endswith("}")]
    lines = [line for line in lines if "seconds" in line and line.get("epoch")]
    if not lines:
        return None
    last, steps = lines[-1], settings["max_steps"]
    if steps < 1:
        steps = max(last["step"], round(settings["epochs"] * last["step"] / last["epoch"]))
    seconds = statistics.median(line["seconds"] for line in lines[-50:])
    return Progress(last["step"], steps, seconds * (steps - last["step"]))


def status_lines(run: ResolvedRun, root: Path, jobs: list[RunningJob]) -> list[str]:
    """A line per row: state, SLURM job, progress; then jobs that belong to no row."""
    results = root / "results" / run.settings.name
    rows = [*run.accuracy, *run.speed]
    width = max((len(job.row.row) for job in rows), default=3)
    lines = [f"{'row':{width}}  {'state':9}  {'job':>10}  {'on':14}  {'step':>13}  {'left':>9}  elapsed"]
    counts: Counter[str] = Counter()
    for job in rows:
        at = next((found for found in jobs if found.wildcards == job.row.row), None)
        state, step, left = _row_state(job, results, at)
        counts[state] += 1
        number, nodes, elapsed = (at.id, at.nodes, at.elapsed) if at else ("", "", "")
        line = f"{job.row.row:{width}}  {state:9}  {number:>10}  {nodes:14}  {step:>13}  {left:>9}  {elapsed}"
        lines.append(line.rstrip())
    names = {job.row.row for job in rows}
    lines += [str(found) for found in jobs if found.wildcards not in names]
    return [*lines, ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))]


def _row_state(job: Job, results: Path, at: RunningJob | None) -> tuple[str, str, str]:
    """(state, step, time left) of a row."""
    row, accuracy = job.row.row, isinstance(job.row, AccuracyRow)
    if (results / ("evaluate" if accuracy else "speed") / row / "manifest.json").is_file():
        return "done", "", ""
    train = results / "train" / row
    trained = (train / "manifest.json").is_file()
    reached = progress(train) if accuracy and not trained else None
    step = f"{reached.step}/{reached.steps}" if reached else ""
    if at is None:
        stopped = (train / "checkpoints" / "stopped.json").is_file()
        return "stopped" if stopped else "trained" if trained else "open", step, ""
    if at.state != "RUNNING":
        return at.state.lower()[:9], step, ""
    return ACTIVITY.get(at.rule, at.rule), step, tqdm.format_interval(reached.seconds_left) if reached else ""
