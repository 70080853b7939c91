"""The run's rows joined with their results: how far each row came, what it measured, and its verdict.

Both tables keep their order. A score is 0-100, a difference is in points, an interval is 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from phi3v.evaluation import statistics
from phi3v.provenance.manifest import Commit, ResultError
from phi3v.reporting.results import (
    AccuracyResult,
    Observed,
    Pass,
    Reader,
    Speed,
    SpeedResult,
    Work,
    compare_passes,
    mean_over_seeds,
)
from phi3v.reporting.verdict import Verdict, accuracy_verdict, speed_verdict, stand_in_text
from phi3v.settings import AccuracyRow, Job, ResolvedRun, Role, SpeedRow, fields_with

STEADY = 0.05
"""Spread of a speed row's windows above which the report says so: on a machine of one's own they stay below."""


@dataclass(frozen=True)
class State:
    """How far a row or its evaluation on the official split came."""

    status: Literal["", "done", "not run yet", "not present", "did not finish", "damaged", "cannot run"]
    """Empty: there is nothing to do."""
    reason: str = ""


@dataclass(kw_only=True)
class Line:
    """What a row of either table has beside its results."""

    state: State
    job: Job | None = None
    """None for a row that this run's hardware cannot do."""
    verdict: Verdict = field(default_factory=Verdict)
    same_as: list[str] = field(default_factory=list)
    """Rows that ask for something else but ran the same code."""
    notes: list[str] = field(default_factory=list)
    older: bool = False
    """Made by other code than the report."""

    @property
    def departures(self) -> dict[str, tuple[object, object]]:
        """Field to (the table's value, this run's value)."""
        return self.job.departures if self.job else {}


@dataclass(kw_only=True)
class AccuracyLine(Line):
    """A row of the accuracy table, or the job of one of its seeds."""

    row: AccuracyRow
    result: AccuracyResult | None = None
    official: State = State("")
    """The second protocol, on the authors' own split."""
    members: list[AccuracyLine] = field(default_factory=list)
    """A line for each seed of a row with several; result and verdict are then over the seeds that are done."""

    @property
    def jobs(self) -> list[AccuracyLine]:
        """The lines that were jobs: one for each seed, or this one."""
        return self.members or [self]

    @property
    def after(self) -> Pass | None:
        """The pass after training."""
        return self.result.passes.get("after") if self.result else None

    @property
    def seed_scores(self) -> list[float]:
        """Score after training of each seed that is done; empty for a row with one seed."""
        return [line.after.score for line in self.members if line.after]

    @property
    def spread(self) -> dict[str, float] | None:
        """Mean, standard deviation and range over the seeds."""
        return statistics.spread(self.seed_scores) if len(self.seed_scores) > 1 else None

    @property
    def train_seconds(self) -> float | None:
        """Training time of all seeds that are done."""
        seconds = [line.result.train.seconds for line in self.jobs if line.result]
        found = [value for value in seconds if value is not None]
        return sum(found) if found else None

    @property
    def device_hours(self) -> float | None:
        """Training time times devices."""
        seconds = self.train_seconds
        return None if seconds is None or self.job is None else seconds * self.job.processes / 3600

    @property
    def n(self) -> int | None:
        """Examples of the evaluation after training."""
        return self.after.n if self.after else None

    @property
    def observed(self) -> Observed:
        """What the training was seen to run with."""
        return self.result.training.observed if self.result else Observed()

    def score(self, name: str) -> float | None:
        """Score of a pass: before, after or control."""
        found = self.result.passes.get(name) if self.result else None
        return None if found is None else found.score


@dataclass(kw_only=True)
class SpeedLine(Line):
    """A row of the speed table."""

    row: SpeedRow
    result: SpeedResult | None = None
    speedup: float | None = None
    """Against the first row of the same hardware's table."""
    stand_in: str = ""
    """Which devices stood for which machines; empty if it ran on the published ones."""

    @property
    def speed(self) -> Speed | None:
        return self.result.speed if self.result else None

    @property
    def rate(self) -> float | None:
        """Images/s over all devices."""
        return self.speed.images_per_second if self.speed else None

    @property
    def gpus(self) -> int:
        """Devices of the published figure."""
        return self.row.nodes * self.row.gpus_per_node

    @property
    def observed(self) -> Observed:
        """What the job was seen to run with."""
        return self.result.observed if self.result else Observed()

    @property
    def device_memory(self) -> float | None:
        """Bytes that a reading of the GPU shows at the peak: reserved and context; None on a CPU."""
        if not self.speed or None in (self.speed.reserved_memory_bytes, self.speed.context_memory_bytes):
            return None
        return (self.speed.reserved_memory_bytes or 0) + (self.speed.context_memory_bytes or 0)

    @property
    def tokens_each(self) -> float | None:
        """Tokens/s of one device."""
        return self.speed.tokens_per_second / self.speed.world_size if self.speed and self.speed.world_size else None

    @property
    def spread(self) -> dict[str, float] | None:
        """Mean, standard deviation and range of images/s over the timed windows."""
        rates = [window.images_per_second for window in self.speed.repeats] if self.speed else []
        return statistics.spread(rates) if rates else None


AnyLine = AccuracyLine | SpeedLine


@dataclass
class Tables:
    """A run's two tables."""

    run: ResolvedRun
    accuracy: list[AccuracyLine]
    speed: list[SpeedLine]

    @property
    def lines(self) -> list[AnyLine]:
        """Both tables' lines, accuracy first."""
        return [*self.accuracy, *self.speed]

    @property
    def jobs(self) -> list[AnyLine]:
        """A line for each job: every seed of an accuracy row, then the speed rows."""
        return [*(job for line in self.accuracy for job in line.jobs), *self.speed]


def build_tables(run: ResolvedRun, results: Path, code: Commit | None = None) -> Tables:
    """Read every row's results under `results` (results/NAME) and join them with the tables.

    code: commit of the code that reports, to mark results of older code.
    """
    reader = Reader(results, run.settings.seed)
    seeds: dict[str, list[AccuracyLine]] = {}
    for job in run.accuracy:
        seeds.setdefault(job.table_row, []).append(_accuracy_line(run, job, reader, code))
    accuracy = [own[0] if len(own) == 1 else _over_seeds(run, row, own) for row, own in seeds.items()]
    speed = [_speed_line(job, reader, code) for job in run.speed]
    for skipped in run.not_run:
        state, verdict = State("cannot run", skipped.reason), Verdict("not run", skipped.reason)
        if isinstance(skipped.row, AccuracyRow):
            accuracy.append(AccuracyLine(row=skipped.row, state=state, verdict=verdict))
        else:
            speed.append(SpeedLine(row=skipped.row, state=state, verdict=verdict))
    _mark_same_code(run, accuracy)
    _mark_same_code(run, speed)
    _compare_speeds(run, speed)
    return Tables(run, accuracy, speed)


def _accuracy_line(run: ResolvedRun, job: Job, reader: Reader, code: Commit | None) -> AccuracyLine:
    """One job's line: a row with one seed, or one of a row's seeds."""
    assert isinstance(job.row, AccuracyRow)
    official = run.datasets[job.row.dataset].official
    result = reader.accuracy(job.row.row, job.baseline, job.row.dataset, official)
    line = AccuracyLine(row=job.row, job=job, result=result, state=_accuracy_state(result))
    line.official = _official_state(run, official, result, line.state)
    line.verdict = _accuracy_verdict(run, line)
    line.notes = _notes(job, result.training.settings, result.train)
    line.older = _is_older(result.train, code)
    return line


def _over_seeds(run: ResolvedRun, table_row: str, members: list[AccuracyLine]) -> AccuracyLine:
    """The line of a row with several seeds: means over those that are done, their spread, and what became of the others."""
    done = [line for line in members if line.state.status == "done"]
    shown = done[0] if done else members[0]
    assert shown.result is not None
    problems = [problem for member in members if member.result for problem in member.result.problems]
    line = replace(
        shown,
        row=shown.row.model_copy(update={"row": table_row}),
        result=replace(shown.result, passes=dict(shown.result.passes), problems=problems),
        older=any(member.older for member in members),
        notes=[],
        members=members,
    )
    assert line.result is not None
    for member in members:
        seed = f"seed {member.job.seed if member.job else '?'}"
        if member.state.status != "done":
            line.notes.append(f"{seed}: {member.state.status}: {member.state.reason}")
        elif member.official.status != "done":
            line.official = State(member.official.status, f"{seed}: {member.official.reason}")
        line.notes += [f"{seed}: {note}" for note in member.notes]
    if len(done) > 1:
        try:
            _take_means(line.result, [member.result for member in done if member.result])
            compare_passes(line.result, run.settings.seed)
        except ResultError as error:
            line.state = State("damaged", str(error))
            line.result = replace(line.result, passes={}, after_minus={}, official=None)
    line.verdict = _accuracy_verdict(run, line)
    return line


def _take_means(result: AccuracyResult, seeds: list[AccuracyResult]) -> None:
    """Replace a result's passes by their means over the seeds; before training there is one model, so one pass."""
    for name in ("after", "control"):
        passes = [own.passes[name] for own in seeds if name in own.passes]
        if len(passes) == len(seeds):
            result.passes[name] = mean_over_seeds(passes)
        else:
            result.passes.pop(name, None)
    official = [own.official for own in seeds if own.official is not None]
    result.official = mean_over_seeds(official) if len(official) == len(seeds) else None


def _speed_line(job: Job, reader: Reader, code: Commit | None) -> SpeedLine:
    assert isinstance(job.row, SpeedRow)
    result = reader.speed(job.row.row)
    state = State("done") if result.speed else _work_state("timing", result.work, result.problems)
    line = SpeedLine(row=job.row, job=job, result=result, state=state, older=_is_older(result.work, code))
    line.notes = _notes(job, {}, result.work)
    if line.speed and line.speed.spread > STEADY:
        line.notes.append(f"its windows differ by {100 * line.speed.spread:.0f} %")
    return line


def _work_state(verb: str, work: Work, problems: Sequence[str] = ()) -> State:
    """State of a job that is not done."""
    if problems:
        return State("damaged", problems[0])
    if work.log is not None:
        return State("did not finish", f"{verb} is running or failed; its log: {work.log}")
    return State("not run yet", f"{verb} has not run yet")


def _accuracy_state(result: AccuracyResult) -> State:
    if "after" in result.passes:
        return State("done")
    if result.problems:
        return State("damaged", result.problems[0])
    if result.train.manifest is not None:
        return _work_state("evaluation", result.evaluate)
    if result.train.log is None and result.training.curve:
        return State("did not finish", f"training stopped after step {result.training.curve[-1].get('step')}")
    if result.train.log is None and result.baseline.manifest is None and result.baseline.log is not None:
        return _work_state("the evaluation before training", result.baseline)
    return _work_state("training", result.train)


def _official_state(run: ResolvedRun, official: str, result: AccuracyResult, state: State) -> State:
    """State of the second protocol."""
    if not official:
        return State("", "no official split is known for this dataset")
    if result.official is not None:
        return State("done")
    missing = run.datasets[official].missing_source()
    if result.official_problem:
        return State("damaged", result.official_problem)
    if missing is not None:
        reason = f"{missing}: no such file; the authors' own split comes by hand (docs/evaluation.md)"
        return State("not present", reason)
    if state.status != "done":
        return State("not run yet", "the row is not done")
    return _work_state("evaluation on the official split", result.official_work)


def _accuracy_verdict(run: ResolvedRun, line: AccuracyLine) -> Verdict:
    if line.state.status != "done" or line.job is None or line.after is None:
        return _no_verdict(line.state)
    return accuracy_verdict(run, line.job, line.row, line.after, line.seed_scores)


def _no_verdict(state: State) -> Verdict:
    return Verdict("not run" if state.status in ("not run yet", "cannot run") else state.status, state.reason)


def _notes(job: Job, trained: dict[str, object], work: Work) -> list[str]:
    """What a reader must know about a result that was not repeated after a change. trained: the training's settings."""
    row, notes = job.row, []
    now = {"learning_rate": row.learning_rate, "epochs": row.epochs, "batch_size": row.batch_size}
    for name, value in now.items():
        if trained.get(name, value) != value:
            notes.append(f"made with {name} {trained[name]:g}; the settings now say {value:g}")
    if work.manifest and work.manifest.get("dirty"):
        notes.append("made by code with uncommitted changes")
    return notes


def _is_older(work: Work, code: Commit | None) -> bool:
    """Whether a result was made at another commit than the report: re-runs are chosen, so the report only says so."""
    made_by = work.manifest.get("commit") if work.manifest else None
    return bool(made_by and code and code["commit"] not in (None, made_by))


def _mark_same_code(run: ResolvedRun, lines: Sequence[AnyLine]) -> None:
    """Note at each row the other rows that ask for something else and ran the same code anyway."""
    groups: dict[object, list[AnyLine]] = {}
    for line in lines:
        if line.state.status != "done" or line.observed.code is None:
            continue
        model = run.models[line.row.model]
        fields = {*fields_with(type(line.row), Role.RECIPE, Role.EQUIVALENT)} - {"model"}
        key = (model.url, model.revision, str(line.row.model_dump(include=fields)), line.observed.code)
        groups.setdefault(key, []).append(line)
    for group in groups.values():
        for line in group:
            line.same_as = [other.row.row for other in group if other is not line]


def _compare_speeds(run: ResolvedRun, lines: list[SpeedLine]) -> None:
    """Speed-up against the first row of the same hardware's table, and the verdict on the published figure."""
    rates = {line.row.row: line.rate for line in lines}
    first: dict[str, float | None] = {}
    for line in lines:
        base = first.setdefault(line.row.hardware, line.rate)
        line.speedup = line.rate / base if line.rate and base else None
        if line.speed is None or line.job is None:
            line.verdict = _no_verdict(line.state)
            continue
        if line.speed.stand_in:
            line.stand_in = stand_in_text(line.job, line.row, line.speed, run.hardware)
        line.verdict = speed_verdict(run, line.job, line.row, line.speed, rates.get(line.row.accompanies or ""))
