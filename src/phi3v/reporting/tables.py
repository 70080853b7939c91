"""Rows of the two tables joined with their results: what index.html, accuracy.tsv, speed.tsv and report.json all show.

A score is 0-100, a difference is in points, an interval is 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phi3v.evaluation import statistics
from phi3v.reporting.results import (
    AccuracyResult,
    ResultError,
    SpeedResult,
    compare_passes,
    mean_over_seeds,
    read_accuracy,
    read_speed,
)
from phi3v.settings import AccuracyRow, FinetuneSettings, Hardware, Job, ResolvedRun, Role, SpeedRow, fields_with

GB = 1e9
# Windows of a speed row that differ by more are told: on a machine of one's own they stay below.
STEADY = 0.05
METHODS = {"full": "full", "frozen": "vision frozen", "lora": "LoRA", "qlora": "QLoRA"}


@dataclass
class AccuracyLine:
    """A row of the accuracy table as it is shown."""

    row: AccuracyRow
    status: str
    """done, not run yet, did not finish, damaged, cannot run."""
    reason: str = ""
    job: Job | None = None
    result: AccuracyResult | None = None
    verdict: str = ""
    verdict_reason: str = ""
    against: statistics.AgainstPublished | None = None
    same_as: list[str] = field(default_factory=list)
    """Rows that ask for something else but ran the same code."""
    notes: list[str] = field(default_factory=list)
    older: bool = False
    """Made by other code than the report."""
    members: list[AccuracyLine] = field(default_factory=list)
    """A line for each seed, where the row has several; scores, interval and verdict above are then over those that are done."""
    official: str = ""
    """Second protocol: done, not present, not run yet, did not finish, damaged; empty where the dataset has none."""
    official_reason: str = ""

    @property
    def jobs(self) -> list[AccuracyLine]:
        """The lines that were jobs: one for each seed, or this one."""
        return self.members or [self]

    @property
    def seed_scores(self) -> list[float]:
        """Score after training of each seed that is done; none where the row has one seed."""
        return [
            line.result.passes["after"].score for line in self.members if line.result and "after" in line.result.passes
        ]

    @property
    def spread(self) -> dict[str, float] | None:
        """Mean, standard deviation and range over the seeds."""
        return statistics.spread(self.seed_scores) if len(self.seed_scores) > 1 else None

    @property
    def train_seconds(self) -> float | None:
        """Training time of all seeds that are done."""
        seconds = [
            line.result.train.seconds for line in self.jobs if line.result and line.result.train.seconds is not None
        ]
        return sum(seconds) if seconds else None

    def score(self, name: str) -> float | None:
        """Score of a pass."""
        found = self.result.passes.get(name) if self.result else None
        return None if found is None else found.score

    @property
    def n(self) -> int | None:
        found = self.result.passes.get("after") if self.result else None
        return None if found is None else found.n

    @property
    def gpu_hours(self) -> float | None:
        """Training time times devices."""
        seconds = self.train_seconds
        return None if seconds is None or self.job is None else seconds * self.job.processes / 3600


@dataclass
class SpeedLine:
    """A row of the speed table as it is shown."""

    row: SpeedRow
    status: str
    reason: str = ""
    job: Job | None = None
    result: SpeedResult | None = None
    speedup: float | None = None
    verdict: str = ""
    verdict_reason: str = ""
    same_as: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    older: bool = False

    def value(self, name: str) -> Any:
        """A field of speed.json."""
        return self.result.speed.get(name) if self.result else None

    @property
    def device_memory(self) -> float | None:
        """Bytes that a reading of the GPU shows at the peak: reserved and context; None on a CPU."""
        reserved, context = self.value("reserved_memory_bytes"), self.value("context_memory_bytes")
        return None if reserved is None or context is None else reserved + context

    @property
    def how(self) -> str:
        """Of a row that accompanies a published one: what was chosen for it."""
        if not self.row.accompanies:
            return ""
        seen = self.value("observed") or {}
        size, every = seen.get("batch_size_per_gpu"), seen.get("recompute_every")
        if size is None or every is None:
            return f"ours: micro-batch {self.row.micro_batch_size}, recompute {plain(self.row.gradient_checkpointing)}"
        return (
            f"ours: micro-batch {size}, recompute {'none' if not every else 'all' if every == 1 else f'1 of {every}'}"
        )

    @property
    def tokens_each(self) -> float | None:
        """Tokens a second of one device."""
        tokens, processes = self.value("tokens_per_second"), self.value("world_size")
        return tokens / processes if tokens and processes else None

    @property
    def spread(self) -> dict[str, float] | None:
        """Spread of images/s over the repeats."""
        repeats = [window["images_per_second"] for window in self.value("repeats") or []]
        return statistics.spread(repeats) if repeats else None


@dataclass
class Tables:
    """A run's two tables."""

    run: ResolvedRun
    accuracy: list[AccuracyLine]
    speed: list[SpeedLine]

    @property
    def lines(self) -> list[AccuracyLine | SpeedLine]:
        """Both tables' lines, accuracy first."""
        return [*self.accuracy, *self.speed]

    @property
    def jobs(self) -> list[AccuracyLine | SpeedLine]:
        """A line for each job: every seed of an accuracy row, then the speed rows."""
        return [*(job for line in self.accuracy for job in line.jobs), *self.speed]


def build_tables(run: ResolvedRun, results: Path, code: dict[str, Any] | None = None) -> Tables:
    """Read every row's results under `results` (results/NAME) and join them with the tables, in the tables' order.

    code: commit of the code that reports, to mark results of older code.
    """
    baselines: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    seeds: dict[str, list[AccuracyLine]] = {}
    for job in run.accuracy:
        seeds.setdefault(job.table_row, []).append(_accuracy_line(run, job, results, baselines, code))
    for table_row, own in seeds.items():
        lines[table_row] = own[0] if len(own) == 1 else _over_seeds(run, table_row, own)
    for job in run.speed:
        assert isinstance(job.row, SpeedRow)
        speed = read_speed(results, job.row.row)
        status, reason = _work_status("timing", speed.work, speed.problems, bool(speed.speed))
        timed = SpeedLine(job.row, status, reason, job=job, result=speed)
        timed.notes = [*_notes(job, {}, speed.work.manifest), *_unsteady(speed.speed)]
        timed.older = _is_older(speed.work.manifest, code)
        lines[job.row.row] = timed
    for skipped in run.not_run:
        reason = skipped.reason
        lines[skipped.row.row] = (
            AccuracyLine(skipped.row, "cannot run", reason, verdict="not run", verdict_reason=reason)
            if isinstance(skipped.row, AccuracyRow)
            else SpeedLine(skipped.row, "cannot run", reason, verdict="not run", verdict_reason=reason)
        )
    accuracy = [line for line in lines.values() if isinstance(line, AccuracyLine)]
    speed_lines = [line for line in lines.values() if isinstance(line, SpeedLine)]
    _mark_same_code(run, accuracy)
    _mark_same_code(run, speed_lines)
    _speedups(run, speed_lines)
    return Tables(run, accuracy, speed_lines)


def _accuracy_line(
    run: ResolvedRun, job: Job, results: Path, baselines: dict[str, Any], code: dict[str, Any] | None
) -> AccuracyLine:
    """One job's line: a row with one seed, or one of a row's seeds."""
    assert isinstance(job.row, AccuracyRow)
    official = run.datasets[job.row.dataset].official
    result = read_accuracy(results, job.row.row, job.baseline, job.row.dataset, run.settings.seed, baselines, official)
    status, reason = _accuracy_status(result)
    line = AccuracyLine(job.row, status, reason, job=job, result=result)
    line.official, line.official_reason = _official_status(run, official, result, status)
    line.verdict, line.verdict_reason, line.against = _accuracy_verdict(run, line)
    line.notes = _notes(job, result.settings, result.train.manifest)
    line.older = _is_older(result.train.manifest, code)
    return line


def _official_status(run: ResolvedRun, official: str, result: AccuracyResult, status: str) -> tuple[str, str]:
    """State of the second protocol, and the reason where it is not done."""
    if not official:
        return "", "no official split is known for this dataset"
    if result.official is not None:
        return "done", ""
    missing = run.datasets[official].missing_source()
    if result.official_problem:
        return "damaged", result.official_problem
    if missing is not None:
        return "not present", f"{missing}: no such file; the authors' own split comes by hand (docs/evaluation.md)"
    if status != "done":
        return "not run yet", "the row is not done"
    return _work_status("evaluation on the official split", result.official_work, [], False)


def _over_seeds(run: ResolvedRun, table_row: str, members: list[AccuracyLine]) -> AccuracyLine:
    """The line of a row with several seeds: means over those that are done, their spread, and what became of the others."""
    done = [line for line in members if line.status == "done"]
    shown = done[0] if done else members[0]
    row = shown.row.model_copy(update={"row": table_row})
    line = AccuracyLine(row, shown.status, shown.reason, job=shown.job, members=members)
    line.official, line.official_reason = shown.official, shown.official_reason
    for member in done:
        if member.official != "done" and member.job is not None:
            line.official, line.official_reason = member.official, f"seed {member.job.seed}: {member.official_reason}"
    line.older = any(member.older for member in members)
    for member in members:
        name = f"seed {member.job.seed if member.job else '?'}"
        if member.status != "done":
            line.notes.append(f"{name}: {member.status}: {member.reason}")
        line.notes += [f"{name}: {note}" for note in member.notes]
    assert shown.result is not None
    line.result = replace(
        shown.result, problems=[p for member in members if member.result for p in member.result.problems]
    )
    if len(done) > 1:
        try:
            _take_means(run, line.result, [member.result for member in done if member.result])
        except ResultError as error:
            line.status, line.reason = "damaged", str(error)
            line.result = replace(line.result, passes={}, gain=None, looking=None, official=None)
    line.verdict, line.verdict_reason, line.against = _accuracy_verdict(run, line)
    return line


def _take_means(run: ResolvedRun, result: AccuracyResult, seeds: list[AccuracyResult]) -> None:
    """Replace a result's passes by their means over the seeds; before training there is one model, so one pass."""
    result.passes = dict(result.passes)
    for name in ("after", "control"):
        passes = [own.passes[name] for own in seeds if name in own.passes]
        if len(passes) == len(seeds):
            result.passes[name] = mean_over_seeds(passes)
        else:
            result.passes.pop(name, None)
    official = [own.official for own in seeds if own.official is not None]
    result.official = mean_over_seeds(official) if len(official) == len(seeds) else None
    result.gain = result.looking = None
    compare_passes(result, run.settings.seed)


def _work_status(verb: str, work: Any, problems: list[str], complete: bool) -> tuple[str, str]:
    if complete:
        return "done", ""
    if problems:
        return "damaged", problems[0]
    if work.log is not None:
        return "did not finish", f"{verb} is running or failed; its log: {work.log}"
    return "not run yet", f"{verb} has not run yet"


def _accuracy_status(result: AccuracyResult) -> tuple[str, str]:
    if "after" in result.passes:
        return "done", ""
    if result.problems:
        return "damaged", result.problems[0]
    if result.train.manifest is None:
        status, reason = _work_status("training", result.train, [], False)
        if status == "not run yet" and result.curve:
            return "did not finish", f"training stopped after step {result.curve[-1].get('step')}"
        if status == "not run yet" and result.baseline.manifest is None and result.baseline.log is not None:
            return (
                "did not finish",
                f"the evaluation before training is running or failed; its log: {result.baseline.log}",
            )
        return status, reason
    return _work_status("evaluation", result.evaluate, [], False)


def _accuracy_verdict(run: ResolvedRun, line: AccuracyLine) -> tuple[str, str, statistics.AgainstPublished | None]:
    """Verdict, its reason, and the comparison where one is allowed."""
    if line.status != "done":
        return "not run" if line.status == "not run yet" else line.status, line.reason, None
    if line.row.published is None:
        return "", "no published figure", None
    reason = _not_comparable(run, line)
    if reason:
        return "not comparable", reason, None
    assert line.result is not None
    after = line.result.passes["after"]
    against = statistics.against_published(
        after.score, after.n, line.row.published, line.row.published_examples or after.n, after.scores,
        line.seed_scores,
    )  # fmt: skip
    low, high = against.interval
    seeds = f", mean of {len(line.seed_scores)} seeds" if line.spread else ""
    return (
        against.verdict,
        f"difference {against.difference:+.1f} [{low:+.1f}, {high:+.1f}], margin {statistics.MARGIN:g}{seeds}",
        against,
    )


def _not_comparable(run: ResolvedRun, line: AccuracyLine) -> str:
    """Why our figure must not be held against the published one, or an empty string."""
    assert line.job is not None and line.result is not None
    if not run.settings.comparable:
        return run.settings.notice or "this run is marked as not comparable"
    if line.job.pool.stand_in or run.hardware[line.job.pool.device].kind == "cpu":
        return f"other hardware: {run.hardware[line.job.pool.device].title}"
    if line.row.legacy_freezing:
        return "legacy freezing: not what a frozen vision part means"
    if line.row.published_doubted:
        return "the published figure very likely trained less than it says (see the note)"
    changed = line.job.departures.keys() - {"finetune", *fields_with(AccuracyRow, Role.EQUIVALENT)}
    changed |= line.row.finetune.keys() & {*fields_with(FinetuneSettings, Role.RECIPE, Role.NUMERICS)}
    if changed:
        return f"departs from the recipe: {', '.join(sorted(changed))}"
    expected = line.row.published_examples
    if expected is not None and line.n != expected:
        return f"{line.n} examples; the published figure has {expected}"
    return ""


def _unsteady(speed: dict[str, Any]) -> list[str]:
    """A note if the windows of a speed row differ by more than STEADY."""
    spread = speed.get("spread", 0.0)
    return [f"its windows differ by {100 * spread:.0f} %"] if spread > STEADY else []


def _notes(job: Job, trained: dict[str, Any], manifest: dict[str, Any] | None) -> list[str]:
    """What a reader must know about a result that was not repeated after a change."""
    notes = []
    expected = {
        "learning_rate": job.row.learning_rate,
        "num_train_epochs": job.row.epochs,
        "batch_size": job.row.batch_size,
    }
    for name, value in expected.items():
        if name in trained and trained[name] != value:
            notes.append(f"made with {name} {trained[name]:g}; the settings now say {value:g}")
    if manifest and manifest.get("dirty"):
        notes.append("made by code with uncommitted changes")
    return notes


def _is_older(manifest: dict[str, Any] | None, code: dict[str, Any] | None) -> bool:
    """Whether a result was made at another commit than the report. Re-runs are chosen, so this is shown, not mended."""
    made_by = (manifest or {}).get("commit")
    return bool(code and made_by and code.get("commit") and made_by != code["commit"])


def _ran(line: AccuracyLine | SpeedLine) -> tuple[Any, ...] | None:
    """What really ran: dtype and kernels seen, 4-bit layers, processes; None when unknown."""
    if line.status != "done" or line.result is None:
        return None
    seen = observed(line)
    return tuple(seen[name] for name in OBSERVED if name != "linear4bit_bytes") if seen["activation_dtype"] else None


def _mark_same_code(run: ResolvedRun, lines: list[Any]) -> None:
    """Note at each row the other rows that ask for something else, and ran the same code all the same."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for line in lines:
        ran = _ran(line)
        if ran is None:
            continue
        model = run.models[line.row.model]
        same = str(
            line.row.model_dump(include={*fields_with(type(line.row), Role.RECIPE, Role.EQUIVALENT)} - {"model"})
        )
        groups.setdefault((model.url, model.revision, same, ran), []).append(line)
    for group in groups.values():
        for line in group:
            line.same_as = [other.row.row for other in group if other is not line]


def _speedups(run: ResolvedRun, lines: list[SpeedLine]) -> None:
    """Speed-up against the first row of the same hardware's table, and what may be said about the published figure."""
    first: dict[str, float | None] = {}
    rates = {line.row.row: line.value("images_per_second") for line in lines if line.status == "done"}
    for line in lines:
        rate = line.value("images_per_second")
        first.setdefault(line.row.hardware, rate)
        base = first[line.row.hardware]
        line.speedup = rate / base if rate and base else None
        if line.status != "done":
            line.verdict, line.verdict_reason = (
                ("not run" if line.status in ("not run yet", "cannot run") else line.status),
                line.reason,
            )
            continue
        assert line.job is not None
        if line.value("stand_in") or line.job.pool.stand_in:
            line.verdict, line.verdict_reason = "not comparable", stand_in_text(line, run.hardware)
        elif not run.settings.comparable:
            line.verdict, line.verdict_reason = "not comparable", run.settings.notice
        elif line.row.published_doubted:
            line.verdict, line.verdict_reason = (
                "not comparable",
                "the published figure very likely did less work (see the note)",
            )
        elif line.row.accompanies:
            beside = rates.get(line.row.accompanies)
            line.verdict = f"{rate / beside:.2f} x recipe's" if rate and beside else "no published figure"
            line.verdict_reason = f"images/s over those of {line.row.accompanies}, measured here"
        elif line.row.published_images_per_second:
            ratio = rate / line.row.published_images_per_second
            line.verdict, line.verdict_reason = f"{ratio:.2f} x published", "images/s over the published images/s"


def stand_in_text(line: SpeedLine, hardware: dict[str, Hardware]) -> str:
    """Which devices of this run stand for which machines of the published table."""
    assert line.job is not None
    own = hardware[line.job.pool.device]
    count = line.value("world_size") or line.job.processes
    name = "CPU processes" if own.kind == "cpu" else own.title
    return f"{count} {name} stand for {line.row.nodes * line.row.gpus_per_node} {hardware_name(line.row.hardware)}"


def hardware_name(entry: str) -> str:
    """`a100-80gb` as A100, for texts."""
    return entry.split("-")[0].upper()


def asked(row: AccuracyRow | SpeedRow) -> str:
    """dtype and attention as the table asks."""
    return f"{row.dtype}, {'flash' if row.flash_attention else 'eager'}"


OBSERVED = (
    "activation_dtype",
    "attention_decoder",
    "attention_vision",
    "linear4bit_layers",
    "linear4bit_bytes",
    "zero_stage",
    "world_size",
    "nodes",
)


def observed(line: AccuracyLine | SpeedLine) -> dict[str, Any]:
    """What a row was seen to run with, from observed.json or speed.json; None for what is not known."""
    known: dict[str, Any] = dict.fromkeys(OBSERVED)
    if isinstance(line.result, AccuracyResult):
        known.update(line.result.observed)
    elif line.result is not None:
        known.update({**line.result.speed, **(line.result.speed.get("observed") or {})})
    return known


Column = tuple[str, Callable[[Any], Any]]


def _bound(get: Callable[[AccuracyLine], Any], index: int) -> Callable[[AccuracyLine], Any]:
    def value(line: AccuracyLine) -> Any:
        found = get(line)
        return None if found is None else found.interval[index]

    return value


def _after(line: AccuracyLine) -> Any:
    return line.result.passes.get("after") if line.result else None


def _gain(line: AccuracyLine) -> Any:
    return line.result.gain if line.result else None


def _looking(line: AccuracyLine) -> Any:
    return line.result.looking if line.result else None


def _more(name: str) -> Callable[[AccuracyLine], Any]:
    def value(line: AccuracyLine) -> Any:
        after = _after(line)
        return (after.more.get(name) or {}).get("score") if after else None

    return value


def official_figures(line: AccuracyLine) -> list[tuple[str, float, Any]]:
    """(metric, score, interval) on the authors' own split, their own metric first; [] where it is not done."""
    found = line.result.official if line.result else None
    if found is None:
        return []
    ours = (found.metric, found.score, found.interval)
    for name in ("official_anls", "consistency", "auroc"):
        figure = found.more.get(name) or {}
        if "score" in figure:
            return [(name, figure["score"], figure.get("interval")), ours]
    return [ours]


def _low_high(line: AccuracyLine) -> tuple[Any, Any]:
    figures = official_figures(line)
    return tuple(figures[0][2]) if figures and figures[0][2] else (None, None)  # type: ignore[return-value]


def _departures(line: Any) -> str:
    changed = line.job.departures if line.job else {}
    return "; ".join(f"{name} {plain(old)} -> {plain(new)}" for name, (old, new) in changed.items())


def plain(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ",".join(plain(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


ACCURACY_COLUMNS: list[Column] = [
    ("row", lambda r: r.row.row),
    ("model", lambda r: r.row.model),
    ("dataset", lambda r: r.row.dataset),
    ("method", lambda r: r.row.method),
    ("dtype", lambda r: r.row.dtype),
    ("metric", lambda r: _after(r).metric if _after(r) else None),
    ("before", lambda r: r.score("before")),
    ("after", lambda r: r.score("after")),
    ("control", lambda r: r.score("control")),
    ("n", lambda r: r.n),
    ("published", lambda r: r.row.published),
    ("after_low", _bound(_after, 0)),
    ("after_high", _bound(_after, 1)),
    ("after_minus_before", lambda r: _gain(r).difference if _gain(r) else None),
    ("after_minus_before_low", _bound(_gain, 0)),
    ("after_minus_before_high", _bound(_gain, 1)),
    ("after_minus_before_p", lambda r: _gain(r).p if _gain(r) else None),
    ("after_minus_control", lambda r: _looking(r).difference if _looking(r) else None),
    ("after_minus_control_low", _bound(_looking, 0)),
    ("after_minus_control_high", _bound(_looking, 1)),
    ("after_minus_control_p", lambda r: _looking(r).p if _looking(r) else None),
    ("after_minus_published", lambda r: r.against.difference if r.against else None),
    ("verdict", lambda r: r.verdict),
    ("verdict_reason", lambda r: r.verdict_reason),
    ("official_anls", _more("official_anls")),
    ("auroc", _more("auroc")),
    ("consistency", _more("consistency")),
    ("leaked", lambda r: _after(r).leaked if _after(r) else None),
    ("official_split", lambda r: r.official),
    ("official_metric", lambda r: official_figures(r)[0][0] if official_figures(r) else None),
    ("official_score", lambda r: official_figures(r)[0][1] if official_figures(r) else None),
    ("official_low", lambda r: _low_high(r)[0]),
    ("official_high", lambda r: _low_high(r)[1]),
    (
        "official_accuracy",
        lambda r: next((score for name, score, _ in official_figures(r) if name == "accuracy"), None),
    ),
    ("official_n", lambda r: r.result.official.n if official_figures(r) else None),
    ("official_leaked", lambda r: r.result.official.leaked if official_figures(r) else None),
    ("seeds", lambda r: " ".join(str(job.job.seed) for job in r.jobs if job.job)),
    ("after_of_each_seed", lambda r: " ".join(f"{score:.2f}" for score in r.seed_scores)),
    ("after_sd_over_seeds", lambda r: r.spread["sd"] if r.spread else None),
    ("origin", lambda r: r.row.origin),
    ("source", lambda r: r.row.source),
    ("asked_attention", lambda r: "flash" if r.row.flash_attention else "eager"),
    ("observed_dtype", lambda r: observed(r).get("activation_dtype")),
    ("observed_attention", lambda r: observed(r).get("attention_decoder")),
    ("linear4bit_layers", lambda r: observed(r).get("linear4bit_layers")),
    ("linear4bit_bytes", lambda r: observed(r).get("linear4bit_bytes")),
    ("not_distinguished_from", lambda r: " ".join(r.same_as)),
    ("departures", _departures),
    ("status", lambda r: r.status),
    ("reason", lambda r: r.reason),
    ("note", lambda r: r.row.note),
]

# In report.json alone: accuracy.tsv is the same to the byte where a run is repeated.
ACCURACY_TIMES: list[Column] = [
    ("train_seconds", lambda r: r.train_seconds),
    ("evaluate_seconds", lambda r: r.result.evaluate.seconds if r.result else None),
    ("gpu_hours", lambda r: r.gpu_hours),
]

SPEED_COLUMNS: list[Column] = [
    ("row", lambda r: r.row.row),
    ("model", lambda r: r.row.model),
    ("dataset", lambda r: r.row.dataset),
    ("method", lambda r: r.row.method),
    ("dtype", lambda r: r.row.dtype),
    ("flash_attention", lambda r: "yes" if r.row.flash_attention else "no"),
    ("hardware", lambda r: r.row.hardware),
    ("nodes", lambda r: r.row.nodes),
    ("gpus", lambda r: r.row.nodes * r.row.gpus_per_node),
    ("images_per_second", lambda r: r.value("images_per_second")),
    ("published_images_per_second", lambda r: r.row.published_images_per_second),
    ("speedup", lambda r: r.speedup),
    ("published_speedup", lambda r: r.row.published_speedup),
    ("tokens_per_second", lambda r: r.value("tokens_per_second")),
    ("tokens_per_second_per_device", lambda r: r.tokens_each),
    ("step_seconds", lambda r: r.value("step_seconds")),
    ("images_per_second_low", lambda r: r.spread["low"] if r.spread else None),
    ("images_per_second_high", lambda r: r.spread["high"] if r.spread else None),
    ("mfu", lambda r: r.value("mfu")),
    ("hfu", lambda r: r.value("hfu")),
    ("peak_memory_gb", lambda r: r.value("peak_memory_bytes") / GB if r.value("peak_memory_bytes") else None),
    (
        "reserved_memory_gb",
        lambda r: r.value("reserved_memory_bytes") / GB if r.value("reserved_memory_bytes") else None,
    ),
    ("context_memory_gb", lambda r: r.value("context_memory_bytes") / GB if r.value("context_memory_bytes") else None),
    ("published_memory_gb", lambda r: r.row.published_memory_gb),
    ("accompanies", lambda r: r.row.accompanies),
    ("batch_size_per_gpu", lambda r: observed(r).get("batch_size_per_gpu")),
    ("recompute_every", lambda r: observed(r).get("recompute_every")),
    ("processes", lambda r: r.value("world_size")),
    ("device", lambda r: r.value("device")),
    ("stand_in", lambda r: None if r.value("stand_in") is None else "yes" if r.value("stand_in") else "no"),
    ("verdict", lambda r: r.verdict),
    ("verdict_reason", lambda r: r.verdict_reason),
    ("observed_dtype", lambda r: observed(r).get("activation_dtype")),
    ("observed_attention", lambda r: observed(r).get("attention_decoder")),
    ("not_distinguished_from", lambda r: " ".join(r.same_as)),
    ("departures", _departures),
    ("seconds", lambda r: r.result.work.seconds if r.result else None),
    ("status", lambda r: r.status),
    ("reason", lambda r: r.reason),
    ("note", lambda r: r.row.note),
]


def as_records(lines: list[Any], columns: list[Column]) -> list[dict[str, Any]]:
    """The lines as plain values, a dict each."""
    return [{name: get(line) for name, get in columns} for line in lines]


def as_tsv(records: list[dict[str, Any]], columns: list[Column]) -> str:
    """Tab-separated text with a header; numbers with at most four decimals, nothing for what is not there."""
    out = ["\t".join(name for name, _ in columns)]
    out += ["\t".join(_cell(record[name]) for name, _ in columns) for record in records]
    return "\n".join(out) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return " ".join(str(value).split())
