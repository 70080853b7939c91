"""Joins the run's rows with their results: status, measurements and verdict of each row.

Both tables keep their order. Scores are 0-100, differences are in points, intervals are 95 %.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from phi3v.evaluation import statistics
from phi3v.provenance.manifest import Commit, ResultError, read_json
from phi3v.reporting.results import (
    Observed,
    Pass,
    Speed,
    Training,
    Work,
    attempt,
    check_owner,
    compare,
    mean_over_seeds,
    read_if_present,
    read_pass,
    read_training,
    read_work,
)
from phi3v.reporting.verdict import Verdict, accuracy_verdict, speed_verdict, stand_in_text
from phi3v.settings import AccuracyRow, Job, ResolvedRun, Role, SpeedRow, fields_with, validate

STEADY = 0.05
"""Spread of a speed row's windows above which the report mentions it. On a machine without other users it stays
below."""


@dataclass(frozen=True)
class State:
    """Status of a row, or of its evaluation on the official split."""

    status: Literal["", "done", "not run yet", "not present", "did not finish", "damaged", "cannot run"]
    """Empty: there is no evaluation to run."""
    reason: str = ""


@dataclass(kw_only=True)
class Line:
    """Fields of a row in either table, besides its measurements."""

    state: State = State("not run yet")
    job: Job | None = None
    """None for a row that this run's hardware cannot run."""
    observed: Observed = field(default_factory=Observed)
    """What the training or the timing ran with."""
    problems: list[str] = field(default_factory=list)
    """Unusable files, and the reasons."""
    verdict: Verdict = field(default_factory=Verdict)
    same_as: list[str] = field(default_factory=list)
    """Rows with other settings for which the same code ran."""
    notes: list[str] = field(default_factory=list)
    older: bool = False
    """Whether other code than the report's produced the result."""

    @property
    def departures(self) -> dict[str, tuple[object, object]]:
        """Field to (value in the table, value in this run)."""
        return self.job.departures if self.job else {}


@dataclass(kw_only=True)
class AccuracyLine(Line):
    """A row of the accuracy table, or the job of one of its seeds."""

    row: AccuracyRow
    baseline: Work = field(default_factory=Work)
    """The evaluation before training, which rows share."""
    train: Work = field(default_factory=Work)
    evaluate: Work = field(default_factory=Work)
    evaluate_official: Work = field(default_factory=Work)
    """The evaluation on the authors' own split, the second protocol."""
    scoring: dict[str, Work] = field(default_factory=dict)
    """Scoring of these evaluations by the user's own functions, by the evaluation's folder. Empty if there are none."""
    training: Training = field(default_factory=Training)
    passes: dict[str, Pass] = field(default_factory=dict)
    """before, after, control, and official (after training, on the authors' own split)."""
    after_minus: dict[str, statistics.Comparison] = field(default_factory=dict)
    """After training minus the pass of this name. Minus control is the contribution of the pictures."""
    no_control: str = ""
    """Why the control with swapped pictures is not applicable."""
    official: State = State("")
    """Status of the second protocol."""
    members: list[AccuracyLine] = field(default_factory=list)
    """Lines of the seeds of a row with several. Passes and verdict of this line are then over the finished seeds."""

    @property
    def works(self) -> list[Work]:
        return [self.baseline, self.train, self.evaluate, self.evaluate_official, *self.scoring.values()]

    @property
    def jobs(self) -> list[AccuracyLine]:
        """The lines that are jobs: one per seed, or this one."""
        return self.members or [self]

    @property
    def after(self) -> Pass | None:
        """The pass after training, or None."""
        return self.passes.get("after")

    @property
    def seed_scores(self) -> list[float]:
        """Score after training of each finished seed. Empty for a row with one seed."""
        return [line.after.score for line in self.members if line.after]

    @property
    def spread(self) -> dict[str, float] | None:
        """Mean, standard deviation and range over the seeds."""
        return statistics.spread(self.seed_scores) if len(self.seed_scores) > 1 else None

    @property
    def train_seconds(self) -> float | None:
        """Training time of all finished seeds."""
        seconds = [line.train.seconds for line in self.jobs if line.train.seconds is not None]
        return sum(seconds) if seconds else None

    @property
    def device_hours(self) -> float | None:
        """Training time multiplied by the number of devices."""
        seconds = self.train_seconds
        return None if seconds is None or self.job is None else seconds * self.job.processes / 3600

    def score(self, name: str) -> float | None:
        """Score of a pass."""
        return self.passes[name].score if name in self.passes else None


@dataclass(kw_only=True)
class SpeedLine(Line):
    """A row of the speed table."""

    row: SpeedRow
    work: Work = field(default_factory=Work)
    speed: Speed | None = None
    speedup: float | None = None
    """Speed relative to the first row of the same hardware."""
    stand_in: str = ""
    """Description of the devices used in place of the published ones. Empty if it ran on the published ones."""

    @property
    def works(self) -> list[Work]:
        return [self.work]

    @property
    def rate(self) -> float | None:
        """Images/s over all devices."""
        return self.speed.images_per_second if self.speed else None

    @property
    def gpus(self) -> int:
        """Devices of the published figure."""
        return self.row.nodes * self.row.gpus_per_node

    @property
    def device_memory(self) -> float | None:
        """Peak bytes as nvidia-smi shows them: reserved and context. None on a CPU."""
        if not self.speed or None in (self.speed.reserved_memory_bytes, self.speed.context_memory_bytes):
            return None
        return (self.speed.reserved_memory_bytes or 0) + (self.speed.context_memory_bytes or 0)

    @property
    def tokens_each(self) -> float | None:
        """Tokens/s per device."""
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
        """A line for each job: every seed of each accuracy row, then the speed rows."""
        return [*(job for line in self.accuracy for job in line.jobs), *self.speed]


def build_tables(run: ResolvedRun, results: Path, code: Commit | None = None) -> Tables:
    """Reads every row's results under `results` (results/NAME) and joins them with the tables.

    code: commit of the reporting code, to mark results of other code.
    """
    reader = _Reader(run, results, code)
    seeds: dict[str, list[AccuracyLine]] = {}
    for job in run.accuracy:
        seeds.setdefault(job.table_row, []).append(reader.accuracy(job))
    accuracy = [own[0] if len(own) == 1 else _over_seeds(run, row, own) for row, own in seeds.items()]
    speed = [reader.speed(job) for job in run.speed]
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


@dataclass
class _Reader:
    """Creates the line of a job from the contents of its folders."""

    run: ResolvedRun
    root: Path
    """results/NAME."""
    code: Commit | None
    read_pass: Callable[[Path], Pass] = field(default_factory=lambda: functools.cache(read_pass))
    """Cached, because rows share the passes before training."""

    def work(self, kind: str, name: str, problems: list[str]) -> Work:
        """Folder and log of a job. kind: train, evaluate, evaluate/base, evaluate/official, speed."""
        return read_work(self.root / kind / name, self.root / "logs" / kind / f"{name}.log", problems)

    def accuracy(self, job: Job) -> AccuracyLine:
        """The line of a row with one seed, or of one of a row's seeds."""
        assert isinstance(job.row, AccuracyRow)
        row, problems, official_problems = job.row, list[str](), list[str]()
        line = AccuracyLine(row=row, job=job, problems=problems)
        line.train = self.work("train", row.row, problems)
        line.evaluate = self.work("evaluate", row.row, problems)
        line.baseline = self.work("evaluate/base", job.baseline, problems)
        line.evaluate_official = self.work("evaluate/official", row.row, official_problems)
        official = self.run.datasets[row.dataset].official

        def add(name: str, work: Work, part: str, dataset: str, problems: list[str]) -> None:
            scored = work
            if self.run.datasets[dataset].own_metrics:
                folder = str(work.folder.relative_to(self.root / "evaluate"))
                if folder not in line.scoring:
                    line.scoring[folder] = self.work("score", folder, problems)
                scored = line.scoring[folder]

            def read() -> Pass:
                check_owner(work, row.row, dataset)
                return self.read_pass(scored.folder / part)

            if work.manifest and scored.manifest and (found := attempt(problems, read)) is not None:
                line.passes[name] = found

        add("before", line.baseline, "before", row.dataset, problems)
        add("after", line.evaluate, "after", row.dataset, problems)
        control = line.evaluate.folder / "control"
        line.no_control = str((read_if_present(control / "metrics.json", []) or {}).get("not_applicable", ""))
        if control.is_dir() and not line.no_control:
            add("control", line.evaluate, "control", row.dataset, problems)
        if official:
            add("official", line.evaluate_official, "after", official, official_problems)
        _compare_passes(line, self.run.settings.seed)
        line.training = read_training(line.train.folder, problems)
        where = str(line.train.folder / "observed.json")
        line.observed = attempt(problems, validate, Observed, line.training.observed, where) or Observed()
        line.state = _accuracy_state(line)
        line.official = _official_state(self.run, official, line, "; ".join(official_problems))
        line.verdict = _accuracy_verdict(self.run, line)
        line.notes = _notes(job, line.training.settings, line.train)
        line.older = self.is_older(line.train)
        return line

    def speed(self, job: Job) -> SpeedLine:
        """The line of a row of the speed table."""
        assert isinstance(job.row, SpeedRow)
        problems: list[str] = []
        line = SpeedLine(row=job.row, job=job, problems=problems, work=self.work("speed", job.row.row, problems))
        if line.work.manifest is not None:
            attempt(problems, _read_speed, line, line.work.folder / "speed.json")
        line.state = State("done") if line.speed else _work_state("timing", line.work, problems)
        line.notes = _notes(job, {}, line.work)
        line.older = self.is_older(line.work)
        if line.speed and line.speed.spread > STEADY:
            line.notes.append(f"the timed windows differ by {100 * line.speed.spread:.0f} %")
        return line

    def is_older(self, work: Work) -> bool:
        """Whether a result is from another commit than the report. Such results are only marked, not repeated."""
        made_by = work.manifest.get("commit") if work.manifest else None
        return bool(made_by and self.code and self.code["commit"] not in (None, made_by))


def _read_speed(line: SpeedLine, path: Path) -> None:
    values, row = read_json(path), line.row.row
    if values.get("row") not in (None, row):
        raise ResultError(
            f"{path}: field `row`: got {values['row']!r}; expected {row!r}; this file belongs to another row"
        )
    line.observed = validate(Observed, values | (values.get("observed") or {}), str(path))
    line.speed = validate(Speed, values, str(path))


def _compare_passes(line: AccuracyLine, seed: int) -> None:
    """Computes the comparisons of a line from its passes."""
    line.after_minus = {}
    for name in ("before", "control"):
        if "after" in line.passes and name in line.passes:
            try:
                line.after_minus[name] = compare(line.passes["after"], line.passes[name], seed)
            except ResultError as error:
                line.problems.append(f"{line.evaluate.folder / name}: {error}")


def _over_seeds(run: ResolvedRun, table_row: str, members: list[AccuracyLine]) -> AccuracyLine:
    """The line of a row with several seeds: means over the finished seeds, their spread, and the status of the
    others."""
    done = [line for line in members if line.state.status == "done"]
    first = done[0] if done else members[0]
    line = replace(
        first,
        row=first.row.model_copy(update={"row": table_row}),
        passes=dict(first.passes),
        problems=[problem for member in members for problem in member.problems],
        older=any(member.older for member in members),
        notes=[],
        members=members,
    )
    for member in members:
        seed = f"seed {member.job.seed if member.job else '?'}"
        if member.state.status != "done":
            line.notes.append(f"{seed}: {member.state.status}: {member.state.reason}")
        elif member.official.status != "done":
            line.official = State(member.official.status, f"{seed}: {member.official.reason}")
        line.notes += [f"{seed}: {note}" for note in member.notes]
    if len(done) > 1:
        try:
            _take_means(line, done)
            _compare_passes(line, run.settings.seed)
        except ResultError as error:
            line.state = State("damaged", str(error))
            line.passes, line.after_minus = {}, {}
    line.verdict = _accuracy_verdict(run, line)
    return line


def _take_means(line: AccuracyLine, seeds: list[AccuracyLine]) -> None:
    """Replaces a line's passes by the means over the seeds. There is only one pass before training."""
    for name in ("after", "control", "official"):
        passes = [own.passes[name] for own in seeds if name in own.passes]
        if len(passes) == len(seeds):
            line.passes[name] = mean_over_seeds(passes)
        else:
            line.passes.pop(name, None)


def _work_state(verb: str, work: Work, problems: Sequence[str] = ()) -> State:
    """Status of an unfinished job."""
    if problems:
        return State("damaged", problems[0])
    if work.log is not None:
        return State("did not finish", f"{verb} is running or has failed; see its log, {work.log}")
    return State("not run yet", f"{verb} has not run yet")


def _accuracy_state(line: AccuracyLine) -> State:
    if "after" in line.passes:
        return State("done")
    if line.problems:
        return State("damaged", line.problems[0])
    if line.train.manifest is not None:
        scoring = line.scoring.get(line.row.row) if line.evaluate.manifest else None
        return _work_state("scoring", scoring) if scoring else _work_state("evaluation", line.evaluate)
    if line.train.log is None and line.training.curve:
        return State("did not finish", f"training stopped after step {line.training.curve[-1].get('step')}")
    if line.train.log is None and line.baseline.manifest is None and line.baseline.log is not None:
        return _work_state("the evaluation before training", line.baseline)
    return _work_state("training", line.train)


def _official_state(run: ResolvedRun, official: str, line: AccuracyLine, problem: str) -> State:
    """Status of the second protocol."""
    if not official:
        return State("", "there is no official split for this dataset")
    if "official" in line.passes:
        return State("done")
    missing = run.datasets[official].missing_source()
    if problem:
        return State("damaged", problem)
    if missing is not None:
        reason = f"{missing}: no such file; download the authors' own split yourself (docs/explanation/recipe.md)"
        return State("not present", reason)
    if line.state.status != "done":
        return State("not run yet", "the row is not finished")
    return _work_state("evaluation on the official split", line.evaluate_official)


def _accuracy_verdict(run: ResolvedRun, line: AccuracyLine) -> Verdict:
    if line.state.status != "done" or line.job is None or line.after is None:
        return _no_verdict(line.state)
    return accuracy_verdict(run, line.job, line.row, line.after, line.seed_scores)


def _no_verdict(state: State) -> Verdict:
    return Verdict("not run" if state.status in ("not run yet", "cannot run") else state.status, state.reason)


def _notes(job: Job, trained: dict[str, object], work: Work) -> list[str]:
    """Remarks about a result that was not repeated after a change. trained: settings of the training."""
    row, notes = job.row, []
    now = {"learning_rate": row.learning_rate, "epochs": row.epochs, "batch_size": row.batch_size}
    for name, value in now.items():
        if trained.get(name, value) != value:
            notes.append(f"trained with {name} {trained[name]:g}, but the settings now have {value:g}")
    if work.manifest and work.manifest.get("dirty"):
        notes.append("from code with uncommitted changes")
    return notes


def _mark_same_code(run: ResolvedRun, lines: Sequence[AnyLine]) -> None:
    """Records for each row the rows with other settings for which the same code ran."""
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
    """Computes speed-ups relative to the first row of the same hardware, and the verdicts on the published figures."""
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
