"""Where a run stands: each row's state, SLURM job, step and time left, from result files, metrics and squeue."""

from __future__ import annotations

import getpass
import json
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from phi3v.cluster.facts import ask
from phi3v.settings import AccuracyRow, Job, ResolvedRun

# The executor's comment on each of its jobs.
COMMENT = re.compile(r"^rule_(?P<rule>\w+?)(?:_wildcards_(?P<wildcards>.*))?$")


@dataclass(frozen=True)
class RunningJob:
    """A job of this working folder that SLURM has not finished."""

    id: str
    state: str
    rule: str
    wildcards: str
    """Row, or key of the data; "" for rules without."""
    nodes: str
    """Machines, or why it waits."""
    elapsed: str

    def __str__(self) -> str:
        what = f"{self.rule} {self.wildcards}".strip()
        return f"job {self.id}: {what}, {self.state.lower()} {self.elapsed} on {self.nodes or 'no machine yet'}"


def running_jobs(folder: Path) -> list[RunningJob]:
    """This user's unfinished jobs that were submitted by a Snakemake in `folder`; raises ClusterError."""
    found = []
    for line in ask("squeue", "--noheader", "--user", getpass.getuser(), "-o", "%i|%T|%Z|%M|%R|%k").splitlines():
        job, state, where, elapsed, nodes, comment = line.split("|", 5)
        match = COMMENT.match(comment)
        if match and os.path.realpath(where) == os.path.realpath(folder):
            found.append(RunningJob(job, state, match["rule"], match["wildcards"] or "", nodes, elapsed))
    return found


@dataclass(frozen=True)
class Progress:
    """Of one training job, from its metrics."""

    step: int
    steps: int
    """All of them."""
    seconds_left: float


def progress(folder: Path) -> Progress | None:
    """Step and time left of a training folder; None before its first step.

    All steps follow from the epochs asked for and the epoch reached; time from the median of the last 50 steps.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    lines = []
    for line in text.splitlines()[-60:]:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # being written
        if "seconds" in values and values.get("epoch"):
            lines.append(values)
    if not lines:
        return None
    last = lines[-1]
    steps = settings["max_steps"]
    if steps < 1:
        steps = max(last["step"], round(settings["num_train_epochs"] * last["step"] / last["epoch"]))
    each = statistics.median(line["seconds"] for line in lines[-50:])
    return Progress(last["step"], steps, each * (steps - last["step"]))


def duration(seconds: float) -> str:
    """1:02:03"""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole // 60}:{whole % 60:02d}:{rest:02d}"


def status_lines(run: ResolvedRun, root: Path, jobs: list[RunningJob]) -> list[str]:
    """A line a row: state, SLURM jobs, progress; then jobs that belong to no row."""
    results = root / "results" / run.settings.name
    rows = [*run.accuracy, *run.speed]
    width = max((len(job.row.row) for job in rows), default=3)
    lines = [f"{'row':{width}}  {'state':9}  {'job':>10}  {'on':14}  {'step':>13}  {'left':>9}  elapsed"]
    shown: set[str] = set()
    counts: dict[str, int] = {}
    for job in rows:
        mine = [found for found in jobs if job.row.row == found.wildcards]
        shown |= {found.id for found in mine}
        state, step, left = _row_state(job, results, mine, accuracy=isinstance(job.row, AccuracyRow))
        counts[state] = counts.get(state, 0) + 1
        at = mine[0] if mine else None
        lines.append(
            f"{job.row.row:{width}}  {state:9}  {at.id if at else '':>10}  {at.nodes if at else '':14}  {step:>13}  "
            f"{left:>9}  {at.elapsed if at else ''}".rstrip()
        )
    lines += [str(found) for found in jobs if found.id not in shown]
    lines.append(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return lines


def _row_state(job: Job, results: Path, mine: list[RunningJob], accuracy: bool) -> tuple[str, str, str]:
    """(state, step, time left) of a row."""
    row = job.row.row
    if (results / ("evaluate" if accuracy else "speed") / row / "manifest.json").is_file():
        return "done", "", ""
    train = results / "train" / row
    at = progress(train) if accuracy and not (train / "manifest.json").is_file() else None
    step = f"{at.step}/{at.steps}" if at else ""
    if not mine:
        stopped = (train / "checkpoints" / "stopped.json").is_file()
        return ("stopped" if stopped else "trained" if (train / "manifest.json").is_file() else "open"), step, ""
    words = {"finetune": "training", "speed_row": "timing", "evaluate_official": "official"}
    doing = words.get(mine[0].rule, mine[0].rule)
    running = mine[0].state == "RUNNING"
    left = duration(at.seconds_left) if at and running else ""
    return (doing if running else mine[0].state.lower()[:9]), step, left
