"""The terminal of a run: a line for each finished job, and on a terminal a bar over all jobs.

    phi3-docvqa-full-bf16: ANLS 4.9 → 91.5, 34 s

Profiles select it by `logger: phi3v`. The time counts from a job's start, on SLURM from its submission. A dry run,
--verbose and --debug-dag print what Snakemake itself prints. -p adds the shell commands and the jobs' output.
--nocolor, NO_COLOR (https://no-color.org) and TERM=dumb leave out the bar, as does output to a file.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

CHATTER = (
    "Assuming unrestricted shared filesystem", "Building DAG of jobs", "Complete log(s)", "Conda environments: ignored",
    "Execute ", "Provided cores", "Provided remote nodes", "Provided resources", "Rules claiming more threads",
    "Select jobs to execute", "Singularity containers: ignored", "Using shell",
)  # fmt: skip
"""Beginnings of Snakemake's messages that are of no use to a user of this workflow."""
LOG_LINES = 40
"""Last lines of a failed job's log."""
BAR = 20
FIRST_ESTIMATE = 3
"""Finished jobs before the time left is estimated."""


@dataclass(frozen=True)
class Started:
    """A job under way."""

    title: str
    rule: str
    output: list[str]
    at: float


def duration(seconds: float) -> str:
    """34 s, 5 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def log_of_attempt(log: Path) -> Path:
    """The log of a job's latest attempt, which gets a number before the next attempt: ROW.log, else ROW.2.log."""
    numbered = log.parent.glob(f"{log.stem}.*{log.suffix}")
    return log if log.exists() else max(numbered, key=lambda path: path.stat().st_mtime, default=log)


def last_lines(path: Path) -> list[str]:
    """The end of a text file; a sentence if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip() for line in deque(file, LOG_LINES)] or ["(empty)"]
    except OSError as error:
        return [f"({error.strerror})"]


class Progress:
    """Jobs of a run, those under way, and an estimate of the time left."""

    def __init__(self) -> None:
        self.jobs: Counter[str] = Counter()
        """Jobs of each rule that are still to finish."""
        self.total = 0
        self.running: dict[int, Started] = {}
        self.seconds: dict[str, list[float]] = {}
        """Seconds of each finished job, by its rule."""
        self.began = 0.0

    def plan(self, stats: dict[str, int], now: float) -> None:
        """Take the run's number of jobs by rule."""
        self.jobs = Counter({rule: count for rule, count in stats.items() if rule != "total"})
        self.total, self.began = self.jobs.total(), now

    def finish(self, number: int, now: float) -> tuple[Started, float] | None:
        """The job and its seconds; None for one that never started here."""
        job = self.running.pop(number, None)
        if job is None:
            return None
        self.jobs[job.rule] -= 1
        self.seconds.setdefault(job.rule, []).append(now - job.at)
        return job, now - job.at

    def left(self, now: float) -> float | None:
        """Seconds left: what is to do at the mean time of its rule, with as many jobs at a time as so far."""
        every = [seconds for found in self.seconds.values() for seconds in found]
        if len(every) < FIRST_ESTIMATE or now <= self.began:
            return None
        mean = sum(every) / len(every)
        work = 0.0
        for rule, count in self.jobs.items():
            own = self.seconds.get(rule)
            work += count * (sum(own) / len(own) if own else mean)
        under_way = [now - job.at for job in self.running.values()]
        at_a_time = max(1.0, (sum(every) + sum(under_way)) / (now - self.began))
        return max(0.0, work - sum(under_way)) / at_a_time

    def bar(self, now: float, width: int) -> str:
        """One line of at most `width` characters."""
        done = self.total - self.jobs.total()
        full = BAR * done // self.total
        left = self.left(now)
        parts = [f"[{'#' * full}{'-' * (BAR - full)}] {done} of {self.total} job{'' if self.total == 1 else 's'}"]
        if left is not None:
            parts.append(f"about {duration(left)} left")
        if self.running:
            parts.append(", ".join(job.title for job in self.running.values()))
        return " · ".join(parts)[: width - 1]


class LogHandler(LogHandlerBase):
    """What Snakemake logs, as lines for a person. Snakemake filters (-p, --quiet) and formats all other records."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.stream = sys.stdout if self.common_settings.stdout else sys.stderr
        common = self.common_settings
        has_codes = not (common.nocolor or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb")
        self.has_bar = has_codes and self.stream.isatty()
        self.progress = Progress()
        self.message = ""
        self.is_plain = bool(common.dryrun or common.verbose or common.debug_dag)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's lines above the bar."""
        try:
            lines = [self.format(record)] if self.is_plain else list(self.lines(record))
            clear = "\r\x1b[K" if self.has_bar else ""
            if text := "\n".join(line for line in lines if line and line != "None"):
                self.stream.write(f"{clear}{text}\n")
                clear = ""
            if self.has_bar and self.progress.running and self.progress.total:
                bar = self.progress.bar(record.created, shutil.get_terminal_size().columns)
                self.stream.write(f"\r\x1b[K{bar}")
            else:
                self.stream.write(clear)
            self.stream.flush()
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)

    def lines(self, record: logging.LogRecord) -> Iterator[str]:
        """The lines of a record; takes note of what jobs do."""
        event, fields = getattr(record, "event", None), record.__dict__
        if event == LogEvent.RUN_INFO:
            self.progress.plan(fields["stats"], record.created)
            table = ", ".join(f"{rule} {count}" for rule, count in self.progress.jobs.items())
            yield f"{self.progress.total} job{'' if self.progress.total == 1 else 's'}: {table}"
        elif event == LogEvent.JOB_INFO:
            title = fields["rule_msg"] or fields["rule_name"]
            job = Started(title, fields["rule_name"], list(fields["output"] or []), record.created)
            self.progress.running[fields["jobid"]] = job
        elif event == LogEvent.JOB_FINISHED:
            # Snakemake imports this module before the Snakefile chooses the checkout that phi3v is imported from.
            from phi3v.reporting.outcome import outcome

            found = self.progress.finish(fields["job_id"], record.created)
            # A target such as `all` makes nothing itself.
            if found and found[0].output:
                job, seconds = found
                yield f"{outcome(job.rule, job.output) or job.title}, {duration(seconds)}"
        elif event == LogEvent.JOB_ERROR:
            yield from self.failure(fields, record.created)
        elif event == LogEvent.ERROR:
            # The log of a failed command, printed with its job, gives the reason.
            if "CalledProcessError" not in f"{fields.get('exception')} {record.getMessage()}":
                yield self.format(record)
        elif event in (LogEvent.SHELLCMD, LogEvent.GROUP_ERROR):
            yield self.format(record)
        elif event is None and not (message := record.getMessage()).startswith(CHATTER) and message != self.message:
            # While a stopped run waits for its jobs, Snakemake repeats one message.
            self.message = message
            yield message

    def failure(self, fields: dict[str, object], now: float) -> Iterator[str]:
        """What a failed job leaves: its title, log and last lines."""
        number, rule = fields["jobid"], fields["rule_name"]
        assert isinstance(number, int)
        job = self.progress.running.pop(number, None)
        title = job.title if job else str(rule)
        yield f"FAILED: {title}{f', after {duration(now - job.at)}' if job else ''}"
        if message := fields.get("rule_msg"):
            yield f"  {message}"
        aux, logs = fields.get("aux"), fields.get("log")
        for name, value in aux.items() if isinstance(aux, dict) else ():
            yield f"  {name}: {value}"
        for log in map(Path, logs if isinstance(logs, list) else ()):
            yield f"  {(found := log_of_attempt(log))}:"
            yield from (f"    {line}" for line in last_lines(found))
